"""Weightings lambda(t, r) of the loss, functions of the noisier time t and the cleaner time r; and learned ones."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from consistency.networks.edm2 import MPConv, MPFourier
from consistency.networks.layers import sinusoidal_features, zeroed
from consistency.preconditioning import Preconditioning
from consistency.tensors import PerSample, Time


@runtime_checkable
class Weighting(Protocol):
    """lambda(t, r), one weight per sample."""

    def __call__(self, t: Time, r: Time) -> PerSample: ...


def uniform(t: Time, r: Time) -> PerSample:
    """lambda = 1 [Song et al. 2023, arXiv:2303.01469, all published runs]."""
    return torch.ones_like(t)


def snr(t: Time, r: Time) -> PerSample:
    """lambda = 1/t^2, the signal-to-noise ratio of unit data [released code of Song et al. 2023, `snr`]."""
    return t**-2


def snr_plus_one(t: Time, r: Time) -> PerSample:
    """lambda = 1/t^2 + 1 [Salimans and Ho 2022, arXiv:2202.00512, Section 4; released code, `snr+1`]."""
    return t**-2 + 1


def truncated_snr(t: Time, r: Time) -> PerSample:
    """lambda = max(1/t^2, 1) [Salimans and Ho 2022, Section 4; released code, `truncated-snr`]."""
    return (t**-2).clamp_min(1)


def karras(t: Time, r: Time, *, sigma_data: float) -> PerSample:
    """lambda = 1/t^2 + 1/sigma_data^2 [Karras et al. 2022, arXiv:2206.00364, Table 1]."""
    return t**-2 + sigma_data**-2


def inverse_gap(t: Time, r: Time) -> PerSample:
    """lambda = 1 / (t - r) [Song and Dhariwal 2023, arXiv:2310.14189, Table 1]."""
    return 1 / (t - r)


def inverse_root_gap(t: Time, r: Time) -> PerSample:
    """lambda = 1 / sqrt(t - r) [FastGen, `sqrt`]."""
    return (t - r) ** -0.5


def inverse_c_out(t: Time, r: Time, *, sigma_data: float) -> PerSample:
    """lambda = 1 / c_out = sqrt(1/t^2 + 1/sigma_data^2), the root of `karras` [FastGen, `c_out`]."""
    return karras(t, r, sigma_data=sigma_data) ** 0.5


def inverse_level(t: Time, r: Time, *, sigma_data: float) -> PerSample:
    """lambda = 1 / (sigma_data tan(t)), one over the noise level of the angle t of TrigFlow.

    [Lu and Song 2024, arXiv:2410.11081, where the tangent contains it; released code FastGen, where it stands in the
    loss as well].
    """
    return 1 / (sigma_data * t.tan())


class Head(nn.Module):
    """e^-l(t) loss + l(t), with l trained beside the network; a head has `log_variance`, l of the times.

    The best l(t) is ln of the mean loss at t, which gives every time the same weight [Karras et al. 2024,
    arXiv:2312.02696, Eq. 14 to 16; Lu and Song 2024, with w = -l].
    """

    log_variance: Callable[[Time], PerSample]

    def forward(self, loss: PerSample, t: Time) -> PerSample:
        log_variance = self.log_variance(t)
        return (-log_variance).exp() * loss + log_variance


class LearnedWeighting(Head):
    """l a linear function of sinusoidal features of c_noise, which starts at 0. width: number of features."""

    def __init__(self, *, preconditioning: Preconditioning, width: int) -> None:
        super().__init__()
        self.preconditioning, self.width = preconditioning, width
        self.linear = zeroed(nn.Linear(width, 1))

    def features(self, c_noise: Time) -> Float[Tensor, "b width"]:
        """The features of c_noise, those of DDPM++."""
        return sinusoidal_features(c_noise, self.width, reach_lowest=True)

    def log_variance(self, t: Time) -> PerSample:
        """l(t), in the precision of t also where half precision is on."""
        rows = self.features(self.preconditioning(t).c_noise) * self.linear.weight
        return rows.sum(dim=1) + self.linear.bias


class FourierWeighting(Head):
    """l a magnitude-preserving linear function of Fourier features of c_noise, as in EDM2.

    It starts at random, and training normalises its weights with those of the network. width: number of features.
    """

    def __init__(self, *, preconditioning: Preconditioning, width: int) -> None:
        super().__init__()
        self.preconditioning = preconditioning
        self.fourier, self.linear = MPFourier(width), MPConv(width, 1)

    def log_variance(self, t: Time) -> PerSample:
        """l(t), in the precision of t also where half precision is on."""
        return (self.fourier(self.preconditioning(t).c_noise) * self.linear.used()).sum(dim=1)
