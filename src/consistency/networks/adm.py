"""The ADM U-Net of Dhariwal & Nichol (2021, arXiv:2105.05233), as used for consistency models.

Residual blocks modulated by time and class, self-attention at chosen resolutions, an encoder whose every output is
concatenated into the decoder. The modules carry the names of the `UNetModel` of openai/consistency_models, so that its
released .pt files load strictly; the rows of the qkv projection stand in the order (three, head, dim).
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from consistency.networks import layers
from consistency.networks.layers import Embedding, GroupNorm, Maps, NewMaps, zeroed
from consistency.tensors import Data, Label, Time


class Downsample(nn.Module):
    """Halves height and width: a strided 3x3 convolution, or the mean of 2x2 pixels."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        if conv:
            self.op: nn.Module = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.op = nn.AvgPool2d(2)

    def forward(self, x: Maps) -> Float[Tensor, "b c h/2 w/2"]:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, followed by a 3x3 convolution if `conv`."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Maps) -> Float[Tensor, "b c 2*h 2*w"]:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """x + conv(silu(modulate(norm(conv(silu(norm(x)))), e))); `resample` acts on both branches.

    The embedding e either scales and shifts the second normalisation (`scale_shift`, "adaptive
    group normalisation") or is added before it; the second convolution starts at zero.
    [Dhariwal & Nichol 2021, arXiv:2105.05233, Sec. 3]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        groups: int,
        dropout: float,
        dropout_resolution: int | None,
        scale_shift: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(
            GroupNorm(groups, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        width = 2 * out_channels if scale_shift else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, width))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out_channels),
            nn.SiLU(),
            layers.Dropout(dropout, dropout_resolution),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.skip_connection = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Maps, embedding: Embedding) -> NewMaps:
        norm, _, conv = self.in_layers
        h = conv(self.resample(layers.silu(norm(x))))
        norm, _, dropout, last = self.out_layers
        h = layers.modulated(norm, h, self.emb_layers(embedding), self.scale_shift)
        return self.skip_connection(self.resample(x)) + last(dropout(layers.silu(h)))


class AttentionBlock(nn.Module):
    """x + project(attention(norm(x))) over all pixels; the projection starts at zero.

    `head_channels`, where given, decides the number of heads.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_channels: int | None,
        groups: int,
        attention: layers.Attention,
    ) -> None:
        super().__init__()
        self.heads = heads if head_channels is None else channels // head_channels
        if channels % (head_channels or heads):
            name = "num_heads" if head_channels is None else "num_head_channels"
            raise ValueError(
                f"expected channels divisible by {name}; got {channels} and "
                f"{head_channels or heads}. Change {name} or model_channels."
            )
        self.attention = attention
        self.norm = GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Maps) -> Maps:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.permute(1, 0, 2, 4, 3)
        mixed = layers.attend(q, k, v, self.attention).transpose(-2, -1).reshape(b, c, h, w)
        return x + self.proj_out(mixed)


class Stage(nn.ModuleList):
    """Layers in a row, of which the residual blocks also see the embedding."""

    def __init__(self, *parts: nn.Module, recompute: bool) -> None:
        super().__init__(parts)
        self.recompute = recompute

    def forward(self, x: Maps, embedding: Embedding) -> NewMaps:
        for layer in self:
            inputs = (x, embedding) if isinstance(layer, ResBlock) else (x,)
            x = layers.run(layer, *inputs, recompute=self.recompute)
        return x


class ADM(nn.Module):
    """The network F of (c_in x_t, c_noise, label); c_noise is 250 ln t for the OpenAI weights.

    `attention_resolutions` are sides of feature maps in pixels, `dropout_resolution` the largest side with dropout. `num_head_channels`, where given, decides the number of
    heads; else it is `num_heads`, in the decoder `num_heads_upsample` where that is given. `resblock_updown` changes
    resolution inside residual blocks; otherwise layers do, strided or followed by a convolution if `conv_resample`.
    `second_time` joins the features of a second time to those of the first.
    `checkpoint_activations` trades a second forward pass for memory, in losses without a forward-mode derivative.
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
        channel_mult: Sequence[int | float],
        num_classes: int | None = None,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
        num_heads: int = 1,
        num_heads_upsample: int | None = None,
        num_head_channels: int | None,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        conv_resample: bool = True,
        attention: layers.Attention = "sdpa",
        checkpoint_activations: bool = False,
        num_groups: int = 32,
        second_time: layers.SecondTime = None,
    ) -> None:
        super().__init__()
        layers.check_attention(attention)
        times, self.second_time = layers.times_of(second_time), second_time
        self.in_channels, self.num_classes = in_channels, num_classes
        self.model_channels, self.halvings = model_channels, len(channel_mult) - 1
        widths = [int(mult * model_channels) for mult in channel_mult]
        embedding, groups = 4 * model_channels, num_groups
        stage = partial(Stage, recompute=checkpoint_activations)
        residual = partial(
            ResBlock,
            embedding=embedding,
            groups=groups,
            dropout=dropout,
            dropout_resolution=dropout_resolution,
            scale_shift=use_scale_shift_norm,
        )
        attentive = partial(
            AttentionBlock, head_channels=num_head_channels, groups=groups, attention=attention
        )

        def block(in_width: int, out_width: int, level: int, heads: int) -> list[nn.Module]:
            """A residual block, and attention if the feature map has one of the chosen sides."""
            parts: list[nn.Module] = [residual(in_width, out_width)]
            if image_size >> level in attention_resolutions:
                parts.append(attentive(out_width, heads=heads))
            return parts

        def resampling(kind: type[Downsample] | type[Upsample], width: int) -> nn.Module:
            """One change of resolution, as a residual block or as a layer of its own."""
            if resblock_updown:
                return residual(width, width, resample=kind(width, conv=False))
            return kind(width, conv=conv_resample)

        self.time_embed = nn.Sequential(
            nn.Linear(times * model_channels, embedding),
            nn.SiLU(),
            nn.Linear(embedding, embedding),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, embedding)
        width, skips = widths[0], [widths[0]]
        first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([stage(first)])
        for level, level_width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(stage(*block(width, level_width, level, num_heads)))
                width = level_width
                skips.append(width)
            if level < self.halvings:
                self.input_blocks.append(stage(resampling(Downsample, width)))
                skips.append(width)
        self.middle_block = stage(
            residual(width, width), attentive(width, heads=num_heads), residual(width, width)
        )
        self.output_blocks = nn.ModuleList()
        heads_up = num_heads
        if num_heads_upsample is not None and num_heads_upsample != -1:  # -1 in the published code
            heads_up = num_heads_upsample
        for level, level_width in reversed([*enumerate(widths)]):
            for i in range(num_res_blocks + 1):
                parts = block(width + skips.pop(), level_width, level, heads_up)
                width = level_width
                if level > 0 and i == num_res_blocks:
                    parts.append(resampling(Upsample, width))
                self.output_blocks.append(stage(*parts))
        last = nn.Conv2d(width, out_channels or in_channels, 3, padding=1)
        self.out = nn.Sequential(GroupNorm(groups, width), nn.SiLU(), zeroed(last))

    def forward(
        self, x: Data, c_noise: Time, label: Label = None, *, r: Time | None = None
    ) -> Float[Tensor, "b out h w"]:
        layers.check_label(label, self.num_classes)
        layers.check_images(x, channels=self.in_channels, divisor=2**self.halvings)
        dtype = next(self.parameters()).dtype
        positions = partial(layers.sinusoidal_features, width=self.model_channels)
        features = layers.two_times(positions, c_noise, r, self.second_time)
        embedding = self.time_embed(features.to(dtype))
        if label is not None:
            embedding = embedding + self.label_emb(label)
        h, skips = x.to(dtype), []
        for block in self.input_blocks:
            h = block(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h).to(x.dtype)
