"""ADM of Dhariwal & Nichol (2021, arXiv:2105.05233), in the form of Karras et al. (2022).

The same function as `adm.ADM` with scale-shift normalisation and resampling residual blocks, under
the names and shapes of the released NVlabs networks. c_noise is 0.25 ln t.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.nn import functional

from consistency.networks import layers
from consistency.networks.layers import zeroed
from consistency.networks.unet import BlockStyle, Stages, UNet, UNetBlock, group_norm
from consistency.tensors import Time


class DhariwalUNet(UNet):
    """The network F of (c_in x_t, c_noise, label); a label of -1 stands for "no class".

    There is one attention head per 64 channels, and no attention where there are fewer channels. `augment` tells how a
    training image was augmented (Karras et al. 2022, App. F.2); left out, it means "not at all". `dropout_resolution` is the
    largest side of feature maps with dropout. `second_time` joins the features of a second time to those of the first.
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
        channel_mult_emb: int = 4,
        attention: layers.Attention = "sdpa",
        checkpoint_activations: bool = False,
        second_time: layers.SecondTime = None,
    ) -> None:
        style = BlockStyle(
            embedding=channel_mult_emb * model_channels,
            dropout=dropout,
            dropout_resolution=dropout_resolution,
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
        self.model_channels, self.second_time = model_channels, second_time
        width = layers.times_of(second_time) * model_channels
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, width, bias=False)
        self.map_layer0 = nn.Linear(width, style.embedding)
        self.map_layer1 = nn.Linear(style.embedding, style.embedding)
        if num_classes is not None:
            self.map_label = nn.Linear(num_classes, style.embedding, bias=False)
        self.enc, skips = self._encoder(self.widths[0])
        self.dec = self._decoder(skips, attention_everywhere=True)
        self.out_norm = group_norm(self.widths[0], style.eps)
        self.out_conv = nn.Conv2d(self.widths[0], out_channels or in_channels, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        """Label rows ~ N(0, 1); zero where a residual branch or the network ends."""
        zeroed(self.out_conv)
        if self.augment_dim:
            nn.init.zeros_(self.map_augment.weight)
        if self.num_classes is not None:
            nn.init.normal_(self.map_label.weight)
        for block in self.modules():
            if isinstance(block, UNetBlock):
                zeroed(block.conv1)
                if block.heads:
                    zeroed(block.proj)

    def _embedding(
        self,
        c_noise: Time,
        r: Time | None,
        row: layers.OneHot | None,
        augment: layers.Augmentation | None,
    ) -> layers.Embedding:
        positions = partial(layers.sinusoidal_features, width=self.model_channels)
        features = layers.two_times(positions, c_noise, r, self.second_time)
        features = features.to(self.map_layer0.weight.dtype)
        if augment is not None:
            features = features + self.map_augment(augment)
        embedding = self.map_layer1(functional.silu(self.map_layer0(features)))
        if row is not None:
            embedding = embedding + self.map_label(row)
        return functional.silu(embedding)

    def _image(self, stages: Stages) -> layers.Maps:
        *_, (_, h) = stages
        return self.out_conv(functional.silu(self.out_norm(h)))
