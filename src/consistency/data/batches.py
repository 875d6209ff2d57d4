"""The order of the data as a function of the global position of a batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Generator, Tensor
from torch.utils.data import Sampler

from consistency.errors import require
from consistency.randomness import generator


class BatchSplit(NamedTuple):
    """A global batch as devices x images a device holds at once x micro-batches accumulated."""

    devices: int
    images: int
    accumulated: int

    def __str__(self) -> str:
        devices = f"{self.devices} device" + "s" * (self.devices > 1)
        return f"{devices} x {self.images} images x {self.accumulated} accumulated"


def split_batch(batch_size: int, *, devices: int, at_most: int | None) -> BatchSplit:
    """Split `batch_size` images over `devices` in equal shares.

    A device holds as many images at once as divide its share and are at most `at_most` (None: its whole share).
    """
    valid = at_most is None or at_most >= 1
    require(valid, "data.device_batch_size >= 1, or null", at_most, "give a number of images")
    require(
        batch_size % devices == 0,
        f"data.batch_size to be a multiple of the {devices} devices",
        f"data.batch_size={batch_size}",
        "change data.batch_size or trainer.devices",
    )
    share = batch_size // devices
    bound = min(at_most or share, share)
    images = next(size for size in range(bound, 0, -1) if share % size == 0)
    return BatchSplit(devices, images, share // images)


@dataclass(kw_only=True, eq=False, repr=False)
class PositionedBatches(Sampler[list[int]]):
    """Index lists of the micro-batches number start ... total-1 of one rank.

    Every epoch is a fresh permutation of the set, a function of (seed, epoch); a global batch is a run of
    `batch_size` entries of it, cut into `accumulate` micro-batches, each cut into `world_size` shares. The rest of an
    epoch, less than one global batch, is dropped. The sampler holds no position: a second iteration gives
    the same indices, and a run resumed at `start` continues as if it had never stopped.

    size: number of images.
    order: draws a permutation of them from a generator.
    """

    size: int
    order: Callable[[Generator], Int[Tensor, "n"]]
    batch_size: int
    accumulate: int
    rank: int
    world_size: int
    seed: int
    start: int
    total: int

    def __len__(self) -> int:
        return self.total

    def epoch(self, number: int) -> Int[Tensor, "n"]:
        """Return the permutation of epoch `number`, 0 the first."""
        return self.order(generator(self.seed, "order", number))

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.size // self.batch_size
        share = self.batch_size // (self.accumulate * self.world_size)
        current, order = -1, torch.empty(0, dtype=torch.long)
        for position in range(self.start, self.total):
            step, micro = divmod(position, self.accumulate)
            epoch, batch = divmod(step, per_epoch)
            if epoch != current:
                current, order = epoch, self.epoch(epoch)
            first = batch * self.batch_size + (micro * self.world_size + self.rank) * share
            yield order[first : first + share].tolist()
