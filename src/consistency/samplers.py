"""Samplers: from noise to images, each a function of `denoise`, of a source of noise and of the labels.

`noise()` returns the next standard normal tensor of the batch's shape. NFE counts evaluations of `denoise`. `clip`
bounds every estimate of x_0 to [-1, 1]. `steps` counts the points of the Karras grid from t_max down to t_min.

The first samplers ask a consistency function for x_0; those of `NEED_DENOISER` follow the PF-ODE, whose slope
(x - D(x, t)) / t only a denoiser D, a teacher, knows.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from consistency.errors import require
from consistency.grids import KarrasGrid
from consistency.processes import trigflow, variance_exploding
from consistency.solvers import Solver, euler_step, heun_step, midpoint_step, pf_ode
from consistency.tensors import Data, Denoise, Label, Time

Noise = Callable[[], Data]


@runtime_checkable
class Sampler(Protocol):
    """(denoise, noise, label) -> images."""

    def __call__(self, denoise: Denoise, noise: Noise, label: Label = None) -> Data: ...


def at(time: float, x: Data) -> Time:
    """The same time for every image of x."""
    return x.new_full((len(x),), time)


def bounded(denoise: Denoise, clip: bool) -> Denoise:
    """Return the denoiser; with `clip`, its estimates are clipped to [-1, 1]."""

    def clipped(x_t: Data, t: Time, label: Label = None) -> Data:
        return denoise(x_t, t, label).clamp(-1, 1)

    return clipped if clip else denoise


def onestep(
    denoise: Denoise, noise: Noise, label: Label = None, *, t_max: float, clip: bool
) -> Data:
    """f(t_max z, t_max), NFE 1 [Song et al. 2023, arXiv:2303.01469, Section 3]."""
    x = t_max * noise()
    return bounded(denoise, clip)(x, at(t_max, x), label)


def multistep(
    denoise: Denoise,
    noise: Noise,
    label: Label = None,
    *,
    times: Sequence[float],
    t_min: float,
    t_max: float,
    clip: bool,
    indices: Sequence[int] | None = None,
    num_scales: int | None = None,
    rho: float = 7.0,
) -> Data:
    """Alternate estimate and renewed noise, x = x_0 + sqrt(t^2 - t_min^2) z, at falling time points t.

    NFE len(times) [Song et al. 2023, Algorithm 1]. The first time point is t_max. `indices`, if given, replaces `times` by the
    points of the grid with `num_scales` points at all indices but the last, NFE len(indices) - 1.
    """
    if indices is not None:
        times = indexed_times(indices, num_scales, KarrasGrid(t_min=t_min, t_max=t_max, rho=rho))
    require_falling(times, t_min)
    expected = f"time points that begin with t_max={t_max}"
    require(times[0] == t_max, expected, list(times), f"for example sampler.times=[{t_max},0.821]")
    return refined(bounded(denoise, clip), times[0] * noise(), noise, label, times, t_min)


def followed(
    step: Solver, estimate: Denoise, x: Data, points: Sequence[float], label: Label
) -> Data:
    """Walk from point to point by steps of the PF-ODE."""
    for t, r in itertools.pairwise(points):
        x = step(estimate, x, at(t, x), at(r, x), label)
    return x


def refined(
    estimate: Denoise, x: Data, noise: Noise, label: Label, times: Sequence[float], t_min: float
) -> Data:
    """Estimate x_0 from x at times[0]; at each later time add noise to the estimate and estimate anew."""
    x_0 = estimate(x, at(times[0], x), label)
    for t in times[1:]:
        x = variance_exploding(x_0, noise(), at((t**2 - t_min**2) ** 0.5, x_0))
        x_0 = estimate(x, at(t, x), label)
    return x_0


def indexed_times(
    indices: Sequence[int], num_scales: int | None, grid: KarrasGrid
) -> Sequence[float]:
    """Return the time points at `indices` of the grid, as in the released code of Song et al. 2023.

    Index 0 is t_max and N - 1 is t_min, the end: no noise is added there and the model is not evaluated.
    """
    expected = "the number of points of the grid that the indices count, N >= 2"
    remedy = "add num_scales=40 or the N of the model's training beside the indices"
    require(num_scales is not None and num_scales >= 2, expected, num_scales, remedy)
    assert num_scales is not None
    last, rising = num_scales - 1, all(i < j for i, j in itertools.pairwise(indices))
    expected = f"rising indices that start at 0 (t_max) and end at num_scales - 1 = {last} (t_min)"
    remedy = f"for example [0,{num_scales // 2},{last}]: a list that ends before leaves noise"
    ends = len(indices) >= 2 and (indices[0], indices[-1]) == (0, last)
    require(ends and rising, expected, list(indices), remedy)
    return grid.at(torch.tensor(indices[:-1]), num_scales).tolist()


def require_falling(times: Sequence[float], t_min: float) -> None:
    """Refuse time points that do not fall, or that go below t_min."""
    falling = bool(times) and all(t > r for t, r in itertools.pairwise(times))
    expected = f"time points that fall and stay at or above t_min={t_min}"
    remedy = "list them from the noisiest on, for example [80.0,0.821]"
    require(falling and times[-1] >= t_min, expected, list(times), remedy)


def trigflow_onestep(
    denoise: Denoise,
    noise: Noise,
    label: Label = None,
    *,
    sigma_data: float,
    t_max: float,
    clip: bool,
) -> Data:
    """f(sin(t) sigma_data z, t) at t = arctan(t_max / sigma_data), for networks of the TrigFlow process; NFE 1.

    [Lu and Song 2024, arXiv:2410.11081, Section 3.1]; t_max is the noise level of the variance-exploding process.
    """
    t = math.atan(t_max / sigma_data)
    return trigflow_multistep(denoise, noise, label, times=[t], sigma_data=sigma_data, clip=clip)


def trigflow_multistep(
    denoise: Denoise,
    noise: Noise,
    label: Label = None,
    *,
    times: Sequence[float],
    sigma_data: float,
    clip: bool,
) -> Data:
    """Algorithm 1 of Song et al. 2023 under TrigFlow: x = cos(t) x_0 + sin(t) sigma_data z at falling angles t.

    NFE len(times) [Lu and Song 2024, arXiv:2410.11081]. The first point is that of pure noise, where x_0 counts as 0.
    """
    require_falling(times, 0.0)
    expected = "time points of TrigFlow, angles of at most pi/2"
    remedy = "arctan(t / sigma_data) is the angle of the noise level t; for example [1.5646,1.1]"
    require(times[0] <= math.pi / 2, expected, list(times), remedy)
    estimate = bounded(denoise, clip)
    z = noise()
    x_0 = torch.zeros_like(z)
    for n, t in enumerate(times):
        x = trigflow(x_0, sigma_data * (z if n == 0 else noise()), at(t, x_0))
        x_0 = estimate(x, at(t, x), label)
    return x_0


def heun(
    denoise: Denoise,
    noise: Noise,
    label: Label = None,
    *,
    grid: KarrasGrid,
    steps: int,
    clip: bool,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    to_zero: bool = True,
) -> Data:
    """Heun's method with churn; NFE 2 steps - 1 [Karras et al. 2022, arXiv:2206.00364, Algorithm 2].

    s_churn = 0 is the deterministic Algorithm 1. The last step, to 0, is Euler's; to_zero = False leaves it out and
    stops at t_min, NFE 2 steps - 2.
    """
    estimate, points = bounded(denoise, clip), _points(grid, steps, to_zero=to_zero)
    x = points[0] * noise()
    for t, r in itertools.pairwise(points):
        if s_churn > 0:
            x, t = _churned(x, noise(), t, s_churn / steps, (s_tmin, s_tmax), s_noise)
        step = heun_step if r > 0 else euler_step
        x = step(estimate, x, at(t, x), at(r, x), label)
    return x


def dpm_solver_2(
    denoise: Denoise,
    noise: Noise,
    label: Label = None,
    *,
    grid: KarrasGrid,
    steps: int,
    clip: bool,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Data:
    """Midpoint steps through m = ((t^(1/3) + r^(1/3)) / 2)^3, with churn, the last to 0; NFE 2 steps.

    DPM-Solver-2 [Lu et al. 2022, arXiv:2206.00927] takes the slope between t and r as well, at their geometric mean,
    which does not exist for r = 0; the mean of cube roots is that of the released code of Song et al. 2023.
    """
    estimate, points = bounded(denoise, clip), _points(grid, steps)
    x = points[0] * noise()
    for t, r in itertools.pairwise(points):
        if s_churn > 0:
            x, t = _churned(x, noise(), t, s_churn / steps, (s_tmin, s_tmax), s_noise)
        middle = ((t ** (1 / 3) + r ** (1 / 3)) / 2) ** 3
        slope = partial(pf_ode, estimate)
        x = midpoint_step(slope, x, at(t, x), at(middle, x), at(r, x), label)
    return x


def euler(
    denoise: Denoise, noise: Noise, label: Label = None, *, grid: KarrasGrid, steps: int, clip: bool
) -> Data:
    """Euler's method down to 0; NFE steps [Karras et al. 2022, Algorithm 1 without lines 6 to 8]."""
    points = _points(grid, steps)
    return followed(euler_step, bounded(denoise, clip), points[0] * noise(), points, label)


def progressive(
    denoise: Denoise, noise: Noise, label: Label = None, *, grid: KarrasGrid, steps: int, clip: bool
) -> Data:
    """As many Euler steps, of t_max to t_min, as progressive distillation has left its student; NFE steps.

    [Salimans and Ho 2022, arXiv:2202.00512, Algorithm 2, on the grid of the released code of Song et al. 2023]: here
    `steps` is the N of the last stage, on a grid of steps + 1 points.
    """
    require(steps >= 1, "at least 1 step of the student", steps, "give the N of its last stage")
    points = _points(grid, steps + 1, to_zero=False)
    return followed(euler_step, bounded(denoise, clip), points[0] * noise(), points, label)


def euler_ancestral(
    denoise: Denoise, noise: Noise, label: Label = None, *, grid: KarrasGrid, steps: int, clip: bool
) -> Data:
    """From t to r: Euler's step below r, to `down`, and new noise of deviation `up` on top; NFE steps.

    The ancestral sampling of [Song et al. 2021, arXiv:2011.13456, Appendix F] in terms of noise levels; the last
    step, to 0, adds no noise.
    """
    estimate = bounded(denoise, clip)

    def lowered(x: Data, t: float, down: float) -> Data:
        return euler_step(estimate, x, at(t, x), at(down, x), label)

    return _renewed(lowered, noise, _points(grid, steps))


def midpoint_ancestral(
    denoise: Denoise, noise: Noise, label: Label = None, *, grid: KarrasGrid, steps: int, clip: bool
) -> Data:
    """As `euler_ancestral`, with the midpoint method of order 2 for the way down; NFE 2 steps."""
    slope = partial(pf_ode, bounded(denoise, clip))

    def lowered(x: Data, t: float, down: float) -> Data:
        return midpoint_step(slope, x, at(t, x), at((t + down) / 2, x), at(down, x), label)

    return _renewed(lowered, noise, _points(grid, steps))


def _renewed(
    lowered: Callable[[Data, float, float], Data], noise: Noise, points: Sequence[float]
) -> Data:
    """From point to point: down by `lowered` of x, t and the lower level, and up again by new noise."""
    x = points[0] * noise()
    for levels in itertools.pairwise(points):
        down, up = ancestral_levels(*torch.tensor(levels, dtype=torch.float64))
        x = lowered(x, levels[0], float(down))
        x = variance_exploding(x, noise(), at(float(up), x))
    return x


def ancestral_levels(
    t: Float[Tensor, "*n"], r: Float[Tensor, "*n"]
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """The level to go down to and the deviation of the noise added there: up^2 = r^2 (t^2 - r^2) / t^2, down = r^2 / t.

    `up` is the deviation of x_r given x_t and x_0, and down^2 + up^2 = r^2.
    """
    return r**2 / t, r * (1 - (r / t) ** 2).sqrt()


def _points(grid: KarrasGrid, steps: int, *, to_zero: bool = True) -> list[float]:
    return [*grid.points(steps).tolist(), *([0.0] if to_zero else [])]


def _churned(
    x: Data, z: Data, t: float, share: float, span: tuple[float, float], s_noise: float
) -> tuple[Data, float]:
    """x at the raised level t_hat = (1 + gamma) t, and t_hat [Karras et al. 2022, Algorithm 2, lines 4 to 6]."""
    gamma = min(share, math.sqrt(2) - 1) if span[0] <= t <= span[1] else 0.0
    t_hat = t + gamma * t
    return variance_exploding(x, s_noise * z, at((t_hat**2 - t**2) ** 0.5, x)), t_hat


UNDER_TRIGFLOW: tuple[Callable[..., Data], ...] = (trigflow_onestep, trigflow_multistep)
"""The samplers of the TrigFlow process; the others are of the variance-exploding one."""

NEED_DENOISER: tuple[Callable[..., Data], ...] = (
    *(heun, dpm_solver_2, euler, progressive, euler_ancestral, midpoint_ancestral),
)
"""The samplers that follow the PF-ODE: the slope of a consistency function's estimate is not that ODE's."""
