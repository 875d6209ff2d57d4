"""Laws of the solvers: their order of convergence, and where they end on data known in closed form."""

import itertools

import pytest
import torch

from analytic import DOUBLE, THREE_MODES, Gaussian, Mixture, normal, times
from consistency.grids import KarrasGrid
from consistency.solvers import Solver, euler_step, heun_step, pf_ode
from consistency.tensors import Data

GRID = KarrasGrid(t_min=0.002, t_max=80.0, rho=7.0)
GAUSSIAN = Gaussian(0.3, 0.5)


def walk(solver: Solver, law: Gaussian | Mixture, x: Data, points: torch.Tensor) -> Data:
    for t, r in itertools.pairwise(points.tolist()):
        x = solver(law.denoise, x, times(len(x), t), times(len(x), r), None)
    return x


@pytest.mark.parametrize(("solver", "order"), [(euler_step, 1), (heun_step, 2)])
@pytest.mark.parametrize("law", [GAUSSIAN, THREE_MODES], ids=["gaussian", "mixture"])
def test_the_error_falls_with_the_order(
    solver: Solver, order: int, law: Gaussian | Mixture
) -> None:
    """The slope of log error against log step is the order of the method."""
    x = 2 + normal(30, 1, 1, 1)
    exact = law.flow(x, times(30, 3.0), times(30, 0.5))
    counts = torch.tensor([32, 64, 128, 256])
    errors = [
        (walk(solver, law, x, torch.linspace(3.0, 0.5, int(n) + 1, dtype=DOUBLE)) - exact).norm()
        for n in counts
    ]
    log_step, log_error = -counts.double().log(), torch.stack(errors).log()
    centred = log_step - log_step.mean()
    slope = (centred * log_error).sum() / centred.square().sum()
    assert float(slope) == pytest.approx(order, abs=0.12)


SIZES = [11, 18, 21, 41, 81, 151, 161, 321, 641, 1281]
EULER = [0.752777, 0.846086, 0.867560, 0.931422, 0.965101, 0.981233, 0.982396, 0.991159, 0.995570, 0.997782]  # fmt: skip
HEUN = [1.174619, 1.055278, 1.039196, 1.009286, 1.002260, 1.000635, 1.000557, 1.000138, 1.000034, 1.000009]  # fmt: skip
"""Computed from the recursion of the closed form."""


@pytest.mark.parametrize(("solver", "ratios"), [(euler_step, EULER), (heun_step, HEUN)])
def test_distillation_of_gaussian_data_has_the_known_gain(
    solver: Solver, ratios: list[float]
) -> None:
    """f(x_{n+1}) = f(solver(x_{n+1})) is the whole walk down the grid: its gain against the exact one."""
    law, x = Gaussian(0.0, 0.5), torch.ones(1, 1, 1, 1, dtype=DOUBLE)
    exact = law.flow(x, times(1, 80.0), times(1, 0.002))
    for n, ratio in zip(SIZES, ratios, strict=True):
        assert float(walk(solver, law, x, GRID.points(n)) / exact) == pytest.approx(ratio, abs=6e-7)


def test_euler_to_time_0_is_the_denoiser() -> None:
    x, t = normal(8, 1, 2, 2), times(8, 1.7)
    ours = euler_step(THREE_MODES.denoise, x, t, times(8, 0.0))
    assert torch.allclose(ours, THREE_MODES.denoise(x, t), atol=1e-14)


def test_times_differ_from_sample_to_sample() -> None:
    x = normal(5, 1, 2, 2)
    t = torch.tensor([80.0, 7.0, 2.0, 0.4, 0.02], dtype=DOUBLE)
    for solver in (euler_step, heun_step):
        together = solver(THREE_MODES.denoise, x, t, t / 2, None)
        each = [
            solver(THREE_MODES.denoise, x[i : i + 1], t[i : i + 1], t[i : i + 1] / 2, None)
            for i in range(5)
        ]
        assert torch.allclose(together, torch.cat(each), atol=1e-14)


def test_solvers_also_step_towards_more_noise() -> None:
    x, t, r = normal(8, 1, 2, 2), times(8, 1.0), times(8, 1.01)
    back = heun_step(GAUSSIAN.denoise, heun_step(GAUSSIAN.denoise, x, t, r), r, t)
    assert torch.allclose(back, x, atol=1e-6)


def test_the_slope_is_the_remaining_noise() -> None:
    """(x - D(x, t)) / t is the mean of z given x_t: exactly z where the data are one point."""
    point = Gaussian(0.3, 1e-9)
    z, t = normal(8, 1, 2, 2), times(8, 0.7)
    assert torch.allclose(pf_ode(point.denoise, 0.3 + 0.7 * z, t, None), z, atol=1e-12)
