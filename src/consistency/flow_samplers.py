"""Samplers of the rectified flow, for average velocities: from noise at t_max to images at 0. `onestep` is the single jump."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch

from consistency.errors import require
from consistency.processes import rectified_flow
from consistency.samplers import Noise, at, bounded, onestep, require_falling
from consistency.solvers import euler_step
from consistency.tensors import AverageVelocity, Data, Denoise, Label

Jump: TypeAlias = AverageVelocity
"""(x_t, t, label, r) -> x_t - t u(x_t, t, r), the estimate of x_0 along the average velocity from r to t."""


def flow_jumps(
    denoise: Jump,
    noise: Noise,
    label: Label = None,
    *,
    times: Sequence[float],
    t_max: float,
) -> Data:
    """Jumps x_r = x_t - (t - r) u(x_t, t, r) from point to point and to 0, for average velocities; NFE len(times).

    [Geng et al. 2025, arXiv:2505.13447, Algorithm 2]. The estimate that is told r is x_t - t u(x_t, t, r), and Euler's step
    with it is the jump.
    """
    require_flow(times, t_max)
    x = times[0] * noise()
    for t, r in itertools.pairwise([*times, 0.0]):
        x = euler_step(partial(denoise, r=at(r, x)), x, at(t, x), at(r, x), label)
    return x


def flow_multistep(
    denoise: Denoise,
    noise: Noise,
    label: Label = None,
    *,
    times: Sequence[float],
    t_max: float,
    clip: bool,
) -> Data:
    """Algorithm 1 of Song et al. 2023 under the rectified flow: x = (1 - t) x_0 + t z at falling times; NFE len(times).

    [released code of FastGen, `sde`]. The first point is that of pure noise, where x_0 counts as 0.
    """
    require_flow(times, t_max)
    estimate, z = bounded(denoise, clip), noise()
    x_0 = torch.zeros_like(z)
    for n, t in enumerate(times):
        x = rectified_flow(x_0, z if n == 0 else noise(), at(t, x_0))
        x_0 = estimate(x, at(t, x), label)
    return x_0


def require_flow(times: Sequence[float], t_max: float) -> None:
    """Refuse times that do not fall from t_max."""
    require_falling(times, 0.0)
    expected = f"times of a rectified flow that fall from t_max={t_max} and stay above 0"
    remedy = f"for example sampler.times=[{t_max},{t_max / 2}]"
    require(times[0] == t_max and times[-1] > 0, expected, list(times), remedy)


UNDER_FLOW: tuple[Callable[..., Data], ...] = (onestep, flow_jumps, flow_multistep)
"""The samplers of the rectified flow."""
