"""Preconditioning: D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise).

The network F sees inputs of unit variance and, for the denoiser, targets of unit variance [Karras et al. 2022,
arXiv:2206.00364, Table 1]. A consistency function uses the same form with scalings that make it the identity at t_min
[Song et al. 2023, arXiv:2303.01469, Eq. 5 and Appendix C].
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from consistency.errors import require
from consistency.tensors import Time


class Scalings(NamedTuple):
    """The four coefficients at the times t, each of shape (batch,)."""

    c_skip: Time
    c_out: Time
    c_in: Time
    c_noise: Time


@runtime_checkable
class Preconditioning(Protocol):
    """The time t of each sample -> its four scalings."""

    def __call__(self, t: Time) -> Scalings: ...


class _Positive:
    """Scalings whose constants are finite and above 0."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None:
                continue
            require(value > 0 and math.isfinite(value), f"a finite {name} > 0", value, "set it so")


@dataclass(frozen=True, kw_only=True)
class EDM(_Positive):
    """Scalings of a denoiser [Karras et al. 2022, Table 1, column "Ours"].

    sigma_data: standard deviation of the data; c_noise_scale: c_noise = c_noise_scale ln t, 0.25 for networks of the
    EDM and JAX kind, 250 for those of the OpenAI kind.
    """

    sigma_data: float
    c_noise_scale: float

    def __call__(self, t: Time) -> Scalings:
        variance = t**2 + self.sigma_data**2
        return Scalings(
            c_skip=self.sigma_data**2 / variance,
            c_out=t * self.sigma_data / variance.sqrt(),
            c_in=variance.rsqrt(),
            c_noise=self.c_noise_scale * t.log(),
        )


@dataclass(frozen=True, kw_only=True)
class Boundary(_Positive):
    """Scalings of a consistency function: c_skip(t_min) = 1 and c_out(t_min) = 0 [Song et al. 2023, Appendix C].

    sigma_data and c_noise_scale as for `EDM`; t_min: the time at which f is the identity.
    """

    sigma_data: float
    t_min: float
    c_noise_scale: float

    def __call__(self, t: Time) -> Scalings:
        gap = t - self.t_min
        variance = t**2 + self.sigma_data**2
        return Scalings(
            c_skip=self.sigma_data**2 / (gap**2 + self.sigma_data**2),
            c_out=gap * self.sigma_data / variance.sqrt(),
            c_in=variance.rsqrt(),
            c_noise=self.c_noise_scale * t.log(),
        )


@dataclass(frozen=True, kw_only=True)
class TrigFlow(_Positive):
    """Scalings of f = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t), the identity at t = 0.

    [Lu and Song 2024, arXiv:2410.11081, Eq. 4 and 5], for the process `consistency.processes.trigflow`. The network
    is told t itself: the derivative of ln tan(t) has no bound at the noisy end.
    """

    sigma_data: float

    def __call__(self, t: Time) -> Scalings:
        return Scalings(
            c_skip=t.cos(),
            c_out=-self.sigma_data * t.sin(),
            c_in=torch.full_like(t, 1 / self.sigma_data),
            c_noise=t,
        )


@dataclass(frozen=True, kw_only=True)
class TrigFlowSlope(_Positive):
    """Scalings under which the output is the slope u = sigma_data F(x_t / sigma_data, c_noise) of `consistency.trigflow`.

    c_noise_scale: None for a network F that is told t, as for `TrigFlow`. A number for an EDM network of that scale, for
    which F = -F_edm and c_noise = c_noise_scale ln(sigma_data tan(t)); its consistency function on the variance-exploding
    path has the scalings of `EDM`, or of `Boundary` with t_min = 0.
    """

    sigma_data: float
    c_noise_scale: float | None

    def __call__(self, t: Time) -> Scalings:
        sign, c_noise = 1, t
        if self.c_noise_scale is not None:
            sign, c_noise = -1, self.c_noise_scale * (self.sigma_data * t.tan()).log()
        return Scalings(
            c_skip=torch.zeros_like(t),
            c_out=torch.full_like(t, sign * self.sigma_data),
            c_in=torch.full_like(t, 1 / self.sigma_data),
            c_noise=c_noise,
        )


@dataclass(frozen=True)
class Unscaled:
    """The network's own output at the time itself: the velocity u of `consistency.processes.rectified_flow`."""

    def __call__(self, t: Time) -> Scalings:
        nothing, one = torch.zeros_like(t), torch.ones_like(t)
        return Scalings(c_skip=nothing, c_out=one, c_in=one, c_noise=t)


@dataclass(frozen=True)
class RectifiedFlow:
    """Scalings of x_0 = x_t - t u(x_t, t), with the velocity u a network's own output.

    For an average velocity u(x_t, t, 0) it is the jump from t to 0 [Geng et al. 2025, arXiv:2505.13447, Eq. 12].
    """

    def __call__(self, t: Time) -> Scalings:
        one = torch.ones_like(t)
        return Scalings(c_skip=one, c_out=-t, c_in=one, c_noise=t)
