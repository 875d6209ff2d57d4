"""Steps x_t -> x_r of a consistency loss along the PF-ODE: with the data itself or with a teacher."""

from typing import Protocol, Self

import torch
from torch import nn

from consistency.processes import variance_exploding
from consistency.solvers import Solver
from consistency.tensors import Data, Denoise, Label, Time


class Step(Protocol):
    """(x_0, z, x_t, t, r, label) -> x_r."""

    def __call__(
        self, x_0: Data, z: Data, x_t: Data, t: Time, r: Time, label: Label
    ) -> Data: ...


class DataStep:
    """x_r = x_0 + r z, the Euler step with the clean image as its own denoiser [Song et al. 2023, Eq. 9]."""

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, r: Time, label: Label) -> Data:
        return variance_exploding(x_0, z, r)


class TeacherStep(nn.Module):
    """One step of the PF-ODE of a teacher denoiser [Song et al. 2023, Algorithm 2].

    The teacher stays in eval mode and takes no gradient.
    """

    def __init__(self, *, teacher: Denoise, solver: Solver) -> None:
        super().__init__()
        self.teacher, self.solver = teacher, solver
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Keeps the teacher in eval mode, whatever the training loop asks for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x_0: Data, z: Data, x_t: Data, t: Time, r: Time, label: Label) -> Data:
        return self.solver(self.teacher, x_t, t, r, label)
