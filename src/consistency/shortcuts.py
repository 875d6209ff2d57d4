"""Objectives of average velocities u(x_t, t, r) whose target is made of shorter jumps: alpha-Flow and shortcut models.

Over a time s between, (t - r) u(t, r) = (t - s) u(t, s) + (s - r) u(s, r). The first part comes from the velocity of the data
(alpha-Flow) or from the network itself (shortcut models). The path is that of `consistency.processes.rectified_flow`.
"""

from contextlib import nullcontext

import torch
from jaxtyping import Bool
from torch import Generator, Tensor, nn

from consistency.average_velocity import require_two_times
from consistency.derivatives import Derivative, ExactDerivative
from consistency.distances import Distance
from consistency.errors import require
from consistency.flow_pairs import HalvedPairs
from consistency.objectives import Losses, Objective
from consistency.pairs import Pairs
from consistency.processes import rectified_flow
from consistency.randomness import DropoutState
from consistency.steps import SelfGuidance, Velocity
from consistency.tensors import (
    NO_CLASS,
    AverageVelocity,
    Data,
    Label,
    Time,
    broadcast_time,
)


class AlphaFlowObjective(Objective):
    """w(alpha) d(u_theta(x_t, t, r), stopgrad y) [Zhang et al. 2025, arXiv:2510.20771; released code].

        y = alpha v~ + (1 - alpha) u(x_t - dt v~, t - dt, r), within -clip and clip,    dt = alpha (t - r),  w = alpha
        y = v~ - (t - r) du/dt  for alpha = 0, MeanFlow                                 w = 1
        y = v~                  for r = t, flow matching                                w = 1

    alpha falls from 1 to 0 in the run: a function of the step, in the place of N(k). At c = 0 of an `Adaptive` distance with
    p = 1 the gradient tends to MeanFlow's as alpha -> 0. At c > 0 the small samples, of size alpha^2, then vanish below c, as
    in the released code.

    guidance: turns the velocity v into v~. label_dropout: share of the samples between its times, or of all without one, that
    lose their class; unlike MeanFlow's they keep a guided target.
    clip: bound of the target; released: 4. shared_dropout: whether the target drops the same units as u; released: no.
    """

    needs_target = False

    def __init__(
        self,
        *,
        pairs: Pairs,
        velocity: Velocity,
        derivative: Derivative,
        distance: Distance,
        clip: float,
        guidance: SelfGuidance | None = None,
        label_dropout: float = 0.0,
        shared_dropout: bool = True,
    ) -> None:
        super().__init__()
        require(clip > 0, "mode.objective.clip > 0", clip, "4 is published")
        self.pairs, self.velocity, self.derivative = pairs, velocity, derivative
        self.distance, self.clip, self.guidance = distance, clip, guidance
        self.label_dropout, self.shared_dropout = label_dropout, shared_dropout
        self.forward_mode = isinstance(derivative, ExactDerivative)

    def require_suited(self, network: nn.Module) -> None:
        """Refuse a network of one time too, and for guidance and label_dropout one without an index for no class."""
        super().require_suited(network)
        classes = self.guidance is not None or self.label_dropout > 0
        require_two_times(network, no_class=classes)

    def draw(
        self, batch: int, num_scales: float, generator: Generator
    ) -> tuple[Time, Time, Bool[Tensor, "b"], float]:
        remedy = "choose a schedule of conf/parts/alpha.yaml"
        require(0 <= num_scales <= 1, "alpha from 0 to 1", num_scales, remedy)
        t, r = self.pairs(batch, 0, generator)
        u = torch.rand(batch, generator=generator, device=generator.device)
        return t, r, u < self.label_dropout, num_scales

    def losses_at(
        self,
        online: AverageVelocity,
        x_0: Data,
        label: Label,
        t: Time,
        r: Time,
        dropped: Bool[Tensor, "b"],
        alpha: float,
        z: Data,
    ) -> Losses:
        """The losses for given times, samples that may lose their class, alpha and noise."""
        x_t = rectified_flow(x_0, z, t)
        if label is not None and self.label_dropout > 0:
            inside = True if self.guidance is None else self.guidance.inside(t)
            label = torch.where(dropped & inside, NO_CLASS, label)
        v = self.velocity(x_0, z, x_t, t, label)
        if self.guidance is not None:
            v = self.guidance(online, x_t, t, v, label)
        dropout = DropoutState(x_0.device)
        u = online(x_t, t, label, r=r)
        with torch.no_grad(), dropout.replayed() if self.shared_dropout else nullcontext():
            y = self.target(online, x_t, t, r, v, label, alpha)
        matched = r == t
        y = torch.where(broadcast_time(matched, v), v, y)
        weight = torch.where(matched, torch.ones_like(t), alpha if alpha > 0 else 1.0)
        return Losses(weight * self.distance(u, y), t, r)

    def target(
        self,
        average: AverageVelocity,
        x_t: Data,
        t: Time,
        r: Time,
        v: Data,
        label: Label,
        alpha: float,
    ) -> Data:
        """y of the pairs with r < t."""
        gap = broadcast_time(t - r, v)
        if alpha == 0:
            return v - gap * self.derivative(average, x_t, t, r, v, label)[1]
        after = average(x_t - alpha * gap * v, t - alpha * (t - r), label, r=r)
        return (alpha * v + (1 - alpha) * after).clamp(-self.clip, self.clip)


class ShortcutObjective(Objective):
    """d(u_theta(x_t, t, r), stopgrad y) with two jumps of half the length as target [Frans et al. 2024, arXiv:2410.12557; released code].

        y = (u-(x_t, t, s) + u-(x_s, s, r)) / 2,  s = (t + r) / 2,  x_s = x_t - (t - s) u-(x_t, t, s)    for long jumps
        y = v, the velocity of the data, for the shortest jumps of `pairs`: flow matching

    u- is the target network, an average of the weights; x_s and y are kept within -clip and clip. The time of the released code
    is 1 - t.

    guidance: w of u_0 + w (u_c - u_0) in the shortest jumps of u- alone; 1 is none. label_dropout: share of the shortest jumps
    that lose their class.
    """

    def __init__(
        self,
        *,
        pairs: HalvedPairs,
        velocity: Velocity,
        distance: Distance,
        clip: float,
        guidance: float = 1.0,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require(clip > 0, "mode.objective.clip > 0", clip, "4 is published")
        self.pairs, self.velocity, self.distance = pairs, velocity, distance
        self.clip, self.guidance, self.label_dropout = clip, guidance, label_dropout

    def require_suited(self, network: nn.Module) -> None:
        """Refuse a network of one time too, and for guidance and label_dropout one without an index for no class."""
        super().require_suited(network)
        require_two_times(network, no_class=self.guidance != 1 or self.label_dropout > 0)

    def draw(
        self, batch: int, num_scales: float, generator: Generator
    ) -> tuple[Time, Time, range, Bool[Tensor, "b"]]:
        t, r = self.pairs(batch, 0, generator)
        u = torch.rand(batch, generator=generator, device=generator.device)
        return t, r, range(self.pairs.long(batch)), u < self.label_dropout

    def losses_at(
        self,
        online: AverageVelocity,
        target: AverageVelocity,
        x_0: Data,
        label: Label,
        t: Time,
        r: Time,
        long: range,
        dropped: Bool[Tensor, "b"],
        z: Data,
    ) -> Losses:
        """The losses for given times, the samples with long jumps, which come first, those that may lose their class, and noise."""
        x_t = rectified_flow(x_0, z, t)
        y = self.velocity(x_0, z, x_t, t, label)
        if n := len(long):
            jumps = self.two_jumps(
                target, x_t[:n], t[:n], r[:n], None if label is None else label[:n]
            )
            y = torch.cat([jumps, y[n:]])
        if label is not None and self.label_dropout > 0:
            label = torch.where(dropped & self.shortest(t, r), NO_CLASS, label)
        return Losses(self.distance(online(x_t, t, label, r=r), y), t, r)

    def shortest(self, t: Time, r: Time) -> Bool[Tensor, "b"]:
        """The jumps of length 1 / steps; the next are twice as long."""
        return t - r < 1.5 / self.pairs.steps

    @torch.no_grad()
    def two_jumps(
        self, average: AverageVelocity, x_t: Data, t: Time, r: Time, label: Label
    ) -> Data:
        """The mean velocity of two jumps, from t over the middle to r."""
        s = (t + r) / 2
        first = self.guided(average, x_t, t, s, label)
        x_s = (x_t - broadcast_time(t - s, x_t) * first).clamp(-self.clip, self.clip)
        second = self.guided(average, x_s, s, r, label)
        return ((first + second) / 2).clamp(-self.clip, self.clip)

    def guided(self, average: AverageVelocity, x_t: Data, t: Time, r: Time, label: Label) -> Data:
        """u-, with guidance where its jump is a shortest one."""
        u = average(x_t, t, label, r=r)
        if self.guidance == 1:
            return u
        remedy = "set data.num_classes, or mode.objective.guidance=1"
        require(label is not None, "labels for guidance", "none", remedy)
        assert label is not None
        without = average(x_t, t, torch.full_like(label, NO_CLASS), r=r)
        mixed = without + self.guidance * (u - without)
        return torch.where(broadcast_time(self.shortest(t, r), u), mixed, u)
