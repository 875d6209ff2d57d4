"""Objectives: the loss of one batch, per sample, as its formula.

An objective draws times and noise from the generator given, so that it is a function of its arguments.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Generator, nn

from consistency.distances import Distance
from consistency.pairs import Pairs, Times
from consistency.processes import variance_exploding
from consistency.randomness import DropoutState, replayed_dropout
from consistency.steps import Step
from consistency.tensors import Data, Denoise, Label, PerSample, Time, broadcast_time
from consistency.weightings import Weighting


class Losses(NamedTuple):
    """Weighted loss of each sample, and its noisier and cleaner time."""

    loss: PerSample
    t: Time
    r: Time


class Objective(Protocol):
    """(online, target, x_0, label, N(k), generator) -> losses of the batch."""

    def __call__(
        self,
        online: Denoise,
        target: Denoise,
        x_0: Data,
        label: Label,
        num_scales: int,
        generator: Generator,
    ) -> Losses: ...


class ConsistencyObjective(nn.Module):
    """lambda(t, r) d(f_theta(x_t, t), stopgrad f_theta-(x_r, r)) [Song et al. 2023, arXiv:2303.01469, Eq. 7 and 10].

    Where r = 0 the target is the clean image, the limit of the boundary condition [Geng et al. 2024,
    arXiv:2406.14548]. Both passes drop the same units.
    """

    def __init__(
        self, *, pairs: Pairs, step: Step, distance: Distance, weighting: Weighting
    ) -> None:
        super().__init__()
        self.pairs, self.step, self.distance = pairs, step, distance
        self.weighting = weighting

    def forward(
        self,
        online: Denoise,
        target: Denoise,
        x_0: Data,
        label: Label,
        num_scales: int,
        generator: Generator,
    ) -> Losses:
        t, r = self.pairs(len(x_0), num_scales, generator)
        z = torch.randn(x_0.shape, generator=generator, device=generator.device)
        x_t = variance_exploding(x_0, z, t)
        x_r = self.step(x_0, z, x_t, t, r, label)
        dropout = DropoutState.snapshot(x_0.device)
        estimate = online(x_t, t, label)
        with torch.no_grad(), replayed_dropout(dropout):
            # The network has no value at time 0: those samples are evaluated at t and replaced.
            clean = r == 0
            reference = target(x_r, torch.where(clean, t, r), label)
            reference = torch.where(broadcast_time(clean, x_0), x_0, reference)
        return Losses(self.weighting(t, r) * self.distance(estimate, reference), t, r)


class DenoisingObjective(nn.Module):
    """lambda(t) d(D_theta(x_0 + t z, t), x_0) [Karras et al. 2022, arXiv:2206.00364, Eq. 2]."""

    def __init__(self, *, times: Times, distance: Distance, weighting: Weighting) -> None:
        super().__init__()
        self.times, self.distance, self.weighting = times, distance, weighting

    def forward(
        self,
        online: Denoise,
        target: Denoise,
        x_0: Data,
        label: Label,
        num_scales: int,
        generator: Generator,
    ) -> Losses:
        t = self.times(len(x_0), generator)
        z = torch.randn(x_0.shape, generator=generator, device=generator.device)
        estimate = online(variance_exploding(x_0, z, t), t, label)
        r = torch.zeros_like(t)
        return Losses(self.weighting(t, r) * self.distance(estimate, x_0), t, r)
