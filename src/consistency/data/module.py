"""The one LightningDataModule: any source of images, in an order that depends on position alone."""

from collections.abc import Callable

import lightning as L
import torch
from jaxtyping import UInt8
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from consistency.data.batches import PositionedBatches
from consistency.data.source import Source
from consistency.errors import require
from consistency.tensors import Data


def to_unit(images: UInt8[Tensor, "b c h w"]) -> Data:
    """Grey values 0 ... 255 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Data) -> UInt8[Tensor, "b c h w"]:
    """[-1, 1] -> the nearest of the grey values 0 ... 255, on the CPU."""
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).cpu()


class DataModule(L.LightningDataModule):
    """Training batches (uint8 images, class indices) from a source.

    source: builds the training images (called once, when training starts); held_out: builds images kept from training,
    or None. batch_size: images per optimizer step over all devices; device_batch_size: images a device holds at once,
    None for as many as the batch needs. flip: mirror every image left to right with probability 1/2.
    num_classes: number of classes a conditional model is told, None for an unconditional one.
    """

    def __init__(
        self,
        *,
        source: Callable[[], Source],
        held_out: Callable[[], Source] | None,
        image_size: int,
        channels: int,
        num_classes: int | None,
        batch_size: int,
        device_batch_size: int | None,
        num_workers: int,
        flip: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.image_size, self.channels, self.num_classes = image_size, channels, num_classes
        self.batch_size, self.device_batch_size = batch_size, device_batch_size
        self.num_workers, self.flip, self.seed = num_workers, flip, seed
        require(
            batch_size >= 1, "data.batch_size >= 1", batch_size, "give a positive number of images"
        )
        require(num_workers >= 0, "data.num_workers >= 0", num_workers, "give 0 or more")
        self.train_source = source()
        self.held_out = held_out() if held_out is not None else None
        require(
            len(self.train_source) >= batch_size,
            f"at least one batch of data.batch_size={batch_size} images",
            f"{len(self.train_source)} images",
            "lower data.batch_size or add images",
        )
        image, label = self.train_source[0]
        require(
            tuple(image.shape) == (channels, image_size, image_size),
            f"images of {channels} channels and {image_size}x{image_size} pixels",
            f"a first image of shape {tuple(image.shape)}",
            "set data.channels and data.image_size to the images, or prepare the images",
        )
        if num_classes is not None:
            require(
                0 <= label < num_classes,
                f"class indices below data.num_classes={num_classes}",
                f"class index {label}",
                "set data.num_classes to the number of classes, or to null for a model without classes",
            )

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step on `world_size` devices."""
        device_batch = self.device_batch_size or self.batch_size // world_size
        whole = device_batch >= 1 and self.batch_size % (device_batch * world_size) == 0
        require(
            whole,
            f"data.batch_size={self.batch_size} to be a multiple of devices x data.device_batch_size",
            f"{world_size} devices x {device_batch} images",
            "change one of data.batch_size, data.device_batch_size, trainer.devices",
        )
        return self.batch_size // (device_batch * world_size)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches from the trainer's present position up to its last step."""
        assert self.trainer is not None
        accumulate = self.trainer.accumulate_grad_batches
        batches = PositionedBatches(
            size=len(self.train_source),
            batch_size=self.batch_size,
            accumulate=accumulate,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            seed=self.seed,
            start=self.trainer.fit_loop.epoch_loop.batch_progress.current.ready,
            total=self.trainer.max_steps * accumulate,
        )
        return DataLoader(
            self.train_source,  # type: ignore[arg-type]  # any sequence serves
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def augmented(self, images: UInt8[Tensor, "b c h w"], draw: Generator) -> Data:
        """The batch in [-1, 1], mirrored where the generator says so."""
        x_0 = to_unit(images)
        if not self.flip:
            return x_0
        coin = torch.rand(len(x_0), generator=draw, device=draw.device) < 0.5
        return torch.where(coin[:, None, None, None], x_0.flip(-1), x_0)
