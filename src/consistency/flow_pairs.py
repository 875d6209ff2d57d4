"""Laws of the pairs (t, r), r <= t, of an average velocity: logit-normal times, and a share with r = t, which learn the velocity itself.

Both times are t_max sigmoid(mean + std n) of normal draws n; the laws differ in how they order the two and choose that share.
`HalvedPairs` are those of shortcut models.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from consistency.errors import require
from consistency.tensors import Time


@dataclass(frozen=True, kw_only=True)
class LogitNormalPairs:
    """Sorted times; each pair has r = t with probability `equal` [py-meanflow, `v0`: Geng et al. 2025, arXiv:2505.13447, CIFAR-10].

    mean_t, std_t, mean_r, std_r: of ln(t / (1 - t)) and of ln(r / (1 - r)), before they are sorted.
    t_max: the largest time, 0.999 in FastGen.
    """

    mean_t: float
    std_t: float
    mean_r: float
    std_r: float
    equal: float
    t_max: float = 1.0

    def __post_init__(self) -> None:
        remedy = "0.25 is published for images of 32 pixels, 0.75 for latents"
        require(0 <= self.equal <= 1, "a share `equal` of pairs from 0 to 1", self.equal, remedy)
        above = self.std_t > 0 and self.std_r > 0
        require(above, "std_t and std_r > 0", (self.std_t, self.std_r), "they are deviations")

    def arranged(self, t: Time, r: Time, u: Float[Tensor, "b"]) -> tuple[Time, Time]:
        """The pairs of two times in any order and draws u uniform on [0, 1)."""
        t, r = torch.maximum(t, r), torch.minimum(t, r)
        return t, torch.where(self.chosen(u), t, r)

    def chosen(self, u: Float[Tensor, "b"]) -> Tensor:
        """The pairs with r = t."""
        return u < self.equal

    def at(
        self, n_t: Float[Tensor, "b"], n_r: Float[Tensor, "b"], u: Float[Tensor, "b"]
    ) -> tuple[Time, Time]:
        """(t, r) of standard normal draws and uniform ones."""
        t = self.t_max * (self.mean_t + self.std_t * n_t).sigmoid()
        return self.arranged(t, self.t_max * (self.mean_r + self.std_r * n_r).sigmoid(), u)

    def __call__(self, batch: int, num_scales: int, generator: Generator) -> tuple[Time, Time]:
        device = generator.device
        n_t, n_r = torch.randn(2, batch, generator=generator, device=device)
        return self.at(n_t, n_r, torch.rand(batch, generator=generator, device=device))


class CappedPairs(LogitNormalPairs):
    """r = t with probability `equal`, then r = min(r, t): the share with r = t is larger than `equal` [py-meanflow, `v1`]."""

    def arranged(self, t: Time, r: Time, u: Float[Tensor, "b"]) -> tuple[Time, Time]:
        return t, torch.where(self.chosen(u), t, torch.minimum(r, t))


class FirstPairs(LogitNormalPairs):
    """The first int(equal b) of the batch have r = t [released JAX code of MeanFlow, `data_proportion`]."""

    def chosen(self, u: Float[Tensor, "b"]) -> Tensor:
        return torch.arange(len(u), device=u.device) < int(self.equal * len(u))


class CountedPairs(LogitNormalPairs):
    """The first n have r = t, where n counts the draws u >= 1 - equal [released code of FastGen]."""

    def chosen(self, u: Float[Tensor, "b"]) -> Tensor:
        return torch.arange(len(u), device=u.device) < (u >= 1 - self.equal).sum()


class SinglePairs(FirstPairs):
    """As `FirstPairs`, with the time of a pair with r = t not the later of two draws but one [released code of alpha-Flow, `minmax`]."""

    def arranged(self, t: Time, r: Time, u: Float[Tensor, "b"]) -> tuple[Time, Time]:
        chosen = self.chosen(u)
        return torch.where(chosen, t, torch.maximum(t, r)), torch.where(
            chosen, t, torch.minimum(t, r)
        )


@dataclass(frozen=True, kw_only=True)
class HalvedPairs:
    """Jumps of length 2^-k between multiples of it: t = 1 - i 2^-k and r = t - 2^-k, i uniform [Frans et al. 2024, arXiv:2410.12557; released code].

    The first int(bootstrap b) of the batch have k = log2(steps) - 1 .. 0 in this order, equally many each, the rest of them
    k = 0; of fewer samples than these k, each draws its own. The others have the shortest length, 1 / steps.

    bootstrap: share of the long jumps, 1/8 as released. steps: a power of 2, released 128.
    """

    bootstrap: float
    steps: int

    def __post_init__(self) -> None:
        remedy = "0.125 is published"
        require(0 <= self.bootstrap <= 1, "a share bootstrap from 0 to 1", self.bootstrap, remedy)
        power = self.steps >= 2 and self.steps & (self.steps - 1) == 0
        require(power, "steps that are a power of 2, from 2 on", self.steps, "128 is published")

    def at(self, u: Float[Tensor, "b"]) -> tuple[Time, Time]:
        """(t, r) of uniform draws on [0, 1)."""
        k, u = self.halvings(u)
        parts = torch.exp2(k.to(u.dtype))
        t = 1 - (u * parts).floor() / parts
        return t, t - 1 / parts

    def long(self, batch: int) -> int:
        """Return the number of long jumps, the first of a batch."""
        return int(self.bootstrap * batch)

    def halvings(self, u: Float[Tensor, "b"]) -> tuple[Int[Tensor, "b"], Float[Tensor, "b"]]:
        """k of each sample, and draws for the time."""
        most, long = int(math.log2(self.steps)), self.long(len(u))
        place = torch.arange(len(u), device=u.device)
        if long >= most:
            k, rest = (most - 1 - place // (long // most)).clamp(min=0), u
        else:
            k, rest = (most * u).long(), (most * u).frac()
        shortest = place >= long
        return torch.where(shortest, most, k), torch.where(shortest, u, rest)

    def __call__(self, batch: int, num_scales: int, generator: Generator) -> tuple[Time, Time]:
        return self.at(torch.rand(batch, generator=generator, device=generator.device))
