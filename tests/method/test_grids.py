"""Laws of the grid of noise levels."""

import pytest
import torch

from consistency.errors import UserError
from consistency.grids import KarrasGrid

GRID = KarrasGrid(t_min=0.002, t_max=80.0, rho=7.0)
sizes = pytest.mark.parametrize("n", [2, 3, 18, 40, 151, 201, 1281])


@sizes
def test_both_ends_of_the_grid_are_exact(n: int) -> None:
    """The formula alone ends at 0.002000000000000003, where the boundary condition would not hold exactly."""
    points = GRID.points(n)
    assert float(points[0]) == 80.0
    assert float(points[-1]) == 0.002
    _, r = GRID.neighbours(torch.tensor([n - 2]), n)
    assert torch.equal(r, torch.tensor([0.002]))


@sizes
def test_times_fall(n: int) -> None:
    assert (GRID.points(n).diff() < 0).all()


@sizes
def test_a_power_of_the_times_is_evenly_spaced(n: int) -> None:
    gaps = (GRID.points(n) ** (1 / 7)).diff()
    assert torch.allclose(gaps, gaps.mean().expand_as(gaps), rtol=1e-9)


def test_a_grid_twice_as_fine_holds_the_coarse_one() -> None:
    assert torch.allclose(GRID.points(41)[::2], GRID.points(21), rtol=1e-12)
    assert torch.allclose(GRID.at(torch.arange(20) + 0.5, 21), GRID.points(41)[1::2], rtol=1e-12)


def test_the_published_two_step_points() -> None:
    """Times of the released sampling commands [hyperparameters of Song et al. 2023, launch script]."""
    for index, n, t in (
        (11, 18, 0.58535),
        (22, 40, 1.38237),
        (106, 201, 1.91284),
        (17, 40, 4.36556),
        (67, 151, 3.99122),
    ):
        assert float(GRID.at(torch.tensor(index), n)) == pytest.approx(t, abs=6e-6)


def test_neighbours_are_float32_and_in_order() -> None:
    t, r = GRID.neighbours(torch.arange(17), 18)
    assert t.dtype == r.dtype == torch.float32
    assert torch.equal(t[1:], r[:-1])
    assert (r < t).all()


@pytest.mark.parametrize("wrong", [{"t_min": 0.0}, {"t_min": 80.0}, {"rho": 0.0}])
def test_impossible_constants_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected"):
        KarrasGrid(**{"t_min": 0.002, "t_max": 80.0, "rho": 7.0, **wrong})
    with pytest.raises(UserError, match="at least 2"):
        GRID.points(1)
