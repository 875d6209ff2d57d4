"""Distances d(x, y) between batches of images, one value per sample."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import interpolate

from consistency.errors import require
from consistency.tensors import Data, PerSample, broadcast_time


@runtime_checkable
class Distance(Protocol):
    """d(x, y), one value per sample."""

    def __call__(self, x: Data, y: Data) -> PerSample: ...


class L1(nn.Module):
    """Mean of |x - y| over channels and pixels [Song et al. 2023, Section 5]."""

    def forward(self, x: Data, y: Data) -> PerSample:
        return (x - y).abs().mean(dim=(1, 2, 3))


class L2(nn.Module):
    """Mean of (x - y)^2 over channels and pixels [Song et al. 2023, Section 5]."""

    def forward(self, x: Data, y: Data) -> PerSample:
        return (x - y).square().mean(dim=(1, 2, 3))


class SquaredNorm(nn.Module):
    """||x - y||^2, the sum over channels and pixels [Karras et al. 2022, arXiv:2206.00364, Eq. 2; their code]."""

    def forward(self, x: Data, y: Data) -> PerSample:
        return (x - y).square().sum(dim=(1, 2, 3))


class L2OverDimension(nn.Module):
    """Mean of (x - y)^2, divided by the number of channels and pixels a second time [released code FastGen, sCM]."""

    def forward(self, x: Data, y: Data) -> PerSample:
        return (x - y).square().mean(dim=(1, 2, 3)) / x[0].numel()


class Adaptive(nn.Module):
    """S / stopgrad(S + c)^p with S = ||x - y||^2 [Geng et al. 2025, arXiv:2505.13447, adaptive weight]; p = 0 is S, p = 1 is nearly constant.

    per_dimension: S is the mean of the squares, not their sum [released code of alpha-Flow].
    """

    def __init__(self, *, p: float, c: float, per_dimension: bool = False) -> None:
        super().__init__()
        self.p, self.c, self.per_dimension = p, c, per_dimension

    def forward(self, x: Data, y: Data) -> PerSample:
        squares = (x - y).square()
        s = squares.mean(dim=(1, 2, 3)) if self.per_dimension else squares.sum(dim=(1, 2, 3))
        return s / (s.detach() + self.c) ** self.p


class AdaptiveStep(nn.Module):
    """||x - stopgrad(x + g / (||g|| + c)^p)||^2 with g = y - x: a step towards y whose length grows more slowly than ||g||.

    per_root_dimension: of g, divided by the root of the number of its values first [released code of FastGen, `opt_grad`].
    """

    def __init__(self, *, p: float, c: float, per_root_dimension: bool) -> None:
        super().__init__()
        self.p, self.c, self.per_root_dimension = p, c, per_root_dimension

    def forward(self, x: Data, y: Data) -> PerSample:
        g = (y - x).detach()
        if self.per_root_dimension:
            g = g / g[0].numel() ** 0.5
        length = vector_norm(g.flatten(1), dim=1)
        step = g / broadcast_time((length + self.c) ** self.p, g)
        return (x - (x.detach() + step)).square().sum(dim=(1, 2, 3))


class LInf(nn.Module):
    """Maximum of |x - y| over channels and pixels [released CIFAR-10 code, `linf`]."""

    def forward(self, x: Data, y: Data) -> PerSample:
        return (x - y).abs().amax(dim=(1, 2, 3))


class Resize(nn.Module):
    """Bilinear resizing to `size` x `size` (align_corners off).

    only_below: images whose side is at least this stay as they are, None resizes all; antialias: whether a reduction
    is filtered first.
    """

    def __init__(self, *, size: int, only_below: int | None, antialias: bool) -> None:
        super().__init__()
        require(size > 0, "size > 0", size, "give the side in pixels")
        self.size, self.only_below, self.antialias = size, only_below, antialias

    def forward(self, x: Data) -> Float[Tensor, "b c _h _w"]:
        if self.only_below is not None and x.shape[-1] >= self.only_below:
            return x
        side = (self.size, self.size)
        return interpolate(x, size=side, mode="bilinear", antialias=self.antialias)


class L2At32(nn.Module):
    """Mean of (x - y)^2 after resizing both to 32 x 32 [released ImageNet-64 and LSUN code, `l2-32`]."""

    def __init__(self) -> None:
        super().__init__()
        self.resize, self.l2 = Resize(size=32, only_below=None, antialias=False), L2()

    def forward(self, x: Data, y: Data) -> PerSample:
        return self.l2(self.resize(x), self.resize(y))


class PseudoHuber(nn.Module):
    """sqrt(||x - y||^2 + c^2) - c with one norm per image [Song and Dhariwal 2023, arXiv:2310.14189, Section 3.3].

    c >= 0 (0 is the plain norm ||x - y||); with `per_root_dimension` it is multiplied by the square root of the number
    of values of an image, as in that paper's c = 0.00054 sqrt(d).
    """

    def __init__(self, *, c: float, per_root_dimension: bool) -> None:
        super().__init__()
        require(c >= 0, "c >= 0", c, "0 is the plain norm")
        self.c, self.per_root_dimension = c, per_root_dimension

    def constant(self, x: Data) -> float:
        """c for images of this size."""
        return self.c * x[0].numel() ** 0.5 if self.per_root_dimension else self.c

    def forward(self, x: Data, y: Data) -> PerSample:
        c = self.constant(x)
        if c == 0:
            # Its own gradient is 0 at 0; that of sqrt(0 + 0) would be infinite.
            return vector_norm((x - y).flatten(1), dim=1)
        return ((x - y).square().sum(dim=(1, 2, 3)) + c**2).sqrt() - c


class LPIPS(nn.Module):
    """sum_l mean_hw sum_c w_lc (phi_lc(x) - phi_lc(y))^2 [Zhang et al. 2018, arXiv:1801.03924, Eq. 1].

    phi_l: the maps of layer l of `features`, divided by their norm over channels; weights: w_l; resize: what is done
    to the images first. `consistency.training.lpips.load_lpips` gives the published ones.
    """

    def __init__(
        self, *, features: nn.Module, weights: Sequence[Float[Tensor, "_c"]], resize: nn.Module
    ) -> None:
        super().__init__()
        self.features, self.resize = features, resize
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)

    def forward(self, x: Data, y: Data) -> PerSample:
        return self.per_layer(x, y).sum(0)

    def per_layer(self, x: Data, y: Data) -> Float[Tensor, "l b"]:
        """The summand of every layer, in the precision of the images even where the rest runs in half."""
        with torch.autocast(x.device.type, enabled=False):
            both = zip(self.features(self.resize(x)), self.features(self.resize(y)), strict=True)
            layers = [
                (w[:, None, None] * (_unit(phi_x) - _unit(phi_y)).square()).sum(1).mean((1, 2))
                for w, (phi_x, phi_y) in zip(self.weights, both, strict=True)
            ]
            return torch.stack(layers)


def _unit(phi: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """phi over its norm along the channels, 0 where all channels are 0.

    The published code divides by ||phi|| + 1e-10: the same but for a share of 1e-10 / ||phi||, but without a second
    derivative at 0, which the continuous-time losses need.
    """
    return phi * (phi.square().sum(1, keepdim=True) + 1e-20).rsqrt()
