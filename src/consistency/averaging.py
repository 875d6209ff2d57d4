"""Averages of weights: exponential for the target network and for samples, power functions for the choice of a width.

A power-function average of relative width sigma_rel weighs step i of k by i^gamma [Karras et al. 2024, arXiv:2312.02696,
Section 3]. Averages of other widths follow from stored ones after the training (Algorithm 3).
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float64
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

WIDEST = 12**-0.5
"""sigma_rel of the plain mean of all steps, gamma = 0."""


def frozen_copy(module: ModuleT) -> ModuleT:
    """A copy whose parameters take no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


def averaging(
    average: nn.Module, online: nn.Module | Sequence[Tensor], *, in_double: bool = False
) -> Callable[[float], None]:
    """Return the update of `update_average` as a function of the decay; to list the parameters takes longer than to average.

    in_double: the mean is computed in float64 and then rounded, as in the released code of MeanFlow.
    """
    averages: list[Tensor] = list(average.parameters())
    weights = list(online.parameters() if isinstance(online, nn.Module) else online)

    @torch.no_grad()
    def update(decay: float) -> None:
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def update_in_double(decay: float) -> None:
        for mean, weight in zip(averages, weights, strict=True):
            mean.copy_(decay * mean.double() + (1 - decay) * weight.double())

    return update_in_double if in_double else update


def update_average(average: nn.Module, online: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) online, over all parameters, in place; decay in [0, 1].

    [Song et al. 2023, arXiv:2303.01469, Algorithms 2 and 3, for the target network]. Buffers are constants of our
    networks and stay as they are.
    """
    averaging(average, online)(decay)


def power_exponent(width: float) -> float:
    """Return gamma of a relative width, sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) [Algorithm 2].

    It is the largest root of a cubic; Newton's method falls to it from 1 / sigma_rel. width: in (0, `WIDEST`].
    """
    a, gamma, before = width**-2, 1 / width, math.inf
    while gamma < before:
        cubic = ((gamma + 7) * gamma + 16 - a) * gamma + 12 - a
        before, gamma = gamma, gamma - cubic / ((3 * gamma + 14) * gamma + 16 - a)
    return before


def relative_width(gamma: float) -> float:
    """Return sigma_rel of an exponent, the inverse of `power_exponent`."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def power_decay(k: int, width: float) -> float:
    """Return the decay of step k = 1, 2, ... [equation 127]: (1 - 1/k)^(gamma + 1)."""
    return (1 - 1 / k) ** (power_exponent(width) + 1)


def profile_product(
    step: Float64[Tensor, "*n"],
    gamma: Float64[Tensor, "*n"],
    other_step: Float64[Tensor, "*n"],
    other_gamma: Float64[Tensor, "*n"],
) -> Float64[Tensor, "*n"]:
    """Return the integral over time of the product of two profiles (gamma + 1) tau^gamma / step^(gamma + 1)."""
    ratio = step / other_step
    exponent = torch.where(step < other_step, other_gamma, -gamma)
    scale = (gamma + other_gamma + 1) * torch.maximum(step, other_step)
    return (gamma + 1) * (other_gamma + 1) * ratio**exponent / scale


def posthoc_coefficients(
    steps: Sequence[float], widths: Sequence[float], step: float, width: float
) -> Float64[Tensor, " n"]:
    """Return the coefficients of stored averages whose sum is nearest to the average of `width` at `step`.

    Solves A x = b of inner products of the profiles [Algorithm 3]; the coefficients are scaled to the sum 1, as in the
    released code.

    steps, widths: step and relative width of each stored average; no pair twice, none later than `step`.
    """
    stored = torch.tensor(steps, dtype=torch.float64)
    gammas = torch.tensor([power_exponent(w) for w in widths], dtype=torch.float64)
    target = torch.full_like(stored, step), torch.full_like(stored, power_exponent(width))
    pairs = torch.broadcast_tensors(stored[:, None], gammas[:, None], stored, gammas)
    solution = torch.linalg.solve(profile_product(*pairs), profile_product(stored, gammas, *target))
    return solution / solution.sum()
