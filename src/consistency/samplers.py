"""Samplers: from noise to images, each a function of `denoise`, of a source of noise and of the labels.

`noise()` returns the next standard normal tensor of the batch's shape. NFE counts evaluations of `denoise`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from consistency.errors import require
from consistency.grids import KarrasGrid
from consistency.processes import variance_exploding
from consistency.solvers import euler_step, heun_step
from consistency.tensors import Data, Denoise, Label, Time

Noise = Callable[[], Data]


@runtime_checkable
class Sampler(Protocol):
    """(denoise, noise, label) -> images."""

    def __call__(self, denoise: Denoise, noise: Noise, label: Label = None) -> Data: ...


def _at(time: float, x: Data) -> Time:
    return x.new_full((len(x),), time)


def onestep(
    denoise: Denoise, noise: Noise, label: Label = None, *, t_max: float, clip: bool
) -> Data:
    """f(t_max z, t_max), NFE 1 [Song et al. 2023, arXiv:2303.01469, Section 3]; `clip` bounds it to [-1, 1]."""
    x = t_max * noise()
    x_0 = denoise(x, _at(t_max, x), label)
    return x_0.clamp(-1, 1) if clip else x_0


def multistep(
    denoise: Denoise,
    noise: Noise,
    label: Label = None,
    *,
    times: Sequence[float],
    t_min: float,
    t_max: float,
    clip: bool,
) -> Data:
    """Alternates estimate and renewed noise at the points `times`, NFE len(times) [Song et al. 2023, Algorithm 1].

    `times` are the points of evaluation, falling from t_max; noise of variance t^2 - t_min^2 is added before each but
    the first. `clip` bounds every estimate to [-1, 1].
    """
    _check_times(times, t_min, t_max)
    x = times[0] * noise()
    x_0 = x
    for n, t in enumerate(times):
        if n > 0:
            x = variance_exploding(x_0, noise(), _at((t**2 - t_min**2) ** 0.5, x_0))
        x_0 = denoise(x, _at(t, x), label)
        if clip:
            x_0 = x_0.clamp(-1, 1)
    return x_0


def _check_times(times: Sequence[float], t_min: float, t_max: float) -> None:
    falling = all(t > r for t, r in itertools.pairwise(times))
    require(
        bool(times) and times[0] == t_max and falling and times[-1] >= t_min,
        f"time points that fall from t_max={t_max} and stay at or above t_min={t_min}",
        list(times),
        f"for example sampler.times=[{t_max},0.821]",
    )


def heun(
    denoise: Denoise,
    noise: Noise,
    label: Label = None,
    *,
    grid: KarrasGrid,
    steps: int,
    clip: bool,
) -> Data:
    """Deterministic sampling of the PF-ODE on `steps` points of the grid, then to 0; NFE 2 steps - 1.

    [Karras et al. 2022, arXiv:2206.00364, Algorithm 1]; the last step is Euler's. `clip` bounds the result to [-1, 1].
    """
    points = [float(t) for t in grid.points(steps)]
    x = points[0] * noise()
    for t, r in itertools.pairwise(points):
        x = heun_step(denoise, x, _at(t, x), _at(r, x), label)
    x = euler_step(denoise, x, _at(points[-1], x), _at(0.0, x), label)
    return x.clamp(-1, 1) if clip else x
