"""The order of the data as a function of the global position of a batch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from consistency.randomness import generator


class PositionedBatches(Sampler[list[int]]):
    """Index lists of the micro-batches number start ... total-1 of one rank.

    Every epoch is a fresh permutation of the set, a function of (seed, epoch); a global batch is a run of
    `batch_size` entries of it, cut into `accumulate` micro-batches, each cut into `world_size` shares. What remains at
    the end of an epoch, less than one global batch, is dropped. The sampler holds no position: asking it twice gives
    the same indices, and a run resumed at `start` goes on as if it had never stopped.
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
    ) -> None:
        self.size, self.batch_size, self.accumulate = size, batch_size, accumulate
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start, self.total = start, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.size // self.batch_size
        share = self.batch_size // (self.accumulate * self.world_size)
        drawn, order = -1, torch.empty(0)
        for position in range(self.start, self.total):
            step, micro = divmod(position, self.accumulate)
            epoch, batch = divmod(step, per_epoch)
            if epoch != drawn:
                draw = generator(self.seed, "order", epoch)
                drawn, order = epoch, torch.randperm(self.size, generator=draw)
            first = batch * self.batch_size + (micro * self.world_size + self.rank) * share
            yield order[first : first + share].tolist()
