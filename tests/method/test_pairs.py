"""Laws of the training times."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Generator

from consistency.errors import UserError
from consistency.grids import KarrasGrid
from consistency.pairs import (
    DiscreteLognormalPairs,
    LognormalTimes,
    Pairs,
    RatioPairs,
    Times,
    TruncatedLognormalTimes,
    TruncatedStudentTimes,
    TruncatedTimes,
    UniformPairs,
    UniformTimes,
)
from consistency.schedules import powers

GRID = KarrasGrid(t_min=0.002, t_max=80.0, rho=7.0)
LOGNORMAL = LognormalTimes(p_mean=-1.2, p_std=1.2)
ECT_TIMES = LognormalTimes(p_mean=-1.1, p_std=2.0)
RATIO = RatioPairs(times=ECT_TIMES, k=8.0, b=1.0)
PAIRS: list[Pairs] = [
    UniformPairs(grid=GRID),
    DiscreteLognormalPairs(grid=GRID, p_mean=-1.1, p_std=2.0),
    RATIO,
]
TIMES: list[Times] = [
    LOGNORMAL,
    LognormalTimes(p_mean=-1.2, p_std=1.2, even=True),
    UniformTimes(grid=GRID),
    TruncatedLognormalTimes(p_mean=-1.1, p_std=2.0, t_lo=0.002, t_hi=80.0),
    TruncatedStudentTimes(df=0.01, loc=0.0, scale=0.2, t_lo=1.0, t_hi=80.0),
]


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("law", PAIRS)
def test_pairs_are_ordered_and_a_function_of_the_generator(law: Pairs) -> None:
    t, r = law(512, 18, generator())
    assert t.dtype == r.dtype == torch.float32
    assert t.shape == r.shape == (512,)
    assert (r < t).all()
    assert (r >= 0).all()
    again = law(512, 18, generator())
    assert torch.equal(t, again[0])
    assert torch.equal(r, again[1])
    assert not torch.equal(t, law(512, 18, generator(1))[0])


@pytest.mark.parametrize("law", TIMES)
def test_times_are_positive_and_a_function_of_the_generator(law: Times) -> None:
    t = law(512, generator())
    assert t.dtype == torch.float32
    assert (t > 0).all()
    assert torch.equal(t, law(512, generator()))


def counts(law: Pairs, n: int, draws: int) -> torch.Tensor:
    """How often every interval of the grid is drawn."""
    t, r = law(draws, n, generator())
    starts = GRID.points(n).float()
    i = (t[:, None] - starts).abs().argmin(1)
    assert torch.equal(t, starts[i])
    assert torch.equal(r, starts[i + 1])
    return torch.bincount(i, minlength=n - 1).double()


def test_uniform_pairs_visit_every_interval_equally_often() -> None:
    """Also the first (t_max) and the last (t_min): indices 0 ... N - 2 [Song et al. 2023, Algorithm 2]."""
    n, draws = 11, 40_000
    expected = draws / (n - 1)
    chi_square = (counts(UniformPairs(grid=GRID), n, draws) - expected).square().sum() / expected
    assert float(chi_square) < 30  # 9 degrees of freedom: beyond 30 once in 2,000 draws


def test_lognormal_pairs_follow_their_probabilities() -> None:
    law, n, draws = DiscreteLognormalPairs(grid=GRID, p_mean=-1.1, p_std=2.0), 11, 40_000
    expected = draws * law.probabilities(n)
    chi_square = ((counts(law, n, draws) - expected).square() / expected).sum()
    assert float(chi_square) < 30


def test_lognormal_probabilities_are_the_published_law() -> None:
    """How often the noisier time exceeds 1 and 10 at N = 1281, and the mean of the weights 1 / (t - r)."""
    law = DiscreteLognormalPairs(grid=GRID, p_mean=-1.1, p_std=2.0)
    points, p = GRID.points(1281), law.probabilities(1281)
    assert float(p.sum()) == pytest.approx(1)
    assert float(p[points[:-1] > 1].sum()) == pytest.approx(0.29, abs=0.005)
    assert float(p[points[:-1] > 10].sum()) == pytest.approx(0.04, abs=0.005)
    assert float((p / (points[:-1] - points[1:])).sum()) == pytest.approx(1130, rel=0.01)


def test_ratio_pairs_clamp_where_the_first_stages_do() -> None:
    """r = 0 up to t = ln 7 in stage 0, ln(5/3) in stage 1, nowhere later [Geng et al. 2024, q = 2, k = 8, b = 1]."""
    for n, edge in ((2, math.log(7)), (4, math.log(5 / 3))):
        t = torch.tensor([edge - 1e-3, edge + 1e-3], dtype=torch.float64)
        r = RATIO.ratio_map(t, n)
        assert r[0] == 0
        assert r[1] > 0
    assert (RATIO.ratio_map(torch.tensor([1e-3, 1.0]), 16) > 0).all()


def test_ratio_pairs_at_the_tabled_times() -> None:
    t = torch.tensor([2.0, 4.0, 80.0], dtype=torch.float64)
    assert RATIO.ratio_map(t, 2).tolist() == pytest.approx([0.046, 1.712, 40.0], abs=1e-3)


CHAIN = [0.5970, 0.6780, 0.8615, 0.9365, 0.9695, 0.9850, 0.9926, 0.9963]


def chain_gain(n: int) -> float:
    """The gain at t = 80 that training with one map r(t) ends at on N(0, 0.25), against the exact one."""
    t, gain, variance = torch.tensor([80.0], dtype=torch.float64), 1.0, 0.25
    exact = (variance / (variance + 80.0**2)) ** 0.5
    while float(t) > 1e-12:
        r = RATIO.ratio_map(t, n)
        gain *= float((variance + t * r) / (variance + t**2))
        t = r
    return gain / exact


def test_the_ratio_has_a_limit() -> None:
    """1 - 1/N is bounded, so that t - r ends at 0.001 t (1 + 8 sigmoid(-t)) [Lee et al. 2024, released code]."""
    law = RatioPairs(times=ECT_TIMES, k=8.0, b=1.0, ratio_limit=0.999)
    t = torch.tensor([0.01, 1.0, 80.0], dtype=torch.float64)
    assert torch.equal(law.ratio_map(t, 64), RATIO.ratio_map(t, 64))
    gap = t - law.ratio_map(t, 2**20)
    assert torch.allclose(gap, 0.001 * t * (1 + 8 * torch.sigmoid(-t)))


def test_pairs_keep_their_least_r_and_gap() -> None:
    """As FastGen: r >= 0.002, and t is raised to r + 1e-6."""
    law = RatioPairs(times=ECT_TIMES, k=8.0, b=1.0, r_min=0.002, least_gap=1e-6)
    t = torch.tensor([0.002, 0.5, 40.0], dtype=torch.float64)
    raised, r = law.at(t, 2)
    assert r.tolist() == pytest.approx([0.002, 0.002, 20.0])
    assert raised.tolist() == pytest.approx([0.002001, 0.5, 40.0])


TRUNCATED = TruncatedLognormalTimes(p_mean=-1.1, p_std=2.0, t_lo=0.002, t_hi=80.0)
STUDENT = TruncatedStudentTimes(df=0.01, loc=0.0, scale=0.2, t_lo=1.0, t_hi=80.0)


@pytest.mark.parametrize("law", [TRUNCATED, STUDENT, replace(STUDENT, df=3.0, t_lo=0.002)])
def test_truncated_laws_rise_from_end_to_end(law: TruncatedTimes) -> None:
    t = law.at(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert (t.diff() > 0).all()
    assert float(t[0]) == pytest.approx(law.t_lo)
    assert float(t[-1]) == pytest.approx(law.t_hi)


def test_a_truncated_lognormal_law_has_the_shares_of_the_whole_one() -> None:
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    shares, ends = (
        torch.special.ndtr((t.log() + 1.1) / 2.0)
        for t in (TRUNCATED.at(u), torch.tensor([0.002, 80.0], dtype=torch.float64))
    )
    assert torch.allclose((shares - ends[0]) / (ends[1] - ends[0]), u)


@pytest.mark.parametrize("loc", [0.0, -3.0])
def test_student_times_with_one_degree_of_freedom_are_cauchy(loc: float) -> None:
    """Student's law of df = 1 has the distribution function 1/2 + atan(s) / pi."""
    law = TruncatedStudentTimes(df=1.0, loc=loc, scale=0.2, t_lo=0.002, t_hi=80.0)
    u = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    ends = torch.tensor([0.002, 80.0], dtype=torch.float64)
    shares, (lo, hi) = (torch.atan((t.log() - loc) / 0.2) for t in (law.at(u), ends))
    assert torch.allclose((shares - lo) / (hi - lo), u, rtol=1e-9, atol=0)


def test_narrow_student_times_of_many_degrees_of_freedom_are_lognormal() -> None:
    """A law much narrower than its ends, whose density vanishes at both."""
    law = TruncatedStudentTimes(df=1e4, loc=0.0, scale=0.05, t_lo=0.002, t_hi=80.0)
    u = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    assert torch.allclose(torch.special.ndtr(law.at(u).log() / 0.05), u, rtol=0, atol=1e-4)
    assert law.at(torch.zeros(1)).item() == pytest.approx(0.002)


def test_student_times_have_the_published_quantiles() -> None:
    """1.04, 1.22 and 2.5 at a quarter, a half and three quarters [Lee et al. 2024, second stage]."""
    t = STUDENT.at(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert t.tolist() == pytest.approx([1.043, 1.221, 2.525], abs=2e-3)


def test_ratio_pairs_lead_to_the_tabled_gains() -> None:
    """The chain t -> r(t) -> ... -> 0 of all stages, and of q = 256 in one."""
    stages = [powers(stage, q=2, stages=8, total_steps=8) for stage in range(8)]
    assert [chain_gain(n) for n in stages] == pytest.approx(CHAIN, abs=6e-5)
    assert chain_gain(powers(0, q=256, stages=1, total_steps=1)) == pytest.approx(0.9963, abs=6e-5)


def test_the_constant_map_is_a_ratio() -> None:
    law = RatioPairs(times=ECT_TIMES, k=0.0, b=1.0)
    t = torch.tensor([0.1, 1.0, 40.0])
    assert torch.allclose(law.ratio_map(t, 4), 0.75 * t)


def test_a_map_of_very_many_scales_does_not_overflow() -> None:
    t = torch.tensor([1.0])
    assert torch.isfinite(RATIO.ratio_map(t, powers(8, q=256, stages=9, total_steps=9))).all()


def test_lognormal_times_have_their_moments() -> None:
    for law in (LOGNORMAL, LognormalTimes(p_mean=-1.2, p_std=1.2, even=True)):
        log_t = law(20_000, generator()).log()
        assert float(log_t.mean()) == pytest.approx(-1.2, abs=0.03)
        assert float(log_t.std()) == pytest.approx(1.2, abs=0.03)


def test_even_times_are_stratified() -> None:
    t = LognormalTimes(p_mean=-1.2, p_std=1.2, even=True)(64, generator())
    shares = torch.special.ndtr((t.double().log() + 1.2) / 1.2)
    assert torch.equal((shares * 64).floor().long(), torch.arange(64))


def test_even_times_are_finite_at_the_ends_of_the_law() -> None:
    nearly_one = torch.full((4096,), 1 - 2**-24)
    law = LognormalTimes(p_mean=-1.2, p_std=1.2, even=True)
    assert torch.isfinite(law.spread(nearly_one)).all()


def test_uniform_times_are_the_limit_of_uniform_pairs() -> None:
    law = UniformTimes(grid=GRID)
    ways = torch.linspace(0, 1, 41, dtype=torch.float64)
    assert torch.allclose(law.at(ways), GRID.points(41).float())
    roots = law(20_000, generator()) ** (1 / 7)
    middle = (80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2
    assert float(roots.mean()) == pytest.approx(middle, abs=0.01)


@pytest.mark.parametrize(
    "build",
    [
        lambda: LognormalTimes(p_mean=0.0, p_std=0.0),
        lambda: TruncatedLognormalTimes(p_mean=0.0, p_std=-1.0, t_lo=0.002, t_hi=80.0),
        lambda: DiscreteLognormalPairs(grid=GRID, p_mean=0.0, p_std=0.0),
    ],
)
def test_a_law_without_spread_is_refused(build: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="p_std > 0"):
        build()
