"""Layers that every network shares: normalisation, attention, sinusoidal features, input checks.

They compute what is sensitive to rounding (statistics, softmax logits, sines) in at least float32,
so that a network runs in half precision without special cases.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from consistency.tensors import Data, Label, Time

Attention: TypeAlias = Literal["sdpa", "plain"]
"""`sdpa`: PyTorch's fused kernel; `plain`: the formula, which also has forward-mode derivatives."""

SecondTime: TypeAlias = Literal["gap", "end", "halvings"] | None
"""The second time that a network of average velocities is told: t - r, r itself, or log2(1 / (t - r)) / 7; None: it has one time."""

SHORTEST = 2**-10
"""The gap in the place of a smaller one, in the logarithm."""

Maps: TypeAlias = Float[Tensor, "b c h w"]
NewMaps: TypeAlias = Float[Tensor, "b d h2 w2"]
"""Feature maps, and such of another width or resolution."""

Embedding: TypeAlias = Float[Tensor, "b e"]
Augmentation: TypeAlias = Float[Tensor, "b a"]
OneHot: TypeAlias = Float[Tensor, "b k"]
Heads: TypeAlias = Float[Tensor, "b heads n d"]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type for parts sensitive to rounding: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


class GroupNorm(nn.GroupNorm):
    """Group normalisation, never in half precision [Wu & He 2018, arXiv:1803.08494]."""

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        dtype = at_least_float32(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        y = functional.group_norm(x.to(dtype), self.num_groups, weight, bias, self.eps)
        return y.to(x.dtype)


def silu(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """x sigmoid(x) of a tensor that nothing else needs: in place, unless the gradient does."""
    return functional.silu(x, inplace=not torch.is_grad_enabled())


Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def zeroed(module: Layer) -> Layer:
    """The layer with weight and bias set to zero: its branch starts as "no change"."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoidal_features(
    c_noise: Time, width: int, *, reach_lowest: bool = False
) -> Float[Tensor, "b width"]:
    """[cos(w_i c), sin(w_i c)], frequencies w_i falling geometrically from 1 towards 1/10000.

    The positional encoding of Vaswani et al. (2017, arXiv:1706.03762) applied to time. The lowest
    frequency is 10000^-(1 - 2/width) in the ADM networks and exactly 1/10000 in DDPM++
    (`reach_lowest`). An odd width is padded with one zero.
    """
    half = width // 2
    c = c_noise.to(at_least_float32(c_noise.dtype))
    index = torch.arange(half, dtype=c.dtype, device=c.device)
    steps = half - 1 if reach_lowest else half
    phase = c[:, None] * torch.exp(-math.log(10000.0) * index / steps)
    features = torch.cat([phase.cos(), phase.sin()], dim=1)
    return functional.pad(features, (0, width % 2))


def two_times(
    features: Callable[[Time], Float[Tensor, "b width"]],
    c_noise: Time,
    r: Time | None,
    second_time: SecondTime,
) -> Float[Tensor, "b _widths"]:
    """The features of the time; of a network with two, joined by those of the second."""
    second = second_of(c_noise, r, second_time)
    if second is None:
        return features(c_noise)
    return torch.cat([features(c_noise), features(second)], dim=1)


def second_of(c_noise: Time, r: Time | None, second_time: SecondTime) -> Time | None:
    """The second time that the network is told, None if it has one time; r None stands for 0."""
    if second_time is None:
        if r is not None:
            raise ValueError(
                "expected one time, because second_time=null; got a second one. "
                "Leave r out, or build the network with second_time=gap or end."
            )
        return None
    return told(c_noise, torch.zeros_like(c_noise) if r is None else r, second_time)


def told(c_noise: Time, r: Time, second_time: SecondTime) -> Time:
    """The second time, from the first and the end r.

    halvings: log2(1 / (t - r)) / 7, from 0 of the whole path to 1 of 1/128 of it [Frans et al. 2024, arXiv:2410.12557, whose
    network is told the logarithm itself].
    """
    if second_time == "end":
        return r
    gap = c_noise - r
    return gap if second_time == "gap" else -gap.clamp(min=SHORTEST).log2() / 7


def attend(q: Heads, k: Heads, v: Heads, kind: Attention) -> Heads:
    """softmax(q k^T / sqrt(d)) v  [Vaswani et al. 2017, arXiv:1706.03762, Eq. 1]."""
    if q.stride(-1) != 1:  # fused kernels want the last axis contiguous
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if kind == "sdpa":
        return functional.scaled_dot_product_attention(q, k, v)
    dtype = at_least_float32(q.dtype)
    logits = q.to(dtype) @ k.to(dtype).transpose(-2, -1) / math.sqrt(q.shape[-1])
    return logits.softmax(dim=-1).to(v.dtype) @ v


def modulated(norm: nn.Module, h: Maps, e: Float[Tensor, "b _"], scale_shift: bool) -> Maps:
    """norm(h), scaled and shifted by e ("adaptive group normalisation"), or norm(h + e)."""
    e = e[:, :, None, None]
    if not scale_shift:
        return norm(h + e)
    scale, shift = e.chunk(2, dim=1)
    return torch.addcmul(shift, norm(h), 1 + scale)  # one pass over the maps


def run(layer: nn.Module, *inputs: Tensor, recompute: bool) -> Float[Tensor, "b ..."]:
    """The layer's output; `recompute` computes its activations, with the same dropout, again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


def recomputes(network: nn.Module) -> bool:
    """Whether the network computes activations again in the backward pass."""
    return any(getattr(part, "recompute", False) for part in network.modules())


def attends_fused(network: nn.Module) -> bool:
    """Whether the network has attention by PyTorch's fused kernel."""
    return any(getattr(part, "attention", None) == "sdpa" for part in network.modules())


class Dropout(nn.Dropout):
    """Dropout of feature maps with at most `largest` rows; None: of all [Song and Dhariwal 2023, arXiv:2310.14189, Section 3.3]."""

    def __init__(self, p: float, largest: int | None) -> None:
        super().__init__(p)
        self.largest = largest

    def forward(self, input: Maps) -> Maps:
        applies = self.largest is None or input.shape[-2] <= self.largest
        return super().forward(input) if applies else input


def check_attention(kind: str) -> None:
    """Refuse an unknown kind of attention."""
    if kind not in ("sdpa", "plain"):
        raise ValueError(f'expected attention to be "sdpa" or "plain"; got "{kind}"')


def times_of(second_time: str | None) -> int:
    """The number of times that a network is told. Refuse an unknown kind of second time."""
    if second_time not in ("gap", "end", "halvings", None):
        kinds = '"gap", "end", "halvings" or None'
        raise ValueError(f'expected second_time to be {kinds}; got "{second_time}"')
    return 1 if second_time is None else 2


def check_label(label: Label, num_classes: int | None) -> None:
    """Refuse a label for an unconditional network, and a missing label for a conditional one."""
    if num_classes is None and label is not None:
        raise ValueError(
            "expected no label, because the network is unconditional (num_classes=null); got class "
            "indices. Pass label=None, or build the network with num_classes."
        )
    if num_classes is not None and label is None:
        raise ValueError(
            f"expected class indices in 0..{num_classes - 1}, because the network is "
            f"class-conditional (num_classes={num_classes}); got none. Pass one label per image."
        )


def check_images(x: Data, *, channels: int, divisor: int) -> None:
    """Refuse a wrong number of channels, and sides that cannot be halved often enough."""
    if x.shape[1] != channels:
        raise ValueError(
            f"expected images of {channels} channels; got shape {tuple(x.shape)}. "
            "Change the data, or in_channels of the network."
        )
    if x.shape[2] % divisor or x.shape[3] % divisor:
        raise ValueError(
            f"expected height and width divisible by {divisor}, because the network halves them "
            f"{divisor.bit_length() - 1} times; got {tuple(x.shape[2:])}. "
            "Resize the images, or shorten channel_mult."
        )


def one_hot(label: Int[Tensor, "b"], num_classes: int, dtype: torch.dtype) -> OneHot:
    """Class indices as rows of the identity matrix; a negative index ("no class") as zeros."""
    rows = functional.one_hot(label.clamp(min=0), num_classes)
    return (rows * (label >= 0)[:, None]).to(dtype)
