"""Derivatives of an average velocity u(x_t, t, r) along its trajectory: du/dt = (d/dt + v d/dx) u with r fixed.

Each part returns u, with its gradient, and du/dt; all its passes drop the same units.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from consistency.errors import require
from consistency.randomness import DropoutState
from consistency.tangents import derivative_along
from consistency.tensors import AverageVelocity, Data, Label, Time, broadcast_time


@runtime_checkable
class Derivative(Protocol):
    """(u, x_t, t, r, v, label) -> u(x_t, t, r) and du/dt along (v, 1, 0) in (x_t, t, r)."""

    def __call__(
        self, average: AverageVelocity, x_t: Data, t: Time, r: Time, v: Data, label: Label
    ) -> tuple[Data, Data]: ...


class ExactDerivative:
    """Value and forward-mode derivative of one pass [Geng et al. 2025, arXiv:2505.13447, Algorithm 1]."""

    def __call__(
        self, average: AverageVelocity, x_t: Data, t: Time, r: Time, v: Data, label: Label
    ) -> tuple[Data, Data]:
        return derivative_along(partial(average, r=r), x_t, t, v, label)


@dataclass(frozen=True, kw_only=True)
class FiniteDifference:
    """(u(x_t + e v, t + e, r) - u(x_t - e v, t - e, r)) / (2 e) [released code of FastGen].

    One-sided where t + e is above t_max or t - e reaches r. e = 1e-4 as released: in float32 du/dt is then off by 4e-4.
    """

    e: float
    t_max: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.e < self.t_max, "0 < e < t_max", self.e, "1e-4 is published")

    def ends(self, t: Time, r: Time) -> tuple[Time, Time]:
        """The times between which the difference is taken, never the same."""
        after = torch.where(t + self.e > self.t_max, t, t + self.e)
        below = (t - self.e <= r) & (after > t)
        return after, torch.where(below, t, t - self.e)

    def __call__(
        self, average: AverageVelocity, x_t: Data, t: Time, r: Time, v: Data, label: Label
    ) -> tuple[Data, Data]:
        dropout = DropoutState(x_t.device)
        u = average(x_t, t, label, r=r)

        def moved(time: Time) -> Data:
            # Half precision has too few digits for a difference.
            single = torch.autocast(x_t.device.type, enabled=False)
            with torch.no_grad(), dropout.replayed(), single:
                return average(x_t + broadcast_time(time - t, x_t) * v, time, label, r=r)

        after, before = self.ends(t, r)
        return u, (moved(after) - moved(before)) / broadcast_time(after - before, x_t)
