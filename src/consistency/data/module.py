"""The LightningDataModule: any source of images, in an order that depends on position alone; batches of foreign loaders."""

import hashlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Sampler

from consistency.data.memory import load_into_memory
from consistency.data.source import Classes, Items, Source
from consistency.errors import require
from consistency.pixels import to_unit
from consistency.randomness import WHOLE, Share, generator
from consistency.runtime.signals import die_with
from consistency.tensors import Data, Label

ROUNDING = 1e-4
SECONDS_AFTER_SIGTERM = 60


class BatchSplit(NamedTuple):
    """A global batch as devices x images a device holds at once x micro-batches accumulated."""

    devices: int
    images: int
    accumulated: int

    def __str__(self) -> str:
        devices = f"{self.devices} device{'s' * (self.devices > 1)}"
        return f"{devices} x {self.images} images x {self.accumulated} accumulated"


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

    def __iter__(self) -> Iterator[list[int]]:
        devices, share, accumulated = self.split
        per_epoch = len(self.source) // math.prod(self.split)
        current, order = -1, torch.empty(0, dtype=torch.long)
        for position in range(self.start, self.total):
            step, micro = divmod(position, accumulated)
            epoch, batch = divmod(step, per_epoch)
            if epoch != current:
                current, order = epoch, self.source.order(generator(self.seed, "order", epoch))
            first = ((batch * accumulated + micro) * devices + self.rank) * share
            yield order[first : first + share].tolist()


def _init_worker(parent: int, worker: int) -> None:
    """Let a worker die with its parent, but ignore signals to the whole process group, so that the step can finish."""
    die_with(parent)
    if os.name == "posix":
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(L.LightningDataModule):
    """Training batches (uint8 images, class indices) from a source. Pixels are only scaled, never dequantised by noise.

    source, held_out: build the images for training, and others kept from it; `seed` is that of the order.

    The other arguments are those of `consistency.commands.schema.Data`.
    """

    source: InitVar[Callable[[], Source]]
    held_out: Callable[[], Source] | None
    image_size: int
    channels: int
    num_classes: int | None
    batch_size: int
    device_batch_size: int | None
    num_workers: int
    flip: bool
    seed: int
    in_memory: bool = False
    allow_reorder: bool = False

    def __post_init__(self, source: Callable[[], Source]) -> None:
        super().__init__()
        self._saved_accumulation: int | None = None
        size, workers, classes = self.batch_size, self.num_workers, self.num_classes
        require(size >= 1, "data.batch_size >= 1", size, "give a number of images")
        require(workers >= 0, "data.num_workers >= 0", workers, "give 0 or more")
        images, expected = source(), "a consistency.data.source.Source at data.source"
        remedy = "derive the class from Source, which needs only __len__ and __getitem__"
        require(isinstance(images, Source), expected, type(images).__name__, remedy)
        self.train_source = load_into_memory(images) if self.in_memory else images
        expected = f"at least one batch of data.batch_size={size} images"
        remedy = "lower data.batch_size or add images"
        require(len(images) >= size, expected, f"{len(images)} images", remedy)
        shape, label, side = self.train_source.shape, self.train_source[0][1], self.image_size
        expected = f"images of {self.channels} channels and {side}x{side} pixels"
        expected += "" if classes is None else f", class indices below data.num_classes={classes}"
        got = f"a first image of shape {shape}, class index {label}"
        remedy = "set data.channels, data.image_size and data.num_classes to the images, or prepare the images"
        known = classes is None or 0 <= label < classes
        require(known and shape == (self.channels, side, side), expected, got, remedy)

    def split(self, world_size: int) -> BatchSplit:
        """Split a batch over devices in equal shares; a device holds the largest divisor of its share that is allowed."""
        at_most, size = self.device_batch_size, self.batch_size
        valid = at_most is None or at_most >= 1
        require(valid, "data.device_batch_size >= 1, or null", at_most, "give a number of images")
        expected = f"data.batch_size to be a multiple of the {world_size} devices"
        remedy = "change data.batch_size or trainer.devices"
        require(size % world_size == 0, expected, f"data.batch_size={size}", remedy)
        share = size // world_size
        bound = min(at_most or share, share)
        images = next(count for count in range(bound, 0, -1) if share % count == 0)
        return BatchSplit(world_size, images, share // images)

    def summary(self, world_size: int) -> str:
        """Return lines for the start of a run: the split of a batch, the images an epoch leaves out, the autoencoder."""
        count = len(self.train_source)
        batches, dropped = divmod(count, self.batch_size)
        rest = f"the {dropped} that remain are left out, other ones in each"
        epoch = f"{count} images = {batches} batches, {rest if dropped else 'none left out'}"
        lines = [f"Batch: {self.batch_size} = {self.split(world_size)}", f"Epoch: {epoch}"]
        if (space := self.train_source.latents) is not None:
            origin = (
                f"{space.autoencoder}, sha256 {str(space.sha256)[:12]}, scaling {space.scaling}"
            )
            lines.append(f"Latents of {origin}")
        return "\n".join(lines)

    def batches(
        self, *, split: BatchSplit, rank: int = 0, start: int = 0, total: int = 0
    ) -> PositionedBatches:
        """Return the index lists of the micro-batches start ... total-1 of one rank."""
        return PositionedBatches(self.train_source, split, rank, self.seed, start, total)

    def loader(
        self, batches: PositionedBatches, *, pin_memory: bool = False
    ) -> DataLoader[tuple[Items, Classes]]:
        """Return a loader of the batches (uint8 images, int64 class indices) at the index lists of `batches`."""
        return DataLoader(
            range(len(self.train_source)),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self.train_source.batch,  # many sources read a batch faster than single images
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=partial(_init_worker, os.getpid()),
        )

    def train_dataloader(self) -> DataLoader[tuple[Items, Classes]]:
        """Return the batches from the trainer's present position up to its last step."""
        trainer = self.trainer
        assert trainer is not None
        split = self.split(trainer.world_size)
        self._translate_position(split.accumulated)
        start = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        total = trainer.max_steps * split.accumulated
        batches = self.batches(split=split, rank=trainer.global_rank, start=start, total=total)
        return self.loader(batches, pin_memory=trainer.strategy.root_device.type == "cuda")

    @cached_property
    def order(self) -> str:
        """A digest of the order of the images, the same for any number of devices and workers."""
        first = self.train_source.order(generator(self.seed, "order", 0)).numpy().tobytes()
        settings = str((self.seed, self.batch_size)).encode()
        return hashlib.blake2b(first + settings, digest_size=16).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the order and split of the data, for a resumed run; the trainer saves the position itself."""
        assert self.trainer is not None
        return {
            "order": self.order,
            "images": len(self.train_source),
            "batch_size": self.batch_size,
            "accumulation": self.trainer.accumulate_grad_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to continue in another order, unless that is allowed."""
        same = state_dict["order"] == self.order
        before = f"{state_dict['images']} images in batches of {state_dict['batch_size']}"
        now = f"{len(self.train_source)} images in batches of {self.batch_size}"
        expected = f"the images in the order that the run began with ({before})"
        remedy = "give the same data, shards, seed and data.batch_size, or data.allow_reorder=true"
        require(same or self.allow_reorder, expected, f"another order ({now})", remedy)
        if not same:
            change = f"The data come in another order than before: {before}; now {now}."
            rank_zero_only(print)(change)
        self._saved_accumulation = state_dict["accumulation"]

    def _translate_position(self, accumulation: int) -> None:
        """Translate the position after a resume with another number of devices, in micro-batches as Lightning counts it.

        Checkpoints are written between steps only, so the count is a multiple of `accumulation`.
        """
        assert self.trainer is not None
        before, self._saved_accumulation = self._saved_accumulation, None
        if before is None or before == accumulation:
            return
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        for count in (progress.current, progress.total):
            unfinished = count.processed - count.completed
            position = count.ready // before * accumulation
            count.ready = count.started = count.processed = position
            count.completed = position - unfinished

    def augmented(self, images: Items, draw: Generator, share: Share = WHOLE) -> Data:
        """Return x_0 of a batch, `share` of the optimizer step's: images in [-1, 1], mirrored at random, or latents."""
        return self.train_source.training_data(images, draw, share, flip=self.flip)


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
