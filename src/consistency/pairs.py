"""Laws of the training times: pairs (t, r) with r < t for consistency losses, single t for denoising.

All draw from a generator, on its device, and return float32 of shape (batch,).
"""

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from consistency.errors import require
from consistency.grids import KarrasGrid
from consistency.tensors import Time, sent


@runtime_checkable
class Pairs(Protocol):
    """A law of pairs: (batch, N(k), generator) -> (t, r)."""

    def __call__(self, batch: int, num_scales: int, generator: Generator) -> tuple[Time, Time]: ...


@runtime_checkable
class Times(Protocol):
    """A law of single times: (batch, generator) -> t."""

    def __call__(self, batch: int, generator: Generator) -> Time: ...


def require_scales(num_scales: float, least: int) -> None:
    """Refuse an N(k) without a pair, such as the 0 of a run without a ScaleSchedule."""
    require(
        num_scales >= least,
        f"N(k) >= {least}, the number of scales",
        f"N(k) = {num_scales}" + (", which no callback has set" if num_scales == 0 else ""),
        "choose another schedule mode.scales; in a script add a ScaleSchedule to the trainer, as "
        "consistency.training.build.build_module(config) does",
    )


@dataclass(frozen=True, kw_only=True)
class Lognormal:
    """ln t ~ N(p_mean, p_std^2)."""

    p_mean: float
    p_std: float

    def __post_init__(self) -> None:
        require(self.p_std > 0, "p_std > 0", self.p_std, "it is the standard deviation of ln t")

    def level(self, n: Float[Tensor, "b"]) -> Time:
        """t of standard normal draws n."""
        return (self.p_mean + self.p_std * n).exp()


@dataclass(frozen=True, kw_only=True)
class UniformPairs:
    """(t_i, t_{i+1}) on the Karras grid of N(k) points, i uniform [Song et al. 2023, Algorithms 2 and 3]."""

    grid: KarrasGrid

    def __call__(self, batch: int, num_scales: int, generator: Generator) -> tuple[Time, Time]:
        require_scales(num_scales, 2)
        device = generator.device
        i = torch.randint(num_scales - 1, (batch,), generator=generator, device=device)
        return self.grid.neighbours(i, num_scales)


@dataclass(frozen=True, kw_only=True)
class DiscreteLognormalPairs(Lognormal):
    """Neighbours on the Karras grid of N(k) points, the cleaner one's interval weighed by a lognormal law.

    p(i) ~ erf((ln t_i - p_mean) / (sqrt2 p_std)) - erf((ln t_{i+1} - p_mean) / (sqrt2 p_std)), with t_i > t_{i+1}
    [Song and Dhariwal 2023, arXiv:2310.14189, Table 1].
    """

    grid: KarrasGrid

    @cache  # noqa: B019, one law a run, and N(k) takes few values
    def probabilities(self, num_scales: int) -> Float[Tensor, "_intervals"]:
        """p(i) for i = 0 ... N-2, descending in noise, in float64; the same tensor for the same N."""
        log_t = self.grid.points(num_scales).log()
        mass = torch.erf((log_t - self.p_mean) / (math.sqrt(2) * self.p_std))
        gaps = mass[:-1] - mass[1:]
        return gaps / gaps.sum()

    def __call__(self, batch: int, num_scales: int, generator: Generator) -> tuple[Time, Time]:
        require_scales(num_scales, 2)
        weights = sent(self.probabilities(num_scales), generator.device)
        i = torch.multinomial(weights, batch, replacement=True, generator=generator)
        return self.grid.neighbours(i, num_scales)


@dataclass(frozen=True, kw_only=True)
class RatioPairs:
    """t by the law `times`, and r = max(r_min, t (1 - (1 + k sigmoid(-b t)) / n)), n = min(N(k), 1 / (1 - ratio_limit)).

    [Geng et al. 2024, arXiv:2406.14548, with N(k) = q^(stage + 1)]; k = 0 is its constant map, of ratio r/t = 1 - 1/n.
    ratio_limit: the largest 1 - 1/n [Lee et al. 2024, arXiv:2410.14895: 0.999 on CIFAR-10, 0.9961 on ImageNet-64]. At
    r = 0, with the published r_min = 0, the clean image is the target; the released code of Lee et al. has r_min = 1e-6.
    least_gap: t is raised to r + least_gap [FastGen: 1e-6, with r_min = 0.002].
    """

    times: Times
    k: float
    b: float
    ratio_limit: float = 1.0
    r_min: float = 0.0
    least_gap: float = 0.0

    def ratio_map(self, t: Time, num_scales: float) -> Time:
        """r for the noisier time t."""
        adjustment = 1 + self.k * torch.sigmoid(-self.b * t)
        n = 1 / max(1 / num_scales, 1 - self.ratio_limit)
        return (t * (1 - adjustment / n)).clamp_min(self.r_min)

    def at(self, t: Time, num_scales: float) -> tuple[Time, Time]:
        """(t, r) of drawn times t."""
        r = self.ratio_map(t, num_scales)
        return torch.maximum(t, r + self.least_gap), r

    def __call__(self, batch: int, num_scales: float, generator: Generator) -> tuple[Time, Time]:
        require_scales(num_scales, 1)
        return self.at(self.times(batch, generator), num_scales)


@dataclass(frozen=True, kw_only=True)
class LognormalTimes(Lognormal):
    """ln t ~ N(p_mean, p_std^2) [Karras et al. 2022, arXiv:2206.00364, Table 1].

    even: draws one time from each of the batch's equally likely intervals, so that its times spread evenly [released
    code of Song et al. 2023, `LogNormalSampler(even=True)`].
    """

    even: bool = False

    at = Lognormal.level

    def spread(self, u: Float[Tensor, "b"]) -> Time:
        """t of draws u uniform on [0, 1), sample j taken from the interval [j, j + 1) / batch of probability."""
        # In float64: the last sample's probability may be too near 1 for float32.
        j = torch.arange(len(u), dtype=torch.float64, device=u.device)
        return self.quantile((j + u) / len(u)).to(u.dtype)

    def quantile(self, p: Float[Tensor, "b"]) -> Time:
        """The t below which the share p of the law lies."""
        return self.at(torch.special.ndtri(p))

    def __call__(self, batch: int, generator: Generator) -> Time:
        draw = torch.rand if self.even else torch.randn
        draws = draw(batch, generator=generator, device=generator.device)
        return self.spread(draws) if self.even else self.at(draws)


@dataclass(frozen=True, kw_only=True)
class TruncatedTimes:
    """A law of t on [t_lo, t_hi] alone, drawn through its inverse distribution function."""

    t_lo: float
    t_hi: float

    def __post_init__(self) -> None:
        expected, remedy = "0 < t_lo < t_hi, the ends of the law of t", "set both as noise levels"
        holds = 0 < self.t_lo < self.t_hi
        require(holds, expected, f"t_lo={self.t_lo}, t_hi={self.t_hi}", remedy)

    def quantile(self, p: Float[Tensor, "b"]) -> Time:
        """The t below which the share p of the law lies, p in float64."""
        raise NotImplementedError

    def at(self, u: Float[Tensor, "b"]) -> Time:
        """t of draws u uniform on [0, 1), computed in float64 and returned in the precision of u."""
        return self.quantile(u.double()).to(u.dtype).clamp(self.t_lo, self.t_hi)

    def __call__(self, batch: int, generator: Generator) -> Time:
        return self.at(torch.rand(batch, generator=generator, device=generator.device))


@dataclass(frozen=True, kw_only=True)
class TruncatedLognormalTimes(TruncatedTimes, Lognormal):
    """ln t ~ N(p_mean, p_std^2) on t_lo <= t <= t_hi [Lee et al. 2024, arXiv:2410.14895, first stage; FastGen]."""

    def __post_init__(self) -> None:
        TruncatedTimes.__post_init__(self)
        Lognormal.__post_init__(self)

    def quantile(self, p: Float[Tensor, "b"]) -> Time:
        law = NormalDist(self.p_mean, self.p_std)
        lo, hi = (law.cdf(math.log(t)) for t in (self.t_lo, self.t_hi))
        return self.level(torch.special.ndtri(lo + p * (hi - lo)))


CELLS, NEWTON_STEPS = 1024, 4


@dataclass(frozen=True, kw_only=True)
class TruncatedStudentTimes(TruncatedTimes):
    """ln t = loc + scale s with s by Student's law of df degrees, on t_lo <= t <= t_hi [Lee et al. 2024, second stage].

    y = asinh((ln t - loc) / (scale sqrt(df))) has the density ~ cosh(y)^-df, whose integral is smooth for the published
    df = 0.01; its inverse is found by Newton's method within a cell of a table. A df above 100 is nearly lognormal.
    """

    df: float
    loc: float
    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        got, remedy = f"df={self.df}, scale={self.scale}", "set both above 0"
        require(min(self.df, self.scale) > 0, "df > 0 and scale > 0 of Student's law", got, remedy)

    @property
    def unit(self) -> float:
        """scale sqrt(df)."""
        return self.scale * math.sqrt(self.df)

    def quantile(self, p: Float[Tensor, "b"]) -> Time:
        ends, masses = self.table(p.device)
        mass = p * masses[-1]
        cell = torch.searchsorted(masses, mass).clamp(1, CELLS)
        below, above, done = ends[cell - 1], ends[cell], masses[cell - 1]
        least = torch.finfo(p.dtype).tiny  # far from the mode of a large df a cell has the mass 0
        share = (mass - done) / (masses[cell] - done).clamp_min(least)
        y = below + share * (above - below)
        for _ in range(NEWTON_STEPS):
            excess = done + self.integral(below, y) - mass
            y = (y - excess / (y.cosh() ** -self.df).clamp_min(least)).clamp(below, above)
        return (self.loc + self.unit * y.sinh()).exp()

    @cache  # noqa: B019, one law a run
    def table(self, device: torch.device) -> tuple[Float[Tensor, "_ends"], Float[Tensor, "_ends"]]:
        """The ends of the cells in y, and the integral up to each of them, in float64 on the device."""
        lo, hi = (math.asinh((math.log(t) - self.loc) / self.unit) for t in (self.t_lo, self.t_hi))
        ends = torch.linspace(lo, hi, CELLS + 1, dtype=torch.float64)
        masses = self.integral(ends[:-1], ends[1:]).cumsum(0)
        return sent(ends, device), sent(torch.cat([masses.new_zeros(1), masses]), device)

    def integral(self, below: Float[Tensor, "n"], y: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The integral of cosh^-df from `below` to y in one cell, by Gauss and Legendre's formula."""
        nodes, weights = (values.to(y.dtype) for values in gauss_legendre(8, y.device))
        half = (y - below)[:, None] / 2
        return (half * weights * (below[:, None] + half * (1 + nodes)).cosh() ** -self.df).sum(1)


@cache
def gauss_legendre(n: int, device: torch.device) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Return the n nodes and weights of Gauss-Legendre integration from -1 to 1 [Golub and Welsch 1969], on the device."""
    k = torch.arange(1, n, dtype=torch.float64)
    beta = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(beta.diag(1) + beta.diag(-1))
    return sent(nodes, device), sent(2 * vectors[0] ** 2, device)


@dataclass(frozen=True, kw_only=True)
class QuantisedTimes:
    """Times of another law, each moved to the nearest of `points` points of the Karras grid [released code FastGen]."""

    times: Times
    grid: KarrasGrid
    points: int = 1000

    def nearest(self, t: Time) -> Time:
        """The grid's point nearest to t, in its precision."""
        points = sent(self.grid.points(self.points), t.device)
        return points[(points - t[:, None]).abs().argmin(dim=1)].to(t.dtype)

    def __call__(self, batch: int, generator: Generator) -> Time:
        return self.nearest(self.times(batch, generator))


@dataclass(frozen=True, kw_only=True)
class UniformTimes:
    """t^(1/rho) uniform between the ends of the grid: the law of `UniformPairs` as N(k) grows without bound.

    [Song et al. 2023, Appendix B with Appendix C; released CIFAR-10 code, continuous time].
    """

    grid: KarrasGrid

    def at(self, way: Float[Tensor, "b"]) -> Time:
        """t at the share `way` of the path from t_max (0) to t_min (1), in float32."""
        return self.grid.at(way, 2).float()

    def __call__(self, batch: int, generator: Generator) -> Time:
        return self.at(torch.rand(batch, generator=generator, device=generator.device))
