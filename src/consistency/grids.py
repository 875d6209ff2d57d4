"""The grid of noise levels on which discrete methods and samplers walk."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from consistency.errors import require
from consistency.tensors import Time


@dataclass(frozen=True, kw_only=True)
class KarrasGrid:
    """t_i = (t_max^(1/rho) + i/(N-1) (t_min^(1/rho) - t_max^(1/rho)))^rho, i = 0 ... N-1, descending.

    [Karras et al. 2022, arXiv:2206.00364, Eq. 5]. Computed in float64; t_0 = t_max and t_{N-1} = t_min hold exactly,
    which the formula alone misses by its last digit.
    """

    t_min: float
    t_max: float
    rho: float

    def __post_init__(self) -> None:
        require(
            0 < self.t_min < self.t_max,
            "0 < t_min < t_max",
            f"t_min={self.t_min}, t_max={self.t_max}",
            "the published values are 0.002 and 80",
        )
        require(self.rho > 0, "rho > 0", self.rho, "the published value is 7")

    def at(self, index: Shaped[Tensor, "*n"], num_scales: int | Tensor) -> Float[Tensor, "*n"]:
        """The times at the indices (fractions allowed) of the grid with `num_scales` = N >= 2 points, in float64."""
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        way = index.double() / (num_scales - 1)
        t = (high + way * (low - high)) ** self.rho
        return t.masked_fill(way == 0, self.t_max).masked_fill(way == 1, self.t_min)

    def neighbours(self, i: Shaped[Tensor, "b"], num_scales: int) -> tuple[Time, Time]:
        """(t_i, t_{i+1}), the noisier first, in float32."""
        return self.at(i, num_scales).float(), self.at(i + 1, num_scales).float()

    def points(self, num_scales: int) -> Float[Tensor, "n"]:
        """All N times from t_max down to t_min, in float64."""
        require(num_scales >= 2, "a grid of at least 2 points", num_scales, "give more")
        return self.at(torch.arange(num_scales), num_scales)
