"""MeanFlow: average velocities of the rectified flow [Geng et al. 2025, arXiv:2505.13447]."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Generator, Tensor, nn

from consistency.derivatives import Derivative, ExactDerivative
from consistency.distances import Distance
from consistency.errors import require
from consistency.objectives import Losses, Objective
from consistency.pairs import Pairs
from consistency.processes import rectified_flow
from consistency.steps import SelfGuidance, Velocity
from consistency.tensors import (
    NO_CLASS,
    AverageVelocity,
    Data,
    Label,
    PerSample,
    Time,
    broadcast_time,
)


class MeanFlowObjective(Objective):
    """d(u_theta(x_t, t, r), stopgrad(v~ - (t - r) du/dt)), x_t = (1 - t) x_0 + t z [Geng et al. 2025, arXiv:2505.13447, Eq. 9 and 10].

    u is the average velocity from r to t, du/dt its derivative along (v~, 1, 0) in (x_t, t, r); where r = t this is flow
    matching. The online network is told both times.

    guidance: turns the velocity v of the data or of a teacher into v~, with the network itself; None for v~ = v.
    label_dropout: as many samples as uniform draws below it, the first ones of the batch, lose class and guidance.
    """

    needs_target = False

    def __init__(
        self,
        *,
        pairs: Pairs,
        velocity: Velocity,
        derivative: Derivative,
        distance: Distance,
        guidance: SelfGuidance | None = None,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        expected, remedy = "mode.objective.label_dropout from 0 to 1", "0.1 is published"
        require(0 <= label_dropout <= 1, expected, label_dropout, remedy)
        self.pairs, self.velocity, self.derivative = pairs, velocity, derivative
        self.distance, self.guidance, self.label_dropout = distance, guidance, label_dropout
        self.forward_mode = isinstance(derivative, ExactDerivative)

    def require_suited(self, network: nn.Module) -> None:
        """Refuse a network of one time too, and for guidance and label_dropout one without an index for no class."""
        super().require_suited(network)
        classes = self.guidance is not None or self.label_dropout > 0
        require_two_times(network, no_class=classes)

    def draw(self, batch: int, num_scales: int, generator: Generator) -> tuple[Any, ...]:
        t, r = self.pairs(batch, num_scales, generator)
        u = torch.rand(batch, generator=generator, device=generator.device)
        return t, r, self.dropped(u)

    def dropped(self, u: PerSample) -> Bool[Tensor, "b"]:
        """The samples that lose their class, of draws u uniform on [0, 1)."""
        return torch.arange(len(u), device=u.device) < (u < self.label_dropout).sum()

    def losses_at(
        self,
        online: AverageVelocity,
        x_0: Data,
        label: Label,
        t: Time,
        r: Time,
        dropped: Bool[Tensor, "b"],
        z: Data,
    ) -> Losses:
        """The losses for given times, samples that lose their class, and noise."""
        x_t = rectified_flow(x_0, z, t)
        v = self.velocity(x_0, z, x_t, t, label)
        if self.guidance is not None:
            guided = self.guidance(online, x_t, t, v, label)
            v = torch.where(broadcast_time(dropped, v), v, guided)
        if label is not None and self.label_dropout > 0:
            label = torch.where(dropped, NO_CLASS, label)
        u, du = self.derivative(online, x_t, t, r, v, label)
        reference = (v - broadcast_time(t - r, v) * du).detach()
        return Losses(self.distance(u, reference), t, r)


def require_two_times(network: nn.Module, *, no_class: bool) -> None:
    """Refuse a network of one time, and with no_class one without an index for no class."""
    name, told = type(network).__name__, getattr(network, "second_time", None) is not None
    remedy = "say model.network.second_time=gap, end or halvings"
    require(told, "a network of two times", f"{name} with one", remedy)
    remedy = (
        "choose one of NVlabs' kinds or a DiT, or mode.guidance=none mode.objective.label_dropout=0"
    )
    expected = "a network with an index for no class, for guidance and label_dropout"
    require(not no_class or hasattr(network, "no_class"), expected, name, remedy)
