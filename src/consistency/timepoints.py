"""The search for time points: where between t_max and t_min a further evaluation helps the samples most."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from consistency.errors import require


@dataclass(frozen=True)
class Found:
    """The index with the smallest value, and the value of every index that was looked at, in order."""

    index: int
    values: dict[int, float]

    @property
    def unimodal(self) -> bool:
        """Whether the values that were looked at fall to the smallest one and rise after it, as the search supposes."""
        return is_unimodal(self.values)


def is_unimodal(values: Mapping[int, float]) -> bool:
    """Whether the values, by index, fall strictly to their minimum and rise strictly from it."""
    row = [values[index] for index in sorted(values)]
    lowest = row.index(min(row))
    falling = all(a > b for a, b in pairwise(row[: lowest + 1]))
    return falling and all(a < b for a, b in pairwise(row[lowest:]))


def ternary_search(measure: Callable[[int], float], first: int, last: int) -> Found:
    """The minimum of `measure` over the indices first ... last, both included [Song et al. 2023, arXiv:2303.01469,
    Section 3: "ternary search"].

    Two inner points cut the range in thirds, and the third beyond the larger value is dropped: about
    2 log_{3/2}(last - first) values are measured, each once. Exact where `measure` falls strictly to its minimum and
    rises strictly from it; `Found.unimodal` says whether what was seen agrees with that.
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
    return Found(best, dict(sorted(values.items())))
