"""Distances d(x, y) between batches of images, one value per sample."""

from typing import Protocol

from torch import Tensor, nn
from torch.linalg import vector_norm

from consistency.errors import require
from consistency.tensors import Data, PerSample


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


class PseudoHuber(nn.Module):
    """sqrt(||x - y||^2 + c^2) - c with one norm per image [Song and Dhariwal 2023, arXiv:2310.14189, Section 3.3].

    c >= 0 (0 is the plain norm ||x - y||); with `per_root_dimension` it is multiplied by the square root of the number
    of values of an image, as in that paper's c = 0.00054 sqrt(d).
    """

    def __init__(self, *, c: float, per_root_dimension: bool) -> None:
        super().__init__()
        require(c >= 0, "c >= 0", c, "0 is the plain norm")
        self.c, self.per_root_dimension = c, per_root_dimension

    def forward(self, x: Data, y: Data) -> PerSample:
        norm: Tensor = vector_norm((x - y).flatten(1), dim=1)
        c = self.c * x[0].numel() ** 0.5 if self.per_root_dimension else self.c
        # The norm's own gradient is 0 at 0; that of sqrt(0 + 0) would be infinite.
        return norm if c == 0 else (norm**2 + c**2).sqrt() - c
