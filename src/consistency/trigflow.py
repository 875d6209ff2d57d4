"""Simplified consistency training and distillation, sCT and sCD [Lu and Song 2024, arXiv:2410.11081].

Under TrigFlow x_t = cos(t) x_0 + sin(t) z, where z has the deviation sigma_data of the data and 0 <= t <= pi/2. With
t = arctan(t_ve / sigma_data) it is cos(t) times the variance-exploding x at t_ve, so the PF-ODE of a denoiser D is

    dx/dt = (cos(t) x_t - D(x_t / cos(t), sigma_data tan(t))) / sin(t),

and a network with f = cos(t) x_t - sin(t) u gives this slope itself: u = sigma_data F(x_t / sigma_data, c_noise), the
output under the scalings `TrigFlowSlope`. The laws of times are those of t_ve.
"""

import math
from contextlib import nullcontext
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Generator

from consistency.distances import Distance
from consistency.objectives import Losses, Objective
from consistency.pairs import Times
from consistency.processes import trigflow
from consistency.randomness import DropoutState
from consistency.steps import Frozen, Velocity
from consistency.tangents import Normalisation, derivative_along
from consistency.tensors import Data, Denoise, Label, Time, broadcast_time
from consistency.weightings import Head, Weighting


class DataVelocity:
    """v = cos(t) z - sin(t) x_0, whose mean given x_t is the slope of the PF-ODE."""

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data:
        return broadcast_time(t.cos(), z) * z - broadcast_time(t.sin(), x_0) * x_0


class TeacherVelocity(Frozen):
    """v = sigma_data F_teacher = (cos(t) x_t - D(x_t / cos(t), sigma_data tan(t))) / sin(t) of a teacher denoiser D.

    D is of the variance-exploding process, as all our teachers. For an EDM network of the same sigma_data F_teacher is
    -F_edm(x_t / sigma_data, ln(sigma_data tan(t)) / 4).
    """

    def __init__(self, *, teacher: Denoise, sigma_data: float, guidance: float = 1.0) -> None:
        super().__init__(teacher=teacher, guidance=guidance)
        self.sigma_data = sigma_data

    @torch.no_grad()
    def forward(self, x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data:
        cos, sin = broadcast_time(t.cos(), x_t), broadcast_time(t.sin(), x_t)
        return (cos * x_t - self.teacher(x_t / cos, self.sigma_data * t.tan(), label)) / sin


@runtime_checkable
class Derivative(Protocol):
    """(slope, x_0, z, x_t, t, v, label) -> cos(t) sin(t) du/dt of u = slope(x_t, t, label) along a path."""

    def __call__(
        self, slope: Denoise, x_0: Data, z: Data, x_t: Data, t: Time, v: Data, label: Label
    ) -> Data: ...


class ForwardDerivative:
    """The derivative along v, by forward mode; cos(t) sin(t) is part of its direction, as in Algorithm 1."""

    def __call__(
        self, slope: Denoise, x_0: Data, z: Data, x_t: Data, t: Time, v: Data, label: Label
    ) -> Data:
        rate = t.cos() * t.sin()
        return derivative_along(slope, x_t, t, broadcast_time(rate, v) * v, label, rate)[1]


class CentralDifference:
    """cos(t) sin(t) (u(t + e) - u(t - e)) / (2 e) along the path of (x_0, z), e = max(share t, 1e-6) [released FastGen].

    In distillation too, whose v is the teacher's: another objective than that of `ForwardDerivative`.
    """

    def __init__(self, *, share: float) -> None:
        self.share = share

    def __call__(
        self, slope: Denoise, x_0: Data, z: Data, x_t: Data, t: Time, v: Data, label: Label
    ) -> Data:
        e, dropout = (self.share * t).clamp_min(1e-6), DropoutState(x_0.device)
        e = torch.minimum(e, 0.99 * (math.pi / 2 - t))  # the network's ln tan ends at pi/2
        after = slope(trigflow(x_0, z, t + e), t + e, label)
        with dropout.replayed():
            before = slope(trigflow(x_0, z, t - e), t - e, label)
        return broadcast_time(t.cos() * t.sin() / (2 * e), x_0) * (after - before)


def tangent(x_t: Data, t: Time, u: Data, v: Data, du: Data, warm_up: float) -> Data:
    """g = -cos^2(t) (u - v) - r (cos(t) sin(t) x_t + du), with du = cos(t) sin(t) du/dt and r = `warm_up`.

    At r = 1 it is cos(t) df/dt, which vanishes for the exact f; at r = 0 the residual of a denoiser.
    """
    cos, sin = broadcast_time(t.cos(), x_t), broadcast_time(t.sin(), x_t)
    return -(cos**2) * (u - v) - warm_up * (cos * sin * x_t + du)


class TrigFlowObjective(Objective):
    """e^-l(t) lambda(t) d(F, stopgrad F + g) + l(t), g the normalised tangent [Lu and Song 2024, Algorithm 1].

    `online` returns the slope u = sigma_data F. r(k) of the tangent comes in the place of N(k). head: l, or None for 0.
    d is the mean square; with weights of the run's own, the gradient is that of the continuous consistency loss.
    shared_dropout: False lets the derivative drop other units than F, as the released code does.
    """

    needs_target: ClassVar[bool] = False
    head: Head | None

    def __init__(
        self,
        *,
        sigma_data: float,
        times: Times,
        velocity: Velocity,
        derivative: Derivative,
        normalisation: Normalisation,
        distance: Distance,
        weighting: Weighting,
        head: Head | None,
        shared_dropout: bool = True,
    ) -> None:
        super().__init__()
        self.sigma_data, self.times, self.velocity = sigma_data, times, velocity
        self.derivative, self.normalisation = derivative, normalisation
        self.forward_mode = isinstance(derivative, ForwardDerivative)
        self.distance, self.weighting, self.head = distance, weighting, head
        self.shared_dropout = shared_dropout

    def draw(self, batch: int, num_scales: float, generator: Generator) -> tuple[Any, ...]:
        return torch.atan(self.times(batch, generator) / self.sigma_data), float(num_scales)

    def losses_at(
        self, online: Denoise, x_0: Data, label: Label, t: Time, warm_up: float, z: Data
    ) -> Losses:
        """The losses for given times, r(k) and unit noise."""
        z = self.sigma_data * z
        x_t = trigflow(x_0, z, t)
        v = self.velocity(x_0, z, x_t, t, label)
        dropout = DropoutState(x_0.device)
        u = online(x_t, t, label)
        units = dropout.replayed() if self.shared_dropout else nullcontext()
        # Half precision has too few digits for the derivative, by differences too.
        with torch.no_grad(), units, torch.autocast(x_0.device.type, enabled=False):
            du = self.derivative(online, x_0, z, x_t, t, v, label)
            g = self.normalisation(tangent(x_t, t, u, v, du, warm_up))
        F = u / self.sigma_data
        losses = self.weighting(t, t) * self.distance(F, F.detach() + g)
        return Losses(losses if self.head is None else self.head(losses, t), t, t)
