"""Steps x_t -> x_r of a consistency loss along the PF-ODE, and its velocity: with the data itself or with a teacher."""

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from consistency.processes import variance_exploding
from consistency.solvers import Solver, pf_ode
from consistency.tensors import Data, Denoise, Label, Time


@runtime_checkable
class Step(Protocol):
    """(x_0, z, x_t, t, r, label) -> x_r."""

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, r: Time, label: Label) -> Data: ...


@runtime_checkable
class Velocity(Protocol):
    """(x_0, z, x_t, t, label) -> dx/dt at (x_t, t)."""

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data: ...


class DataStep:
    """x_r = x_0 + r z, the Euler step with the clean image as its own denoiser [Song et al. 2023, Eq. 9]."""

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, r: Time, label: Label) -> Data:
        return variance_exploding(x_0, z, r)


class DataVelocity:
    """dx/dt = z, whose mean given x_t is the PF-ODE's [Song et al. 2023, Lemma 1]."""

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data:
        return z


class Frozen(nn.Module):
    """A teacher denoiser that stays in eval mode and without gradient."""

    def __init__(self, *, teacher: Denoise) -> None:
        super().__init__()
        self.teacher = teacher
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


class TeacherStep(Frozen):
    """One step of the PF-ODE of a teacher denoiser [Song et al. 2023, Algorithm 2]."""

    def __init__(self, *, teacher: Denoise, solver: Solver) -> None:
        super().__init__(teacher=teacher)
        self.solver = solver

    @torch.no_grad()
    def forward(self, x_0: Data, z: Data, x_t: Data, t: Time, r: Time, label: Label) -> Data:
        return self.solver(self.teacher, x_t, t, r, label)


class TeacherVelocity(Frozen):
    """dx/dt = (x - D(x, t)) / t of a teacher denoiser D [Song et al. 2023, Appendix B]."""

    @torch.no_grad()
    def forward(self, x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data:
        return pf_ode(self.teacher, x_t, t, label)
