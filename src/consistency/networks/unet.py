"""The blocks and the trunk of the U-Nets of Karras et al. (2022, arXiv:2206.00364, App. F.3).

DDPM++, NCSN++ and ADM differ in their time embedding, in the choices of `BlockStyle`, and in how the image itself takes
part. Names and shapes are those of the released NVlabs networks; rows of qkv stand in the order (head, dim, three).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from consistency.networks import layers
from consistency.networks.layers import Augmentation, Embedding, GroupNorm, Maps, NewMaps, OneHot
from consistency.tensors import NO_CLASS, Data, Label, Time

Stages: TypeAlias = Iterator[tuple[str, Float[Tensor, "b _ _ _"]]]
"""The last feature map of each resolution with its name, the lowest one first."""


def fir_filter(taps: Sequence[int | float]) -> Float[Tensor, "1 1 n n"]:
    """The separable low-pass filter of the given taps, with sum 1."""
    line = torch.tensor(list(taps), dtype=torch.float32)
    square = torch.outer(line, line)
    return (square / square.sum())[None, None]


def resample(
    x: Maps, kernel: Float[Tensor, "1 1 n n"], *, up: bool, padding: int
) -> Float[Tensor, "b c h2 w2"]:
    """Doubles (`up`) or halves height and width, filtering every channel with `kernel`."""
    channels = x.shape[1]
    kernels = kernel.to(x.dtype).expand(channels, 1, -1, -1)
    if up:
        return functional.conv_transpose2d(
            x, 4 * kernels, groups=channels, stride=2, padding=padding
        )
    return functional.conv2d(x, kernels, groups=channels, stride=2, padding=padding)


class Resample(nn.Module):
    """A change of resolution by a factor of two through a FIR filter [Karras et al. 2018]."""

    resample_filter: Tensor

    def __init__(self, taps: Sequence[int | float], *, up: bool) -> None:
        super().__init__()
        self.up, self.padding = up, (len(taps) - 1) // 2
        self.register_buffer("resample_filter", fir_filter(taps))

    def forward(self, x: Maps) -> Float[Tensor, "b c h2 w2"]:
        return resample(x, self.resample_filter, up=self.up, padding=self.padding)


class ResampledConv(nn.Conv2d):
    """A convolution after a change of resolution.

    `fused` (downsampling only) pads the image once for both: values near the border are those of NCSN++'s own.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        taps: Sequence[int | float],
        *,
        up: bool,
        fused: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.up, self.fused, self.fir_padding = up, fused, (len(taps) - 1) // 2
        self.register_buffer("resample_filter", fir_filter(taps))

    def forward(self, input: Maps) -> NewMaps:
        x, kernel = input, self.resample_filter
        if self.fused:
            padding = self.kernel_size[0] // 2 + self.fir_padding
            x = functional.conv2d(x, self.weight, self.bias, padding=padding)
            return resample(x, kernel, up=False, padding=0)
        return super().forward(resample(x, kernel, up=self.up, padding=self.fir_padding))


def group_norm(channels: int, eps: float) -> GroupNorm:
    """32 groups, or fewer so that each has at least four channels."""
    return GroupNorm(min(32, channels // 4), channels, eps=eps)


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """Settings shared by all blocks of a network; the defaults are those of ADM.

    `head_channels` None means one attention head; otherwise there are channels // head_channels,
    and no attention where that is zero. `project` gives resampled skips a 1x1 convolution always.
    """

    embedding: int
    dropout: float
    dropout_resolution: int | None
    attention: layers.Attention
    recompute: bool
    eps: float = 1e-5
    skip_scale: float = 1.0
    scale_shift: bool = True
    project: bool = False
    taps: tuple[int | float, ...] = (1.0, 1.0)
    head_channels: int | None = 64


class UNetBlock(nn.Module):
    """A residual block with time embedding, optional change of resolution and optional attention.

    Both residual sums are multiplied by `skip_scale`. [Karras et al. 2022, App. F.3]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.style, taps = style, style.taps
        self.norm0 = group_norm(in_channels, style.eps)
        if up or down:
            self.conv0: nn.Conv2d = ResampledConv(in_channels, out_channels, 3, taps, up=up)
        else:
            self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(style.embedding, out_channels * (2 if style.scale_shift else 1))
        self.norm1 = group_norm(out_channels, style.eps)
        self.dropout = layers.Dropout(style.dropout, style.dropout_resolution)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip: nn.Module = nn.Identity()
        if up or down:
            self.skip = Resample(taps, up=up)
            if style.project or in_channels != out_channels:
                self.skip = ResampledConv(in_channels, out_channels, 1, taps, up=up)
        elif in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)
        head_channels = style.head_channels or out_channels
        self.heads = out_channels // head_channels if attention else 0
        self.attention = style.attention if self.heads else None
        if self.heads:
            self.norm2 = group_norm(out_channels, style.eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Maps, embedding: Embedding) -> NewMaps:
        style = self.style
        h = self.conv0(layers.silu(self.norm0(x)))
        h = layers.modulated(self.norm1, h, self.affine(embedding), style.scale_shift)
        h = self.dropout(layers.silu(h))
        h = (self.skip(x) + self.conv1(h)) * style.skip_scale
        return (h + self._mix(h)) * style.skip_scale if self.heads else h

    def _mix(self, x: Maps) -> Maps:
        """Self-attention over all pixels."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, h * w)
        q, k, v = qkv.permute(3, 0, 1, 4, 2)
        mixed = layers.attend(q, k, v, self.style.attention)
        return self.proj(mixed.transpose(-2, -1).reshape(b, c, h, w))


class UNet(nn.Module):
    """Base of both networks: blocks named by resolution, and skips from encoder to decoder.

    A network adds `_embedding`, of both times, the class as a one-hot row and the augmentation labels, and `_image`.
    """

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    map_layer0: nn.Linear
    _embedding: Callable[[Time, Time | None, OneHot | None, Augmentation | None], Embedding]
    _image: Callable[[Stages], Maps]
    no_class: ClassVar[int] = NO_CLASS
    """The class index that stands for no class."""

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        num_classes: int | None,
        augment_dim: int,
        widths: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        style: BlockStyle,
    ) -> None:
        super().__init__()
        layers.check_attention(style.attention)
        self.in_channels, self.num_classes, self.augment_dim = in_channels, num_classes, augment_dim
        self.sides = [image_size >> level for level in range(len(widths))]
        self.widths, self.num_res_blocks, self.style = list(widths), num_res_blocks, style
        self.attention_sides = set(attention_resolutions)
        self.recompute = style.recompute
        self._run = partial(layers.run, recompute=style.recompute)

    def _encoder(self, stem: int) -> tuple[nn.ModuleDict, list[int]]:
        """The blocks on the way down, and the width of each one's output."""
        block, enc = partial(UNetBlock, style=self.style), nn.ModuleDict()
        width, skips = stem, [stem]
        for side, level_width in zip(self.sides, self.widths, strict=True):
            name, attention = f"{side}x{side}", side in self.attention_sides
            if side == self.sides[0]:
                enc[f"{name}_conv"] = nn.Conv2d(self.in_channels, stem, 3, padding=1)
            else:
                enc[f"{name}_down"] = block(width, width, down=True)
                skips.append(width)
            for i in range(self.num_res_blocks):
                enc[f"{name}_block{i}"] = block(width, level_width, attention=attention)
                width = level_width
                skips.append(width)
        return enc, skips

    def _decoder(self, skips: list[int], *, attention_everywhere: bool) -> nn.ModuleDict:
        """The blocks on the way up; attention in every block of its resolutions or in the last."""
        block, dec = partial(UNetBlock, style=self.style), nn.ModuleDict()
        width = self.widths[-1]
        for side, level_width in zip(self.sides[::-1], self.widths[::-1], strict=True):
            name, attention = f"{side}x{side}", side in self.attention_sides
            if side == self.sides[-1]:
                dec[f"{name}_in0"] = block(width, width, attention=True)
                dec[f"{name}_in1"] = block(width, width)
            else:
                dec[f"{name}_up"] = block(width, width, up=True)
            for i in range(self.num_res_blocks + 1):
                chosen = attention and (attention_everywhere or i == self.num_res_blocks)
                inputs = width + skips.pop()
                dec[f"{name}_block{i}"] = block(inputs, level_width, attention=chosen)
                width = level_width
        return dec

    def forward(
        self,
        x: Data,
        c_noise: Time,
        label: Label = None,
        *,
        augment: Augmentation | None = None,
        r: Time | None = None,
    ) -> Float[Tensor, "b out h w"]:
        layers.check_label(label, self.num_classes)
        layers.check_images(x, channels=self.in_channels, divisor=2 ** (len(self.sides) - 1))
        if augment is not None and not self.augment_dim:
            raise ValueError(
                "expected no augmentation labels, because augment_dim=0; got some. "
                "Leave them out, or build the network with augment_dim."
            )
        dtype, row = self.map_layer0.weight.dtype, None
        if label is not None and self.num_classes is not None:
            row = layers.one_hot(label, self.num_classes, dtype)
        if self.augment_dim:  # missing augmentation labels are zeros
            augment = x.new_zeros(len(x), self.augment_dim) if augment is None else augment
            augment = augment.to(dtype)
        embedding = self._embedding(c_noise, r, row, augment)
        stages = self._decode(self._encode(x.to(dtype), embedding), embedding)
        return self._image(stages).to(x.dtype)

    def _encode(self, x: Maps, embedding: Embedding) -> list[Float[Tensor, "b _ _ _"]]:
        """Every output of the encoder. The image itself may enter again after each halving."""
        image, skips = x, [self.enc[f"{self.sides[0]}x{self.sides[0]}_conv"](x)]
        for side in self.sides:
            name = f"{side}x{side}"
            if side != self.sides[0]:
                skips.append(self._run(self.enc[f"{name}_down"], skips[-1], embedding))
            if f"{name}_aux_residual" in self.enc:
                image = (skips[-1] + self.enc[f"{name}_aux_residual"](image)) / math.sqrt(2)
                skips[-1] = image
            for i in range(self.num_res_blocks):
                skips.append(self._run(self.enc[f"{name}_block{i}"], skips[-1], embedding))
        return skips

    def _decode(self, skips: list[Float[Tensor, "b _ _ _"]], embedding: Embedding) -> Stages:
        h = skips[-1]
        for side in self.sides[::-1]:
            name = f"{side}x{side}"
            for kind in ("in0", "in1") if side == self.sides[-1] else ("up",):
                h = self._run(self.dec[f"{name}_{kind}"], h, embedding)
            for i in range(self.num_res_blocks + 1):
                h = torch.cat([h, skips.pop()], dim=1)
                h = self._run(self.dec[f"{name}_block{i}"], h, embedding)
            yield name, h
