"""Ternary search for the time point at which a further evaluation helps the samples most."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from consistency.errors import require


@dataclass(frozen=True)
class Minimum:
    """The index of the smallest value, and the measured values by index."""

    index: int
    values: dict[int, float]

    @property
    def unimodal(self) -> bool:
        """Whether the measured values agree with the search's assumption, one minimum."""
        return is_unimodal(self.values)


def is_unimodal(values: Mapping[int, float]) -> bool:
    """Return whether values, by index, fall strictly to their minimum and rise strictly from it."""
    row = [values[index] for index in sorted(values)]
    lowest = row.index(min(row))
    falling = all(a > b for a, b in pairwise(row[: lowest + 1]))
    return falling and all(a < b for a, b in pairwise(row[lowest:]))


def ternary_search(measure: Callable[[int], float], first: int, last: int) -> Minimum:
    """Minimise `measure` over the indices first ... last, both included [Song et al. 2023, arXiv:2303.01469,
    Section 3: "ternary search"].

    Two inner points cut the range in thirds, and the third beyond the larger value is dropped: about
    2 log_{3/2}(last - first) values are measured, each once. The minimum is exact if `measure` falls strictly to it and
    rises strictly from it.
    """
    require(
        first <= last, "a range of at least one index", f"{first} to {last}", "search a finer grid"
    )
    values: dict[int, float] = {}

    def value(index: int) -> float:
        if index not in values:
            values[index] = measure(index)
        return values[index]

    low, high = first, last
    while high - low > 2:
        third = (high - low) // 3
        left, right = low + third, high - third
        if value(left) < value(right):
            high = right - 1
        elif value(left) > value(right):
            low = left + 1
        else:
            low, high = left, right
    for index in range(low, high + 1):
        value(index)
    best = min(values, key=lambda index: (values[index], index))
    return Minimum(best, dict(sorted(values.items())))
