"""The ADM U-Net of Dhariwal & Nichol (2021, arXiv:2105.05233), as used for consistency models.

Residual blocks modulated by time and class, self-attention at chosen resolutions, an encoder whose every output is
concatenated into the decoder. The modules carry the names of the `UNetModel` of openai/consistency_models, so that its
released .pt files load strictly; the rows of the qkv projection stand in the order (three, head, dim).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from consistency.networks.layers import (
    Attention,
    Embedding,
    GroupNorm,
    Maps,
    NewMaps,
    attend,
    check_attention,
    check_images,
    check_label,
    sinusoidal_features,
    zeroed,
)
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
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.skip_connection = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Maps, embedding: Embedding) -> NewMaps:
        norm, silu, conv = self.in_layers
        h = conv(self.resample(silu(norm(x))))
        e = self.emb_layers(embedding)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """x + project(attention(norm(x))) over all pixels; the projection starts at zero."""

    def __init__(self, channels: int, *, heads: int, groups: int, attention: Attention) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"expected channels divisible by the number of attention heads; got {channels} "
                f"and {heads}. Change num_heads or model_channels."
            )
        self.heads, self.attention = heads, attention
        self.norm = GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Maps) -> Maps:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        # Fused kernels want the last axis contiguous; the copy costs less than doing without.
        q, k, v = qkv.permute(1, 0, 2, 4, 3).contiguous()
        mixed = attend(q, k, v, self.attention).transpose(-2, -1).reshape(b, c, h, w)
        return x + self.proj_out(mixed)


class Stage(nn.ModuleList):
    """Layers in a row, of which the residual blocks also see the embedding.

    With `recompute` their activations are not kept but computed again in the backward pass, with
    the same dropout masks.
    """

    def __init__(self, *layers: nn.Module, recompute: bool) -> None:
        super().__init__(layers)
        self.recompute = recompute

    def forward(self, x: Maps, embedding: Embedding) -> NewMaps:
        for layer in self:
            arguments = (x, embedding) if isinstance(layer, ResBlock) else (x,)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x


class ADM(nn.Module):
    """The network F of (c_in x_t, c_noise, label); c_noise is 250 ln t for the OpenAI weights.

    `attention_resolutions` are sides of feature maps in pixels. `num_head_channels`, where given, decides the number of
    heads; else it is `num_heads`, in the decoder `num_heads_upsample` where that is given. `resblock_updown` changes
    resolution inside residual blocks; otherwise layers do, strided or followed by a convolution if `conv_resample`.
    `checkpoint_activations` trades a second forward pass for memory; PyTorch cannot combine it with forward-mode
    derivatives, for which `attention` must be "plain".
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
        num_heads: int = 1,
        num_heads_upsample: int | None = None,
        num_head_channels: int | None,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        conv_resample: bool = True,
        attention: Attention = "sdpa",
        checkpoint_activations: bool = False,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        check_attention(attention)
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.model_channels, self.num_res_blocks = model_channels, num_res_blocks
        self.attention_resolutions = tuple(attention_resolutions)
        self.widths = [int(mult * model_channels) for mult in channel_mult]
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_heads_upsample = num_heads
        if num_heads_upsample not in (None, -1):  # -1 in the published code
            self.num_heads_upsample = num_heads_upsample
        self.resblock_updown, self.conv_resample = resblock_updown, conv_resample
        self.scale_shift, self.dropout, self.num_groups = use_scale_shift_norm, dropout, num_groups
        self.attention, self.recompute = attention, checkpoint_activations

        self.embedding = embedding = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, embedding)
        self.input_blocks, skips = self._encoder()
        width = self.widths[-1]
        middle = (
            self._res(width, width),
            self._attention(width, num_heads),
            self._res(width, width),
        )
        self.middle_block = self._stage(*middle)
        self.output_blocks = self._decoder(skips)
        last = nn.Conv2d(self.widths[0], out_channels or in_channels, 3, padding=1)
        self.out = nn.Sequential(GroupNorm(num_groups, self.widths[0]), nn.SiLU(), zeroed(last))

    def _stage(self, *layers: nn.Module) -> Stage:
        return Stage(*layers, recompute=self.recompute)

    def _res(self, in_width: int, out_width: int, resample: nn.Module | None = None) -> ResBlock:
        return ResBlock(
            in_width,
            out_width,
            self.embedding,
            groups=self.num_groups,
            dropout=self.dropout,
            scale_shift=self.scale_shift,
            resample=resample,
        )

    def _attention(self, width: int, heads: int) -> AttentionBlock:
        if self.num_head_channels is not None:
            heads, rest = divmod(width, self.num_head_channels)
            if rest:
                raise ValueError(
                    f"expected channels divisible by num_head_channels; got {width} and "
                    f"{self.num_head_channels}. Change one, or set num_head_channels to null."
                )
        return AttentionBlock(width, heads=heads, groups=self.num_groups, attention=self.attention)

    def _block(self, in_width: int, out_width: int, level: int, heads: int) -> list[nn.Module]:
        """A residual block, and attention where the feature map has one of the chosen sides."""
        layers: list[nn.Module] = [self._res(in_width, out_width)]
        if self.image_size >> level in self.attention_resolutions:
            layers.append(self._attention(out_width, heads))
        return layers

    def _resample(self, kind: type[Downsample] | type[Upsample], width: int) -> nn.Module:
        """One change of resolution, as a residual block or as a layer of its own."""
        if self.resblock_updown:
            return self._res(width, width, kind(width, conv=False))
        return kind(width, conv=self.conv_resample)

    def _encoder(self) -> tuple[nn.ModuleList, list[int]]:
        """The blocks on the way down, and the width of each one's output."""
        width = self.widths[0]
        blocks = [self._stage(nn.Conv2d(self.in_channels, width, 3, padding=1))]
        skips = [width]
        for level, level_width in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                blocks.append(self._stage(*self._block(width, level_width, level, self.num_heads)))
                width = level_width
                skips.append(width)
            if level + 1 < len(self.widths):
                blocks.append(self._stage(self._resample(Downsample, width)))
                skips.append(width)
        return nn.ModuleList(blocks), skips

    def _decoder(self, skips: list[int]) -> nn.ModuleList:
        """The blocks on the way up; each takes one output of the encoder, the last one first."""
        blocks: list[Stage] = []
        width, skips = self.widths[-1], list(skips)
        for level in reversed(range(len(self.widths))):
            for i in range(self.num_res_blocks + 1):
                layers = self._block(
                    width + skips.pop(), self.widths[level], level, self.num_heads_upsample
                )
                width = self.widths[level]
                if level > 0 and i == self.num_res_blocks:
                    layers.append(self._resample(Upsample, width))
                blocks.append(self._stage(*layers))
        return nn.ModuleList(blocks)

    def forward(self, x: Data, c_noise: Time, label: Label = None) -> Float[Tensor, "b out h w"]:
        check_label(label, self.num_classes)
        check_images(x, channels=self.in_channels, divisor=2 ** (len(self.widths) - 1))
        dtype = next(self.parameters()).dtype
        embedding = self.time_embed(sinusoidal_features(c_noise, self.model_channels).to(dtype))
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
