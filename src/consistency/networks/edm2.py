"""The magnitude-preserving U-Net EDM2 of Karras et al. (2024, arXiv:2312.02696), configuration G.

Every layer keeps the expected magnitude, the root mean square, of what it is given: weights are normalised wherever they
are used, sums and concatenations are weighted, and there are no biases and no group norms. Beside that, training
overwrites the weights by their normalised form before each step (`forced_normalisation`), so that their length does not
grow and the learning rate alone decides how fast they turn; averages and checkpoints hold the weights as the optimizer
left them. The modules carry the names of the released networks, whose qkv rows stand in the order (head, dim, three).
c_noise is 0.25 ln t.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional

from consistency.networks import layers
from consistency.networks.layers import Embedding, Maps, NewMaps, at_least_float32
from consistency.networks.unet import fir_filter, resample
from consistency.tensors import NO_CLASS, Data, Label, Time

EPS = 1e-4
"""Added to the root mean square in `normalise`, as in the released code: outputs without it are off by 2e-4."""


def normalise(x: Float[Tensor, "*n"], dims: tuple[int, ...] | None = None) -> Float[Tensor, "*n"]:
    """x / (rms(x) + 1e-4), the root mean square over `dims`; None: over all but the first."""
    dims = tuple(range(1, x.ndim)) if dims is None else dims
    length = vector_norm(x, dim=dims, keepdim=True, dtype=at_least_float32(x.dtype))
    rms = length / math.sqrt(math.prod([x.shape[d] for d in dims]))
    return x / (rms + EPS).to(x.dtype)


def mp_silu(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """silu(x) / 0.596, of unit magnitude for unit normal x [Eq. 81]."""
    return functional.silu(x) / 0.596


def mp_sum(a: Float[Tensor, "*n"], b: Float[Tensor, "*n"], t: float) -> Float[Tensor, "*n"]:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2) [Eq. 88]."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(
    a: Float[Tensor, "b n *space"], b: Float[Tensor, "b m *space"], t: float
) -> Float[Tensor, "b _ *space"]:
    """The channels of a and b, whose shares of the magnitude are as 1 - t to t whatever their numbers [Eq. 103]."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale * (1 - t) / math.sqrt(n) * a, scale * t / math.sqrt(m) * b], dim=1)


class MPFourier(nn.Module):
    """sqrt(2) cos(w_i c + p_i) of c_noise, fixed w ~ 2 pi N(0, scale^2) and p ~ U(0, 2 pi) [Eq. 75]."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * scale * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, c_noise: Time) -> Float[Tensor, "b width"]:
        dtype = at_least_float32(c_noise.dtype)
        phase = c_noise.to(dtype)[:, None] * self.freqs.to(dtype) + self.phases.to(dtype)
        return math.sqrt(2) * phase.cos()


class MPPositions(nn.Module):
    """sqrt(2) [cos, sin] of c_noise at the frequencies of the transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, c_noise: Time) -> Float[Tensor, "b width"]:
        return math.sqrt(2) * layers.sinusoidal_features(c_noise, self.width)


class MPConv(nn.Module):
    """A convolution of side `kernel`, or a linear layer for 0, with normalised weights and without bias [Eq. 47].

    The output does not depend on the length of the weights; `gain` multiplies it.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        sides = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *sides))

    def used(self, gain: float | Tensor = 1.0) -> Float[Tensor, "out in *sides"]:
        """The weights that multiply the input: gain / sqrt(fan-in) times the normalised ones, in at least float32."""
        weight = normalise(self.weight.to(at_least_float32(self.weight.dtype)))
        return weight * (gain / math.sqrt(weight[0].numel()))

    def forward(
        self, x: Float[Tensor, "b in *space"], gain: float | Tensor = 1.0
    ) -> Float[Tensor, "b out *space"]:
        weight = self.used(gain).to(x.dtype)
        if weight.ndim == 2:
            return functional.linear(x, weight)
        return functional.conv2d(x, weight, padding=weight.shape[-1] // 2)


def forced_normalisation(network: nn.Module) -> Callable[[], None]:
    """Return the overwriting of all weights of `MPConv` in the network by their normalised form, as a function [Eq. 66].

    Training calls it before the passes of each optimizer step. So all of them see the same weights, that of a target too,
    and a compiled, recomputed or differentiated pass changes none.
    """
    weights = [part.weight for part in network.modules() if isinstance(part, MPConv)]

    @torch.no_grad()
    def overwrite() -> None:
        for weight in weights:
            weight.copy_(normalise(weight.to(at_least_float32(weight.dtype))))

    return overwrite


class Block(nn.Module):
    """A residual block with an embedding, optional change of resolution and optional attention.

    A block of the encoder starts with pixel norm, after a 1x1 convolution where the width changes; in one of the decoder
    that convolution stands beside the residual branch. The gain of the embedding starts at 0.
    resampling: None, or "down" or "up" by a factor of two.
    """

    taps: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding: int,
        encoder: bool,
        attends: bool = False,
        resampling: str | None = None,
        head_channels: int,
        attention: layers.Attention,
        resample_filter: Sequence[int | float],
        dropout: float,
        dropout_resolution: int | None,
        res_balance: float,
        attn_balance: float,
        clip_act: float | None,
    ) -> None:
        super().__init__()
        self.encoder, self.resampling = encoder, resampling
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        self.heads = out_channels // head_channels if attends else 0
        self.attention: layers.Attention | None = attention if self.heads else None
        if resampling is not None:
            with torch.device("cpu"):  # a constant, which a network built without memory has too
                taps = fir_filter(resample_filter)
            self.register_buffer("taps", taps, persistent=False)
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(embedding, out_channels)
        self.dropout = layers.Dropout(dropout, dropout_resolution)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        same = in_channels == out_channels
        self.conv_skip = nn.Identity() if same else MPConv(in_channels, out_channels, 1)
        if self.heads:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def forward(self, x: Maps, embedding: Embedding) -> NewMaps:
        if self.resampling is not None:
            padding = (self.taps.shape[-1] - 1) // 2
            x = resample(x, self.taps, up=self.resampling == "up", padding=padding)
        if self.encoder:
            x = normalise(self.conv_skip(x), dims=(1,))
        branch = self._residual(x, embedding)
        if not self.encoder:
            x = self.conv_skip(x)
        x = mp_sum(x, branch, self.res_balance)
        if self.attention is not None:
            x = mp_sum(x, self._mixed(x, self.attention), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _residual(self, x: Maps, embedding: Embedding) -> NewMaps:
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(embedding, gain=self.emb_gain) + 1
        return self.conv_res1(self.dropout(mp_silu(y * scale[:, :, None, None].to(y.dtype))))

    def _mixed(self, x: Maps, attention: layers.Attention) -> Maps:
        """Cosine attention over all pixels: queries, keys and values have unit magnitude."""
        b, c, h, w = x.shape
        qkv = self.attn_qkv(x).reshape(b, self.heads, c // self.heads, 3, h * w)
        q, k, v = normalise(qkv.permute(3, 0, 1, 4, 2), dims=(4,))
        mixed = layers.attend(q, k, v, attention)
        return self.attn_proj(mixed.transpose(-2, -1).reshape(b, c, h, w))


class EDM2(nn.Module):
    """The network F of (c_in x_t, c_noise, label); a label of -1 stands for "no class".

    A fresh network returns 0: `out_gain` starts at 0. There is one attention head per `num_head_channels` channels, and
    no attention where there are fewer; the first block of the decoder attends at any resolution.

    label_balance, concat_balance, res_balance, attn_balance: share t of the class in the embedding, of the skip in each
    concatenation, of the residual branch and of attention in each sum. clip_act: largest number in feature maps, None for
    no limit. channel_mult_noise, channel_mult_emb: widths of the time features and of the embedding, None for the first and
    the largest of `channel_mult`. fourier_scale: deviation of the frequencies in turns, None for those of the transformer.
    dropout_resolution: the largest side of feature maps with dropout. `second_time` joins the features of a second time to
    those of the first. `checkpoint_activations` trades a second forward pass for memory.
    """

    no_class: ClassVar[int] = NO_CLASS
    """The class index that stands for no class."""

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        model_channels: int,
        num_res_blocks: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_classes: int | None = None,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
        num_head_channels: int = 64,
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        fourier_scale: float | None = 1.0,
        resample_filter: Sequence[int | float] = (1, 1),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        attention: layers.Attention = "sdpa",
        checkpoint_activations: bool = False,
        second_time: layers.SecondTime = None,
    ) -> None:
        super().__init__()
        layers.check_attention(attention)
        times, self.second_time = layers.times_of(second_time), second_time
        self.in_channels, self.num_classes = in_channels, num_classes
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.sides = [image_size >> level for level in range(len(channel_mult))]
        self.widths = [mult * model_channels for mult in channel_mult]
        self.num_res_blocks, self.attention_sides = num_res_blocks, set(attention_resolutions)
        self.recompute = checkpoint_activations
        noise = (channel_mult_noise or channel_mult[0]) * model_channels
        embedding = (channel_mult_emb or max(channel_mult)) * model_channels
        self.emb_fourier = (
            MPPositions(noise) if fourier_scale is None else MPFourier(noise, fourier_scale)
        )
        self.emb_noise = MPConv(times * noise, embedding)
        if num_classes is not None:
            self.emb_label = MPConv(num_classes, embedding)
        block = partial(
            Block,
            embedding=embedding,
            head_channels=num_head_channels,
            attention=attention,
            resample_filter=resample_filter,
            dropout=dropout,
            dropout_resolution=dropout_resolution,
            res_balance=res_balance,
            attn_balance=attn_balance,
            clip_act=clip_act,
        )
        self.enc, skips = self._encoder(partial(block, encoder=True))
        self.dec = self._decoder(partial(block, encoder=False), skips)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.out_conv = MPConv(self.widths[0], in_channels, 3)

    def _encoder(self, block: Callable[..., Block]) -> tuple[nn.ModuleDict, list[int]]:
        """The layers on the way down, and the width of each one's output."""
        enc, width, skips = nn.ModuleDict(), self.widths[0], [self.widths[0]]
        for side, level_width in zip(self.sides, self.widths, strict=True):
            name = f"{side}x{side}"
            if side == self.sides[0]:
                enc[f"{name}_conv"] = MPConv(self.in_channels + 1, width, 3)
            else:
                enc[f"{name}_down"] = block(width, width, resampling="down")
                skips.append(width)
            for i in range(self.num_res_blocks):
                attends = side in self.attention_sides
                enc[f"{name}_block{i}"] = block(width, level_width, attends=attends)
                width = level_width
                skips.append(width)
        return enc, skips

    def _decoder(self, block: Callable[..., Block], skips: list[int]) -> nn.ModuleDict:
        """The blocks on the way up."""
        dec, width = nn.ModuleDict(), self.widths[-1]
        for side, level_width in zip(self.sides[::-1], self.widths[::-1], strict=True):
            name = f"{side}x{side}"
            if side == self.sides[-1]:
                dec[f"{name}_in0"] = block(width, width, attends=True)
                dec[f"{name}_in1"] = block(width, width)
            else:
                dec[f"{name}_up"] = block(width, width, resampling="up")
            for i in range(self.num_res_blocks + 1):
                attends = side in self.attention_sides
                inputs = width + skips.pop()
                dec[f"{name}_block{i}"] = block(inputs, level_width, attends=attends)
                width = level_width
        return dec

    def forward(
        self, x: Data, c_noise: Time, label: Label = None, *, r: Time | None = None
    ) -> Data:
        layers.check_label(label, self.num_classes)
        layers.check_images(x, channels=self.in_channels, divisor=2 ** (len(self.sides) - 1))
        embedding = self._embedding(c_noise, label, r)
        # The channel of ones takes the place of biases.
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).to(self.out_conv.weight.dtype)
        skips = []
        for name, layer in self.enc.items():
            h = layer(h) if name.endswith("_conv") else self._run(layer, h, embedding)
            skips.append(h)
        for name, block in self.dec.items():
            if "_block" in name:
                h = mp_cat(h, skips.pop(), self.concat_balance)
            h = self._run(block, h, embedding)
        return self.out_conv(h, gain=self.out_gain).to(x.dtype)

    def _run(self, block: nn.Module, h: Maps, embedding: Embedding) -> NewMaps:
        return layers.run(block, h, embedding, recompute=self.recompute)

    def _embedding(self, c_noise: Time, label: Label, r: Time | None) -> Embedding:
        dtype = self.emb_noise.weight.dtype
        features = layers.two_times(self.emb_fourier, c_noise, r, self.second_time)
        embedding = self.emb_noise(features.to(dtype))
        if label is not None and self.num_classes is not None:
            row = layers.one_hot(label, self.num_classes, dtype) * math.sqrt(self.num_classes)
            embedding = mp_sum(embedding, self.emb_label(row), self.label_balance)
        return mp_silu(embedding)
