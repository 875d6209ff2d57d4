"""Laws of the samplers on Gaussian data, where every answer is known, and the number of evaluations of each."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from analytic import Gaussian, normal, times
from consistency.errors import UserError
from consistency.grids import KarrasGrid
from consistency.samplers import (
    NEED_DENOISER,
    Noise,
    ancestral_levels,
    dpm_solver_2,
    euler,
    euler_ancestral,
    heun,
    midpoint_ancestral,
    multistep,
    onestep,
    progressive,
    trigflow_multistep,
    trigflow_onestep,
)
from consistency.tensors import Data, Label, Time, broadcast_time

T_MIN, T_MAX, RHO = 0.002, 80.0, 7.0
GRID = KarrasGrid(t_min=T_MIN, t_max=T_MAX, rho=RHO)
LAW = Gaussian(0.3, 0.5)
MULTISTEP = {"t_min": T_MIN, "t_max": T_MAX, "clip": False}


def source(count: int, seed: int = 0) -> Noise:
    seeds = itertools.count(seed * 1000)
    return lambda: normal(count, 1, 1, 1, seed=next(seeds))


def consistency(x_t: Data, t: Time, label: Label = None) -> Data:
    """The exact consistency function of the law."""
    return LAW.flow(x_t, t, times(len(x_t), T_MIN))


class Counted:
    """A denoiser that counts its evaluations and remembers their times."""

    def __init__(self, denoise: Callable[..., Data]) -> None:
        self.denoise, self.times = denoise, list[float]()

    def __call__(self, x_t: Data, t: Time, label: Label = None) -> Data:
        self.times.append(float(t[0]))
        return self.denoise(x_t, t, label)


@pytest.mark.parametrize(
    ("sampler", "per_step", "less"),
    [
        (heun, 2, 1),
        (dpm_solver_2, 2, 0),
        (euler, 1, 0),
        (progressive, 1, 0),
        (euler_ancestral, 1, 0),
        (midpoint_ancestral, 2, 0),
    ],
)
@pytest.mark.parametrize("steps", [2, 7])
def test_the_number_of_evaluations_is_the_documented_one(
    sampler: Callable[..., Data], per_step: int, less: int, steps: int
) -> None:
    counted = Counted(LAW.denoise)
    sampler(counted, source(2), grid=GRID, steps=steps, clip=False)
    assert len(counted.times) == per_step * steps - less
    assert counted.times[0] == T_MAX
    assert sampler in NEED_DENOISER


@pytest.mark.parametrize("sampler", [heun, dpm_solver_2, euler])
def test_deterministic_samplers_end_on_the_flow_of_the_ode(sampler: Callable[..., Data]) -> None:
    x_0 = sampler(LAW.denoise, source(50), grid=GRID, steps=1000, clip=False)
    exact = LAW.flow(T_MAX * source(50)(), times(50, T_MAX), times(50, 0.0))
    assert torch.allclose(x_0, exact, atol=8e-3 if sampler is euler else 2e-5)


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        (heun, {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0}),
        (dpm_solver_2, {"s_churn": 40.0}),
        (euler_ancestral, {}),
        (midpoint_ancestral, {}),
    ],
)
def test_stochastic_samplers_have_the_deviation_of_the_data(
    sampler: Callable[..., Data], settings: dict[str, float]
) -> None:
    x_0 = sampler(LAW.denoise, source(20_000), grid=GRID, steps=200, clip=False, **settings)
    assert float(x_0.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(x_0.std()) == pytest.approx(0.5, abs=0.02)
    other = sampler(
        LAW.denoise,
        lambda: normal(20_000, 1, 1, 1),
        grid=GRID,
        steps=200,
        clip=False,
        **settings,
    )
    assert not torch.allclose(x_0, other)


def test_without_the_last_step_sampling_ends_at_t_min() -> None:
    walk = heun(LAW.denoise, source(9), grid=GRID, steps=200, clip=False, to_zero=False)
    exact = LAW.flow(T_MAX * source(9)(), times(9, T_MAX), times(9, T_MIN))
    assert torch.allclose(walk, exact, atol=1e-3)
    one = progressive(LAW.denoise, source(9), grid=GRID, steps=1, clip=False)
    x = T_MAX * source(9)()
    slope = (x - LAW.denoise(x, times(9, T_MAX))) / T_MAX
    assert torch.allclose(one, x + (T_MIN - T_MAX) * slope)


def test_variances_of_an_ancestral_step_add_up() -> None:
    t, r = torch.tensor([3.0, 1.0, 0.5]).double(), torch.tensor([1.0, 0.9, 0.0]).double()
    down, up = ancestral_levels(t, r)
    assert torch.allclose(down**2 + up**2, r**2)
    assert torch.allclose(up**2, r**2 * (t**2 - r**2) / t**2)


def test_renewed_noise_keeps_an_exact_consistency_function_exact() -> None:
    for points in ([T_MAX], [T_MAX, 2.0], [T_MAX, 5.0, 1.0, 0.2]):
        x_0 = multistep(consistency, source(40_000), times=points, **MULTISTEP)
        assert float(x_0.std()) == pytest.approx(math.hypot(0.5, T_MIN), rel=0.015)


def test_renewed_noise_accounts_for_the_noise_at_t_min() -> None:
    """x at t has the deviation t around data that is noisy to t_min already."""
    counted, seen = Counted(lambda x, t, label: 0 * x), []

    def denoise(x_t: Data, t: Time, label: Label = None) -> Data:
        seen.append(float(x_t.std()))
        return counted(x_t, t, label)

    multistep(denoise, source(40_000), times=[9.0, 5.0], t_min=4.0, t_max=9.0, clip=False)
    assert seen == pytest.approx([9.0, 3.0], rel=0.02)


def test_churn_raises_the_noise_level_within_its_bounds() -> None:
    points = GRID.points(7).tolist()
    for s_churn, factor in ((1.4, 1.2), (1e9, math.sqrt(2))):
        for sampler in (heun, dpm_solver_2):
            counted = Counted(LAW.denoise)
            churn = {"s_churn": s_churn, "s_tmin": 0.01, "s_tmax": 50.0}
            sampler(counted, source(2), grid=GRID, steps=7, clip=False, **churn)
            raised = [t * factor if 0.01 <= t <= 50 else t for t in points]
            assert counted.times[::2] == pytest.approx(raised)


def test_indices_are_points_of_the_grid_without_the_last() -> None:
    counted, indices = Counted(consistency), [0, 22, 39]
    by_index = multistep(
        counted, source(3), times=[], indices=indices, num_scales=40, rho=RHO, **MULTISTEP
    )
    points = GRID.points(40)[indices[:-1]].tolist()
    assert counted.times == points
    assert points[1] == pytest.approx(1.38237, abs=1e-5)
    assert torch.equal(by_index, multistep(consistency, source(3), times=points, **MULTISTEP))


@pytest.mark.parametrize(
    ("indices", "num_scales", "hint"),
    [
        ([0, 22], 40, "end at num_scales - 1 = 39"),
        ([1, 39], 40, "start at 0"),
        ([0, 20, 20, 39], 40, "rising"),
        ([39], 40, "start at 0"),
        ([], 40, "start at 0"),
        ([0, 39], None, "num_scales"),
        ([0, 40], 40, "39"),
    ],
)
def test_indices_that_leave_noise_are_an_error(
    indices: Sequence[int], num_scales: int | None, hint: str
) -> None:
    with pytest.raises(UserError, match=hint):
        multistep(
            consistency, source(1), times=[], indices=indices, num_scales=num_scales, **MULTISTEP
        )


@pytest.mark.parametrize("points", [[], [3.0], [T_MAX, 1.0, 1.0], [T_MAX, 1.0, 2.0], [T_MAX, 1e-4]])
def test_invalid_time_points_are_an_error(points: Sequence[float]) -> None:
    with pytest.raises(UserError, match="time points"):
        multistep(consistency, source(1), times=points, **MULTISTEP)


def test_clip_bounds_every_estimate() -> None:
    def far(x_t: Data, t: Time, label: Label = None) -> Data:
        return 10 + 0 * x_t

    assert torch.equal(
        onestep(far, source(2), t_max=T_MAX, clip=True), torch.ones(2, 1, 1, 1).double()
    )
    for sampler in NEED_DENOISER:
        clipped = sampler(far, source(2), grid=GRID, steps=5, clip=True)
        free = sampler(far, source(2), grid=GRID, steps=5, clip=False)
        assert float(clipped.max()) < 2 < float(free.min()), sampler


def test_trigflow_and_variance_exploding_samplers_agree() -> None:
    """x_trig = cos(t) x_ve, so f_trig(x, t) = f_ve(x / cos(t), sigma_data tan(t))."""
    sigma_data = 0.5
    law = Gaussian(0.0, 0.4)

    def f_ve(x_t: Data, t: Time, label: Label = None) -> Data:
        return law.flow(x_t, t, 0 * t)

    def f_trig(x_t: Data, t: Time, label: Label = None) -> Data:
        return f_ve(x_t / broadcast_time(t.cos(), x_t), sigma_data * t.tan())

    noise_levels = [T_MAX, 0.9]
    angles = [math.atan(t / sigma_data) for t in noise_levels]
    settings = {"sigma_data": sigma_data, "clip": False}
    ours = trigflow_multistep(f_trig, source(30), times=angles, **settings)
    theirs = multistep(f_ve, source(30), times=noise_levels, t_min=0.0, t_max=T_MAX, clip=False)
    assert torch.allclose(ours, theirs, atol=1e-12)
    counted = Counted(f_trig)
    one = trigflow_onestep(counted, source(30), t_max=T_MAX, **settings)
    assert torch.allclose(one, onestep(f_ve, source(30), t_max=T_MAX, clip=False), atol=1e-12)
    assert counted.times == [angles[0]]
    with pytest.raises(UserError, match="pi/2"):
        trigflow_multistep(f_trig, source(1), times=[1.7], **settings)
