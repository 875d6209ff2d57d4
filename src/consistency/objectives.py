"""Objectives: the loss of one batch, per sample, as its formula.

An objective draws times and noise from a generator, so that it is a function of its arguments. x_0 is `share` of the
optimizer step's batch: times and noise are drawn for all of it, and the rows of the share are kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor, nn

from consistency.distances import Distance
from consistency.errors import require
from consistency.grids import KarrasGrid
from consistency.networks.layers import recomputes
from consistency.pairs import Pairs, RatioPairs, Times, require_scales
from consistency.processes import variance_exploding
from consistency.randomness import WHOLE, DropoutState, Share
from consistency.solvers import euler_step
from consistency.steps import Step, Velocity
from consistency.tangents import TangentLength, TangentMetric, derivative_along
from consistency.tensors import (
    Data,
    Denoise,
    Label,
    PerSample,
    Time,
    broadcast_time,
)
from consistency.weightings import Head, Weighting


class Losses(NamedTuple):
    """Weighted loss of each sample, and its noisier and cleaner time."""

    loss: PerSample
    t: Time
    r: Time


class Objective(nn.Module):
    """(online, target, x_0, label, N(k), generator, share) -> losses of the batch.

    Draws times and unit normal noise z; the losses for them are `losses_at`.
    """

    losses_at: Callable[..., Losses]
    times: Times
    needs_target: ClassVar[bool] = True
    head: nn.Module | None
    """A part that is trained and saved with the network, such as a learned weighting; None for no such part."""
    forward_mode: bool
    """Whether the loss takes a forward-mode derivative of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.forward_mode = None, False

    def require_suited(self, network: nn.Module) -> None:
        """Refuse a network that the loss cannot call: for a forward-mode derivative one that computes activations again."""
        expected = "a network that keeps its activations, for a loss with a forward-mode derivative"
        got = "model.network.checkpoint_activations=true"
        remedy = "set it to false, or say a mode.derivative by differences, if the mode has one"
        require(not (self.forward_mode and recomputes(network)), expected, got, remedy)

    def draw(self, batch: int, num_scales: Any, generator: Generator) -> tuple[Any, ...]:
        """Return the arguments of `losses_at` between label and noise: times alone, unless a method draws more.

        Of a tensor or `range` with an element for each sample, `losses_at` gets the elements of its samples.
        """
        return (self.times(batch, generator),)

    def forward(
        self,
        online: Denoise,
        target: Denoise,
        x_0: Data,
        label: Label,
        num_scales: float,
        generator: Generator,
        share: Share = WHOLE,
    ) -> Losses:
        batch, rows = share.parts * len(x_0), share.rows(len(x_0))
        drawn = self.draw(batch, num_scales, generator)
        drawn = tuple(part[rows] if isinstance(part, Tensor | range) else part for part in drawn)
        shape, device = (batch, *x_0.shape[1:]), generator.device
        z = torch.randn(shape, generator=generator, device=device)[rows]
        networks = (online, target) if self.needs_target else (online,)
        return self.losses_at(*networks, x_0, label, *drawn, z)


class ConsistencyObjective(Objective):
    """lambda(t, r) d(f_theta(x_t, t), stopgrad f_theta-(x_r, r)) [Song et al. 2023, arXiv:2303.01469, Eq. 7 and 10].

    Where r = 0 the target is the clean image, the limit of the boundary condition [Geng et al. 2024,
    arXiv:2406.14548]. Both passes drop the same units. stop_gradient: False lets the gradient pass through the target
    as well, an option of the released CIFAR-10 code that no published model used.
    """

    def __init__(
        self,
        *,
        pairs: Pairs,
        step: Step,
        distance: Distance,
        weighting: Weighting,
        stop_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.pairs, self.step, self.distance = pairs, step, distance
        self.weighting, self.stop_gradient = weighting, stop_gradient

    def draw(self, batch: int, num_scales: int, generator: Generator) -> tuple[Any, ...]:
        return self.pairs(batch, num_scales, generator)

    def losses_at(
        self, online: Denoise, target: Denoise, x_0: Data, label: Label, t: Time, r: Time, z: Data
    ) -> Losses:
        """The losses for given times and noise."""
        x_t = variance_exploding(x_0, z, t)
        x_r = self.step(x_0, z, x_t, t, r, label)
        dropout = DropoutState(x_0.device)
        estimate = online(x_t, t, label)
        with torch.set_grad_enabled(not self.stop_gradient), dropout.replayed():
            # The network has no value at time 0: those samples are evaluated at t and replaced.
            clean = r == 0
            reference = target(x_r, torch.where(clean, t, r), label)
            reference = torch.where(broadcast_time(clean, x_0), x_0, reference)
        return Losses(self.weighting(t, r) * self.distance(estimate, reference), t, r)


class TruncatedObjective(Objective):
    """The consistency loss at t >= t' = t_split, whose target below t' is a frozen first stage.

        mean of lambda d over the others + boundary_weight mean of lambda d over the samples at t'

    [Lee et al. 2024, arXiv:2410.14895, second stage]. int(B boundary_share) samples of an optimizer step's batch of B,
    drawn at random, are those at t'; their targets come from the first stage, which keeps the solution from collapsing. A
    batch without one has the plain mean. The first stage stays in train mode and drops the same units, as published.
    """

    def __init__(
        self,
        *,
        first_stage: nn.Module,
        t_split: float,
        boundary_share: float,
        boundary_weight: float,
        pairs: RatioPairs,
        step: Step,
        distance: Distance,
        weighting: Weighting,
    ) -> None:
        super().__init__()
        holds = 0 <= boundary_share <= 1 and boundary_weight >= 0
        expected = "mode.objective.boundary_share from 0 to 1 and boundary_weight >= 0"
        got = f"{boundary_share} and {boundary_weight}"
        require(holds, expected, got, "the published values are 0.25 and 0.1")
        self.first_stage = first_stage.requires_grad_(False).train()
        self.t_split, self.pairs = t_split, pairs
        self.boundary_share, self.boundary_weight = boundary_share, boundary_weight
        self.consistency = ConsistencyObjective(
            pairs=pairs, step=step, distance=distance, weighting=weighting
        )

    def draw(self, batch: int, num_scales: int, generator: Generator) -> tuple[Any, ...]:
        t, r = self.pairs(batch, num_scales, generator)
        order = torch.randperm(batch, generator=generator, device=generator.device)
        boundary = order < int(batch * self.boundary_share)
        t_split, r_split = self.pairs.at(torch.full_like(t, self.t_split), num_scales)
        t, r = torch.where(boundary, t_split, t), torch.where(boundary, r_split, r)
        return t, r, self.weights(boundary, t)

    def weights(self, boundary: Bool[Tensor, "b"], t: Time) -> PerSample:
        """The weight of each sample of a whole batch, given which are at t': the batch mean is the loss above."""
        share = boundary.to(t.dtype).mean()
        return torch.where(boundary, self.boundary_weight / share, 1 / (1 - share))

    def losses_at(
        self,
        online: Denoise,
        target: Denoise,
        x_0: Data,
        label: Label,
        t: Time,
        r: Time,
        weight: PerSample,
        z: Data,
    ) -> Losses:
        """The losses for given times, weights of the samples and noise."""
        split = partial(self.split, target)
        losses = self.consistency.losses_at(online, split, x_0, label, t, r, z)
        return losses._replace(loss=weight * losses.loss)

    def split(self, target: Denoise, x_r: Data, r: Time, label: Label = None) -> Data:
        """The target where r >= t', the first stage below."""
        dropout = DropoutState(x_r.device)
        below = self.first_stage(x_r, r, label)
        with dropout.replayed():
            above = target(x_r, r, label)
        return torch.where(broadcast_time(r < self.t_split, x_r), below, above)


class ContinuousObjective(Objective):
    """The limit r -> t of the consistency loss [Song et al. 2023, arXiv:2303.01469, Appendix B].

    With g = d/dt f(x_t, t) along the velocity of the PF-ODE, by a forward-mode derivative:

        stop_gradient = False     lambda(t) |g_theta|, measured by `tangent` [Theorem 3, Remark 10]
        stop_gradient = True      lambda(t) <f_theta, H stopgrad g_theta->, H the metric tensor of `tangent`; only its
                                  gradient means something, its value may be negative [Theorems 5 and 6]

    Signs and the length of each `tangent` are those of the released CIFAR-10 code, which weighs uniformly.
    """

    def __init__(
        self,
        *,
        times: Times,
        velocity: Velocity,
        tangent: TangentLength,
        weighting: Weighting,
        stop_gradient: bool,
    ) -> None:
        super().__init__()
        holds = not stop_gradient or isinstance(tangent, TangentMetric)
        expected = "for stop_gradient=true a metric tensor: L2Tangent or HessianTangent"
        remedy = "set mode.objective.stop_gradient=false, or mode.tangent=l2 or hessian"
        require(holds, expected, type(tangent).__name__, remedy)
        self.times, self.velocity, self.tangent = times, velocity, tangent
        self.weighting, self.stop_gradient = weighting, stop_gradient
        self.forward_mode = True

    def losses_at(
        self, online: Denoise, target: Denoise, x_0: Data, label: Label, t: Time, z: Data
    ) -> Losses:
        """The losses for given times and noise."""
        x_t = variance_exploding(x_0, z, t)
        v = self.velocity(x_0, z, x_t, t, label)
        weight = self.weighting(t, t)
        if not self.stop_gradient:
            f, g = derivative_along(online, x_t, t, v, label)
            return Losses(weight * self.tangent.length(f, g), t, t)
        assert isinstance(self.tangent, TangentMetric)
        dropout = DropoutState(x_0.device)
        estimate = online(x_t, t, label)
        with torch.no_grad(), dropout.replayed():
            f, g = derivative_along(target, x_t, t, v, label)
        product = estimate * self.tangent.lowered(f.detach(), g.detach())
        return Losses(weight * product.sum(dim=(1, 2, 3)), t, t)


class ProgressiveObjective(Objective):
    """lambda(t) d(D_theta(x_t, t), x^): one Euler step of the student lands where two of the teacher do.

    x^ = x_t - t (x_r - x_t) / (r - t), where the teacher's steps lead from x_t at t = t_i over t_{i+1/2} to x_r at
    r = t_{i+1} on the grid of N(k) steps, N(k) + 1 points. The teacher is `target`, the student of the stage before
    [Salimans and Ho 2022, arXiv:2202.00512, Algorithm 2, as in the released code of Song et al. 2023].
    """

    def __init__(self, *, grid: KarrasGrid, distance: Distance, weighting: Weighting) -> None:
        super().__init__()
        self.grid, self.distance, self.weighting = grid, distance, weighting

    def draw(self, batch: int, num_scales: int, generator: Generator) -> tuple[Any, ...]:
        require_scales(num_scales, 1)
        device = generator.device
        i = torch.randint(num_scales, (batch,), generator=generator, device=device)
        return i, num_scales

    def losses_at(
        self,
        online: Denoise,
        target: Denoise,
        x_0: Data,
        label: Label,
        i: Int[Tensor, "b"],
        num_scales: int,
        z: Data,
    ) -> Losses:
        """The losses for given indices of steps and noise."""
        t, middle, r = (self.grid.at(i + part, num_scales + 1).float() for part in (0, 0.5, 1))
        x_t = variance_exploding(x_0, z, t)
        with torch.no_grad():
            x_middle = euler_step(target, x_t, t, middle, label)
            x_r = euler_step(target, x_middle, middle, r, label)
            slope = (x_r - x_t) / broadcast_time(r - t, x_0)
            reference = x_t - broadcast_time(t, x_0) * slope
        estimate = online(x_t, t, label)
        return Losses(self.weighting(t, r) * self.distance(estimate, reference), t, r)


class DenoisingObjective(Objective):
    """e^-l(t) lambda(t) d(D_theta(x_0 + t z, t), x_0) + l(t) [Karras et al. 2022, arXiv:2206.00364, Eq. 2].

    head: l, a learned weighting [Karras et al. 2024, arXiv:2312.02696, Eq. 14], or None for 0.
    """

    needs_target = False
    head: Head | None

    def __init__(
        self,
        *,
        times: Times,
        distance: Distance,
        weighting: Weighting,
        head: Head | None = None,
    ) -> None:
        super().__init__()
        self.times, self.distance, self.weighting = times, distance, weighting
        self.head = head

    def losses_at(self, online: Denoise, x_0: Data, label: Label, t: Time, z: Data) -> Losses:
        """The losses for given times and noise."""
        estimate = online(variance_exploding(x_0, z, t), t, label)
        r = torch.zeros_like(t)
        losses = self.weighting(t, r) * self.distance(estimate, x_0)
        return Losses(losses if self.head is None else self.head(losses, t), t, r)
