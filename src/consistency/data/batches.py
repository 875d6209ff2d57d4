"""Batches: their order as a function of the global position, and those of a foreign loader."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler

from consistency.data.source import Source
from consistency.errors import require
from consistency.pixels import to_unit
from consistency.randomness import generator
from consistency.tensors import Data, Label

ROUNDING = 1e-4


class BatchSplit(NamedTuple):
    """A global batch as devices x images a device holds at once x micro-batches accumulated."""

    devices: int
    images: int
    accumulated: int

    def __str__(self) -> str:
        many = "s" * (self.devices > 1)
        return (
            f"{self.devices} device{many} x {self.images} images x {self.accumulated} accumulated"
        )


@dataclass(eq=False, repr=False)
class PositionedBatches(Sampler[list[int]]):
    """Index lists of the micro-batches number start ... total-1 of one rank, the same in every iteration.

    Every epoch is a fresh permutation of the source, a function of (seed, epoch); a global batch is a run of entries of
    it, cut into micro-batches, each cut into the shares of the devices. The rest of an epoch, less than one global
    batch, is dropped.
    """

    source: Source
    split: BatchSplit
    rank: int
    seed: int
    start: int
    total: int

    def __len__(self) -> int:
        return self.total

    def epoch(self, number: int) -> Int[Tensor, "n"]:
        """Return the permutation of epoch `number`, 0 the first."""
        return self.source.order(generator(self.seed, "order", number))

    def __iter__(self) -> Iterator[list[int]]:
        devices, share, accumulated = self.split
        per_epoch = len(self.source) // math.prod(self.split)
        current, order = -1, torch.empty(0, dtype=torch.long)
        for position in range(self.start, self.total):
            step, micro = divmod(position, accumulated)
            epoch, batch = divmod(step, per_epoch)
            if epoch != current:
                current, order = epoch, self.epoch(epoch)
            first = ((batch * accumulated + micro) * devices + self.rank) * share
            yield order[first : first + share].tolist()


def unpack_batch(
    batch: Any, *, shape: tuple[int, ...] | None, num_classes: int | None
) -> tuple[Data, Label]:
    """Return images and labels of a foreign loader's batch: (images, labels), (images,), or images alone.

    Images of uint8 are scaled; float ones must be in [-1, 1]. Labels are integers below `num_classes`; without
    classes they are ignored. `shape` is that of an image, if it is known.
    """
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    expected = "batches (images, labels): images uint8, or float within [-1, 1], of shape (batch, channels, height, width)"
    got = f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in parts)}"
    remedy = "give a loader of TensorDataset(images, labels), or of a Dataset whose items are (image, label)"
    require(len(parts) in (1, 2) and isinstance(parts[0], Tensor), expected, got, remedy)
    images = parts[0]
    fits = images.ndim == 4 and shape in (None, tuple(images.shape[1:]))
    axes = ", ".join(map(str, shape or ("channels", "height", "width")))
    got = f"{images.dtype} of shape {tuple(images.shape)}"
    remedy = "change the loader, or build the module for these images: data.channels=, data.image_size=, model="
    require(fits, f"images of shape (batch, {axes})", got, remedy)
    labels = parts[1] if parts[1:] else None
    classes = None if num_classes is None else _classes(labels, len(images), num_classes)
    return _in_unit(images), classes


def _in_unit(images: Tensor) -> Data:
    if images.dtype == torch.uint8:
        return to_unit(images)
    floating, (low, high) = images.is_floating_point(), torch.stack(torch.aminmax(images)).tolist()
    got = f"values from {low:.4g} to {high:.4g}" if floating else f"images of {images.dtype}"
    fits = floating and -1 - ROUNDING <= low <= high <= 1 + ROUNDING
    remedy = "give images.to(torch.uint8), or scale them: x / 127.5 - 1 from 0 ... 255, 2 * x - 1 from 0 ... 1"
    require(fits, "images of uint8 from 0 to 255, or of float within [-1, 1]", got, remedy)
    return images.float()


def _classes(labels: Any, count: int, num_classes: int) -> Label:
    got, fits = "none" if labels is None else type(labels).__name__, False
    if isinstance(labels, Tensor):
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        whole = torch.can_cast(labels.dtype, torch.long) and labels.dtype != torch.bool
        if whole and tuple(labels.shape) == (count,):
            low, high = torch.stack(torch.aminmax(labels)).tolist()
            got, fits = f"labels from {low} to {high}", 0 <= low and high < num_classes
    expected = f"{count} labels, integers from 0 to {num_classes - 1}, for a model of {num_classes} classes"
    remedy = "give them, from 0, or set data.num_classes; null builds the module without classes"
    require(fits, expected, got, remedy)
    return labels.long()
