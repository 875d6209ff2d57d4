"""Images in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64, UInt8
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from consistency.data.parallel import in_threads
from consistency.data.source import Classes, Image, Images, Source
from consistency.errors import require
from consistency.randomness import generator


@dataclass(eq=False, repr=False)
class InMemory(Source):
    """Images (n, c, h, w) of grey values 0 ... 255, with their class indices."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, "n"]
    class_names: Sequence[str] = ()
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: list[int]) -> tuple[Images, Classes]:
        return self.images[indices], self.labels[indices]

    def stamp(self, index: int) -> bytes:
        """Return the pixels of an image."""
        return self.images[index].numpy().tobytes()


def load_into_memory(source: Source) -> InMemory:
    """Decode every image of a source, in as many threads as there are cores."""
    if isinstance(source, InMemory):
        return source
    shape = source[0][0].shape
    images = torch.empty((len(source), *shape), dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64)

    def load(index: int) -> None:
        image, labels[index] = source[index]
        got = f"shape {tuple(image.shape)} of image number {index}"
        remedy = "prepare the images at one resolution and mode"
        require(image.shape == shape, f"images of shape {tuple(shape)}, as the first", got, remedy)
        images[index] = image

    in_threads(load, len(source), "decoding")
    mebibytes = images.nbytes / 2**20
    rank_zero_only(print)(f"held in memory: {len(source):,} images, {mebibytes:,.0f} MiB")
    return InMemory(images, labels, source.class_names, source.left_out)


def noise(*, count: int, channels: int, image_size: int, num_classes: int | None) -> InMemory:
    """Draw `count` images of independent random grey values with random classes, to measure speed."""
    draw, shape = generator(0, "images"), (count, channels, image_size, image_size)
    images = torch.randint(256, shape, generator=draw, dtype=torch.uint8)
    return InMemory(images, torch.randint(num_classes or 1, (count,), generator=draw))
