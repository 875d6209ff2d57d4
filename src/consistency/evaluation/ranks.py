"""What the processes of a measurement say to each other; alone, a process talks to itself."""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def place() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(value: T) -> list[T]:
    """What every rank gave, in the order of the ranks; all have to call."""
    ranks = place()[1]
    if ranks == 1:
        return [value]
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, value)
    return found


def batches(count: int, size: int) -> list[range]:
    """This rank's share of the numbers below `count`, in batches of at most `size`.

    Batches are the same whatever the number of ranks, as long as there are enough of them: so are then the roundings
    that depend on what stands together in a batch.
    """
    rank, ranks = place()
    size = max(1, min(size, count // ranks))
    return [range(first, min(first + size, count)) for first in range(0, count, size)][rank::ranks]


def tell(line: str) -> None:
    """Prints a line once."""
    if place()[0] == 0:
        print(line, flush=True)
