"""The order of the data as a function of the global position of a batch."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Generator, Tensor
from torch.utils.data import Sampler

from consistency.errors import require
from consistency.randomness import generator


class Split(NamedTuple):
    """How a global batch is cut: devices x images a device holds at once x micro-batches accumulated."""

    devices: int
    images: int
    accumulated: int

    def __str__(self) -> str:
        devices = f"{self.devices} device" + "s" * (self.devices > 1)
        return f"{devices} x {self.images} images x {self.accumulated} accumulated"


def split(batch_size: int, *, devices: int, at_most: int | None) -> Split:
    """Cuts `batch_size` images over `devices`, each holding as many at once as divide its share and are at most
    `at_most` (None: its whole share). Raises UserError where the shares of the devices cannot be equal.
    """
    require(
        at_most is None or at_most >= 1,
        "data.device_batch_size >= 1, or null",
        at_most,
        "give the number of images that a device holds at once",
    )
    require(
        batch_size % devices == 0,
        f"data.batch_size to be a multiple of the {devices} devices",
        f"data.batch_size={batch_size}",
        "change data.batch_size or trainer.devices",
    )
    share = batch_size // devices
    bound = share if at_most is None else min(at_most, share)
    images = next(size for size in range(bound, 0, -1) if share % size == 0)
    return Split(devices, images, share // images)


def shuffled(size: int) -> Callable[[Generator], Int[Tensor, "n"]]:
    """The order of a source without wishes: every permutation of `size` images is equally likely."""
    return lambda draw: torch.randperm(size, generator=draw)


class PositionedBatches(Sampler[list[int]]):
    """Index lists of the micro-batches number start ... total-1 of one rank.

    Every epoch is a fresh permutation of the set, a function of (seed, epoch); a global batch is a run of
    `batch_size` entries of it, cut into `accumulate` micro-batches, each cut into `world_size` shares. What remains at
    the end of an epoch, less than one global batch, is dropped. The sampler holds no position: asking it twice gives
    the same indices, and a run resumed at `start` goes on as if it had never stopped. order: draws the permutation
    from a generator; None for a uniform one.
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        start: int,
        total: int,
        order: Callable[[Generator], Int[Tensor, "n"]] | None = None,
    ) -> None:
        self.size, self.batch_size, self.accumulate = size, batch_size, accumulate
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start, self.total = start, total
        self.order = order or shuffled(size)

    def __len__(self) -> int:
        return self.total

    def epoch(self, number: int) -> Int[Tensor, "n"]:
        """The permutation of epoch `number`, 0 the first."""
        return self.order(generator(self.seed, "order", number))

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.size // self.batch_size
        share = self.batch_size // (self.accumulate * self.world_size)
        drawn, order = -1, torch.empty(0, dtype=torch.long)
        for position in range(self.start, self.total):
            step, micro = divmod(position, self.accumulate)
            epoch, batch = divmod(step, per_epoch)
            if epoch != drawn:
                drawn, order = epoch, self.epoch(epoch)
            first = batch * self.batch_size + (micro * self.world_size + self.rank) * share
            yield order[first : first + share].tolist()
