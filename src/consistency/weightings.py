"""Weightings lambda(t, r) of the loss, functions of the noisier time t and the cleaner time r."""

from typing import Protocol

import torch

from consistency.tensors import PerSample, Time


class Weighting(Protocol):
    """lambda(t, r), one weight per sample."""

    def __call__(self, t: Time, r: Time) -> PerSample: ...


def uniform(t: Time, r: Time) -> PerSample:
    """lambda = 1 [Song et al. 2023, arXiv:2303.01469, all published runs]."""
    return torch.ones_like(t)


def inverse_gap(t: Time, r: Time) -> PerSample:
    """lambda = 1 / (t - r) [Song and Dhariwal 2023, arXiv:2310.14189, Table 1]."""
    return 1 / (t - r)


def karras(t: Time, r: Time, *, sigma_data: float) -> PerSample:
    """lambda = 1/t^2 + 1/sigma_data^2 [Karras et al. 2022, arXiv:2206.00364, Table 1]."""
    return t**-2 + sigma_data**-2
