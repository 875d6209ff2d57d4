"""Lengths of tangents: the limits of the distances when the two times of a pair coincide.

A tangent g = d/dt f(x_t, t) is the derivative of the consistency function along the PF-ODE; it vanishes for the exact
one. For a distance d the length is that of its metric tensor, g^T H g with H the Hessian of d(., f) at f
[Song et al. 2023, arXiv:2303.01469, Appendix B, Theorem 3].
"""

from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.linalg import vector_norm

from consistency.distances import Distance
from consistency.tensors import Data, Denoise, Label, PerSample, Time, broadcast_time


def derivative_along(
    denoise: Denoise, x_t: Data, t: Time, v: Data, label: Label, rate: Time | None = None
) -> tuple[Data, Data]:
    """f and g = rate df/dt + (df/dx) v at (x_t, t), by one forward-mode derivative; rate None is 1."""
    rate = torch.ones_like(t) if rate is None else rate
    # The fused attention kernels have no forward-mode derivative, and half precision has too few digits for one.
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, torch.autocast(x_t.device.type, enabled=False):
        derivative = torch.func.jvp(lambda x, time: denoise(x, time, label), (x_t, t), (v, rate))
    return derivative[0], derivative[1]


@runtime_checkable
class Normalisation(Protocol):
    """A tangent -> the same at a bounded length."""

    def __call__(self, g: Data) -> Data: ...


def normalised(g: Data, *, c: float, per_root_dimension: bool) -> Data:
    """g / (||g|| + c) [Lu and Song 2024, arXiv:2410.11081: c = 0.1].

    per_root_dimension: the root mean square takes the place of the length ||g|| [released code FastGen].
    """
    length = vector_norm(g.flatten(1), dim=1)
    if per_root_dimension:
        length = length / g[0].numel() ** 0.5
    return g / broadcast_time(length + c, g)


@runtime_checkable
class TangentLength(Protocol):
    """The length of g at f."""

    def length(self, f: Data, g: Data) -> PerSample: ...


@runtime_checkable
class TangentMetric(TangentLength, Protocol):
    """A length that comes from a metric tensor H, and H g."""

    def lowered(self, f: Data, g: Data) -> Data: ...


class L1Tangent(nn.Module):
    """Mean of |g| [released CIFAR-10 code, `l1`]."""

    def length(self, f: Data, g: Data) -> PerSample:
        return g.abs().mean(dim=(1, 2, 3))


class LInfTangent(nn.Module):
    """Maximum of |g| [released CIFAR-10 code, `linf`]."""

    def length(self, f: Data, g: Data) -> PerSample:
        return g.abs().amax(dim=(1, 2, 3))


class L2Tangent(nn.Module):
    """||g||, not squared, and H = 1 [released CIFAR-10 code, `l2`]."""

    def length(self, f: Data, g: Data) -> PerSample:
        return vector_norm(g.flatten(1), dim=1)

    def lowered(self, f: Data, g: Data) -> Data:
        return g


class HessianTangent(nn.Module):
    """g^T H g with H the Hessian of `distance`, for LPIPS and any smooth distance [Song et al. 2023, Theorem 3]."""

    def __init__(self, *, distance: Distance) -> None:
        super().__init__()
        self.distance = distance

    def length(self, f: Data, g: Data) -> PerSample:
        return (g * self.lowered(f, g)).sum(dim=(1, 2, 3))

    @torch.enable_grad()
    def lowered(self, f: Data, g: Data) -> Data:
        """H g, by differentiating d(y, f) twice at y = f; carries gradients to f and g where they take some."""
        keep = f.requires_grad or g.requires_grad
        y = f.clone() if f.requires_grad else f.clone().requires_grad_()
        (first,) = torch.autograd.grad(self.distance(y, f).sum(), y, create_graph=True)
        (second,) = torch.autograd.grad((first * g).sum(), y, create_graph=keep)
        return second
