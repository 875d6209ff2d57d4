"""Steps x_t -> x_r of a consistency loss along the PF-ODE, and its velocity: with the data itself or with a teacher."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from consistency.errors import require
from consistency.processes import variance_exploding
from consistency.randomness import DropoutState
from consistency.solvers import Solver, pf_ode
from consistency.tensors import (
    NO_CLASS,
    AverageVelocity,
    Data,
    Denoise,
    Label,
    Time,
    broadcast_time,
)


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


def log_posterior(x_t: Data, t: Time, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "b n"]:
    """-||x_t - x_i||^2 / (2 t^2) of the images x_i: the log of their posterior weights, but for a constant."""
    gaps = (x_t.flatten(1)[:, None] - images.flatten(1)).square().sum(dim=2)
    return -gaps / (2 * t[:, None] ** 2)


class BatchStep:
    """The Euler step with the posterior mean of the batch's images as denoiser, whose variance is below that of `DataStep`.

    D(x_t, t) = sum_i W_i x_i with W the softmax of `log_posterior` over the images of the same class, the own one among
    them [stable consistency tuning, arXiv:2410.18958].
    """

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, r: Time, label: Label) -> Data:
        logits = log_posterior(x_t, t, x_0)
        if label is not None:
            logits = logits.masked_fill(label[:, None] != label, -torch.inf)
        mean = (logits.softmax(dim=1) @ x_0.flatten(1)).reshape(x_0.shape)
        return x_t + broadcast_time((r - t) / t, x_t) * (x_t - mean)


class DataVelocity:
    """dx/dt = z, whose mean given x_t is the PF-ODE's [Song et al. 2023, Lemma 1]."""

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data:
        return z


class FlowVelocity:
    """dx/dt = z - x_0 of the rectified flow, whose mean given x_t is the ODE's [Liu et al. 2022, arXiv:2209.03003]."""

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data:
        return z - x_0


@dataclass(frozen=True, kw_only=True)
class SelfGuidance:
    """v~ = w v + (1 - w - k) u_0 + k u_c where t_start <= t <= t_end, else v: guidance by the network itself.

    u_0 and u_c are its velocities u(x_t, t, t) without a class and with it. It trains a network that is sampled without
    guidance, at the scale w / (1 - k). All passes drop the units that the loss drops; w = 1 and k = 0 is none [Geng et al. 2025, arXiv:2505.13447, guidance; released JAX code].
    """

    w: float
    k: float = 0.0
    t_start: float = 0.0
    t_end: float = 1.0

    @torch.no_grad()
    def __call__(self, average: AverageVelocity, x_t: Data, t: Time, v: Data, label: Label) -> Data:
        remedy = "set data.num_classes, or mode.guidance=none"
        require(label is not None, "labels for the guidance of a network by itself", "none", remedy)
        assert label is not None
        mixed, dropout = self.w * v, DropoutState(x_t.device)
        for share, known in (
            (1 - self.w - self.k, torch.full_like(label, NO_CLASS)),
            (self.k, label),
        ):
            if share != 0:
                with dropout.replayed():
                    mixed = mixed + share * average(x_t, t, known, r=t)
        return torch.where(broadcast_time(self.inside(t), v), mixed, v)

    def inside(self, t: Time) -> Bool[Tensor, "b"]:
        """The samples that are guided."""
        return (t >= self.t_start) & (t <= self.t_end)


class Guided(nn.Module):
    """D_0 + w (D_c - D_0) of a denoiser with a class and without [Ho and Salimans 2022, arXiv:2207.12598, Eq. 6]."""

    def __init__(self, denoise: Denoise, w: float) -> None:
        super().__init__()
        self.denoise, self.w = denoise, w
        network: Any = getattr(denoise, "network", None)
        known = hasattr(network, "no_class") and network.num_classes is not None
        remedy = "choose a teacher of NVlabs' networks with classes, or guidance=1"
        require(known, "a teacher of classes and of none, for guidance", "another", remedy)
        self.no_class: int = network.no_class

    def forward(self, x_t: Data, t: Time, label: Label = None) -> Data:
        remedy = "set data.num_classes"
        require(label is not None, "labels for a teacher with guidance", "none", remedy)
        assert label is not None
        without = self.denoise(x_t, t, torch.full_like(label, self.no_class))
        return without + self.w * (self.denoise(x_t, t, label) - without)


class Frozen(nn.Module):
    """A teacher denoiser that stays in eval mode and without gradient; `guidance` is w of `Guided`, 1 for none."""

    def __init__(self, *, teacher: Denoise, guidance: float = 1.0) -> None:
        super().__init__()
        self.teacher = teacher if guidance == 1 else Guided(teacher, guidance)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


class TeacherStep(Frozen):
    """One step of the PF-ODE of a teacher denoiser [Song et al. 2023, Algorithm 2]."""

    def __init__(self, *, teacher: Denoise, solver: Solver, guidance: float = 1.0) -> None:
        super().__init__(teacher=teacher, guidance=guidance)
        self.solver = solver

    @torch.no_grad()
    def forward(self, x_0: Data, z: Data, x_t: Data, t: Time, r: Time, label: Label) -> Data:
        return self.solver(self.teacher, x_t, t, r, label)


class TeacherVelocity(Frozen):
    """dx/dt = (x - D(x, t)) / t of a teacher denoiser D [Song et al. 2023, Appendix B]."""

    @torch.no_grad()
    def forward(self, x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data:
        return pf_ode(self.teacher, x_t, t, label)
