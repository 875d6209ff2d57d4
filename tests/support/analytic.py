"""Distributions of data whose denoiser and consistency function are known in closed form.

Under x_t = x_0 + t z. Every coordinate of an image follows the law given, independently, except for `Points`.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from consistency.tensors import Data, Label, Time, broadcast_time

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Draw standard normal values from a seed."""
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=dtype)


def times(count: int, value: float, dtype: torch.dtype = DOUBLE) -> Time:
    """Return one time for every sample of a batch."""
    return torch.full((count,), value, dtype=dtype)


@dataclass(frozen=True)
class Gaussian:
    """Gaussian data N(mean, std^2)."""

    mean: float
    std: float

    def sample(self, *shape: int, seed: int = 0) -> Data:
        return self.mean + self.std * normal(*shape, seed=seed)

    def denoise(self, x_t: Data, t: Time, label: Label = None) -> Data:
        """Return D(x, t) = m + s^2 / (s^2 + t^2) (x - m)."""
        s, m = self.std, self.mean
        return m + s**2 / (s**2 + broadcast_time(t, x_t) ** 2) * (x_t - m)

    def flow(self, x_t: Data, t: Time, r: Time) -> Data:
        """Return the PF-ODE's solution at time r: m + sqrt((s^2 + r^2) / (s^2 + t^2)) (x - m)."""
        s, m = self.std, self.mean
        ratio = (s**2 + broadcast_time(r, x_t) ** 2) / (s**2 + broadcast_time(t, x_t) ** 2)
        return m + ratio.sqrt() * (x_t - m)


@dataclass(frozen=True)
class Mixture:
    """Data of the density sum_k weight_k N(mean_k, std_k^2)."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def posterior(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the probability of each mode given x_t, on the last axis."""
        variance = self.stds**2 + t[..., None] ** 2
        gap = x_t[..., None] - self.means
        return (self.weights.log() - variance.log() / 2 - gap**2 / (2 * variance)).softmax(-1)

    def denoise(self, x_t: Data, t: Time, label: Label = None) -> Data:
        """Return D(x, t) = sum_k w_k(x, t) (m_k + s_k^2 / (s_k^2 + t^2) (x - m_k))."""
        t = broadcast_time(t, x_t).expand_as(x_t)
        shrink = self.stds**2 / (self.stds**2 + t[..., None] ** 2)
        each = self.means + shrink * (x_t[..., None] - self.means)
        return (self.posterior(x_t, t) * each).sum(-1)

    def cdf(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return F_t(x), which is constant along the PF-ODE."""
        std = (self.stds**2 + t[..., None] ** 2).sqrt()
        return (self.weights * torch.special.ndtr((x_t[..., None] - self.means) / std)).sum(-1)

    def flow(self, x_t: Data, t: Time, r: Time) -> Data:
        """Return the PF-ODE's solution at time r: F_r^{-1}(F_t(x)), by bisection."""
        t, r = (broadcast_time(time, x_t).expand_as(x_t) for time in (t, r))
        share = self.cdf(x_t, t)
        low, high = -10 - 12 * r, 10 + 12 * r
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, r) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    @property
    def std(self) -> float:
        """Return the standard deviation of the data."""
        mean = (self.weights * self.means).sum()
        return float(((self.weights * (self.stds**2 + self.means**2)).sum() - mean**2).sqrt())


THREE_MODES = Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE),
    torch.tensor([-0.6, 0.2, 0.9], dtype=DOUBLE),
    torch.tensor([0.10, 0.15, 0.08], dtype=DOUBLE),
)
"""Three modes in one dimension, for which the tests hold tables computed from the closed forms."""


@dataclass(frozen=True)
class Points:
    """A finite set of equally likely images."""

    images: Data

    def posterior(self, x_t: Data, t: Time) -> Tensor:
        """Return the probability of each image given x_t: softmax_i(-||x - x_i||^2 / 2 t^2)."""
        gaps = x_t.flatten(1)[:, None] - self.images.flatten(1)
        return (-gaps.square().sum(-1) / (2 * t[:, None] ** 2)).softmax(-1)

    def denoise(self, x_t: Data, t: Time, label: Label = None) -> Data:
        """Return D(x, t), the posterior mean of the images."""
        return torch.einsum("bn,nchw->bchw", self.posterior(x_t, t), self.images)
