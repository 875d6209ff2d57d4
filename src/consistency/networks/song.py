"""DDPM++ and NCSN++ of Song et al. (2021, arXiv:2011.13456), in the form of Karras et al. (2022).

NCSN++ is also the network of the JAX consistency models on CIFAR-10. c_noise is 0.25 ln t. Names
and shapes are those of the released NVlabs networks.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from consistency.networks import layers
from consistency.networks.unet import BlockStyle, Resample, ResampledConv, Stages, UNet, group_norm
from consistency.tensors import Time


class PositionalFeatures(nn.Module):
    """[sin, cos] of c_noise at the frequencies of the transformer, as in DDPM++."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, c_noise: Time) -> Float[Tensor, "b width"]:
        features = layers.sinusoidal_features(c_noise, self.width, reach_lowest=True)
        return features.roll(self.width // 2, dims=1)


class FourierFeatures(nn.Module):
    """[sin, cos] of 2 pi w_i c_noise, fixed w ~ N(0, scale^2), as in NCSN++ [arXiv:2006.10739]."""

    freqs: Tensor

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * scale)

    def forward(self, c_noise: Time) -> Float[Tensor, "b width"]:
        c = c_noise.to(layers.at_least_float32(c_noise.dtype))
        phase = c[:, None] * (2 * math.pi * self.freqs.to(c.dtype))
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class SongUNet(UNet):
    """The network F of (c_in x_t, c_noise, label) in its published forms.

    |        | fourier_scale   | residual_input | channel_mult_noise | resample_filter |
    |--------|-----------------|----------------|--------------------|-----------------|
    | DDPM++ | None: positions | False          | 1                  | (1, 1)          |
    | NCSN++ | 16              | True           | 2                  | (1, 3, 3, 1)    |

    Improved consistency training takes a scale of 0.02. `skip_output` adds up an image over all
    resolutions. A label of -1 stands for "no class". `augment` tells how a training image was
    augmented (Karras et al. 2022, App. F.2); left out, it means "not at all". `dropout_resolution`
    is the largest side of feature maps with dropout. `second_time` joins the features of a second time to those of the first.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        out_channels: int | None = None,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_classes: int | None = None,
        augment_dim: int = 0,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
        fourier_scale: float | None,
        residual_input: bool,
        skip_output: bool = False,
        channel_mult_noise: int,
        channel_mult_emb: int = 4,
        resample_filter: Sequence[int | float],
        attention: layers.Attention = "sdpa",
        checkpoint_activations: bool = False,
        second_time: layers.SecondTime = None,
    ) -> None:
        style = BlockStyle(
            embedding=channel_mult_emb * model_channels,
            dropout=dropout,
            dropout_resolution=dropout_resolution,
            eps=1e-6,
            skip_scale=math.sqrt(0.5),
            scale_shift=False,
            project=True,
            taps=tuple(resample_filter),
            head_channels=None,
            attention=attention,
            recompute=checkpoint_activations,
        )
        super().__init__(
            image_size=image_size,
            in_channels=in_channels,
            num_classes=num_classes,
            augment_dim=augment_dim,
            widths=[mult * model_channels for mult in channel_mult],
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            style=style,
        )
        self.second_time, width = second_time, channel_mult_noise * model_channels
        self.map_noise: nn.Module = PositionalFeatures(width)
        if fourier_scale is not None:
            self.map_noise = FourierFeatures(width, fourier_scale)
        width *= layers.times_of(second_time)
        if num_classes is not None:
            self.map_label = nn.Linear(num_classes, width)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, width, bias=False)
        self.map_layer0 = nn.Linear(width, style.embedding)
        self.map_layer1 = nn.Linear(style.embedding, style.embedding)
        self.enc, skips = self._encoder(model_channels)
        self.dec = self._decoder(skips, attention_everywhere=False)
        self._add_image_branches(residual_input, skip_output, out_channels or in_channels)
        self._initialise()

    def _add_image_branches(
        self, residual_input: bool, skip_output: bool, out_channels: int
    ) -> None:
        """The paths by which the image enters beside the blocks and is built up beside them."""
        taps, channels = self.style.taps, self.in_channels
        for level, side in enumerate(self.sides):
            name, width = f"{side}x{side}", self.widths[level]
            if residual_input and level > 0:
                above = self.widths[level - 1]
                self.enc[f"{name}_aux_residual"] = ResampledConv(
                    channels, above, 3, taps, up=False, fused=True
                )
                channels = above
            if skip_output or level == 0:
                self.dec[f"{name}_aux_norm"] = group_norm(width, self.style.eps)
                self.dec[f"{name}_aux_conv"] = nn.Conv2d(width, out_channels, 3, padding=1)
            if skip_output and side != self.sides[-1]:
                self.dec[f"{name}_aux_up"] = Resample(taps, up=True)

    def _initialise(self) -> None:
        """Xavier-uniform weights, zero biases; almost zero where a residual branch ends."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                last = name.endswith((".conv1", ".proj", "_aux_conv"))
                gain = 1e-5 if last else math.sqrt(0.2) if name.endswith(".qkv") else 1.0
                nn.init.xavier_uniform_(module.weight, gain=gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _embedding(
        self,
        c_noise: Time,
        r: Time | None,
        row: layers.OneHot | None,
        augment: layers.Augmentation | None,
    ) -> layers.Embedding:
        features = layers.two_times(self.map_noise, c_noise, r, self.second_time)
        features = features.to(self.map_layer0.weight.dtype)
        if row is not None:
            features = features + self.map_label(row * math.sqrt(row.shape[1]))
        if augment is not None:
            features = features + self.map_augment(augment)
        return functional.silu(self.map_layer1(functional.silu(self.map_layer0(features))))

    def _image(self, stages: Stages) -> layers.Maps:
        shown = [(name, h) for name, h in stages if f"{name}_aux_norm" in self.dec]
        image = self._shown(*shown[0])
        for name, h in shown[1:]:
            image = self.dec[f"{name}_aux_up"](image) + self._shown(name, h)
        return image

    def _shown(self, name: str, h: layers.Maps) -> layers.NewMaps:
        return self.dec[f"{name}_aux_conv"](functional.silu(self.dec[f"{name}_aux_norm"](h)))
