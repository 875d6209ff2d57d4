"""Images held in memory, decoded."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int64, UInt8
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from consistency.data.encoded import in_threads
from consistency.data.source import Classes, Image, Images, Source
from consistency.errors import require
from consistency.randomness import generator


class Held:
    """Images (n, c, h, w), grey values 0 ... 255, and their class indices; class_names is empty without classes."""

    def __init__(
        self,
        images: UInt8[Tensor, "n c h w"],
        labels: Int64[Tensor, "n"],
        class_names: Sequence[str] = (),
        left_out: int = 0,
    ) -> None:
        self.images, self.labels, self.class_names = images, labels, list(class_names)
        self.left_out = left_out

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: list[int]) -> tuple[Images, Classes]:
        """Images and class indices of many samples at once."""
        return self.images[indices], self.labels[indices]

    def stamp(self, index: int) -> bytes:
        """What changes when the image does: its pixels."""
        return self.images[index].numpy().tobytes()


def kept(source: Callable[[], Source], in_memory: bool) -> Callable[[], Source]:
    """The same source, decoded once and held in memory where `in_memory` says so."""
    return (lambda: hold(source())) if in_memory else source


def hold(source: Source) -> Source:
    """Every image of a source, decoded by as many threads as there are cores; a source already held is returned."""
    if isinstance(source, Held):
        return source
    shape = source[0][0].shape
    images = torch.empty((len(source), *shape), dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64)

    def place(index: int) -> None:
        image, labels[index] = source[index]
        require(
            image.shape == shape,
            f"images of one shape, {tuple(shape)} as the first",
            f"shape {tuple(image.shape)} of image number {index}",
            "prepare the images at one resolution and mode",
        )
        images[index] = image

    in_threads(place, len(source), "decoding")
    _tell(f"held in memory: {len(source):,} images, {images.nbytes / 2**20:,.0f} MiB")
    names: Sequence[str] = getattr(source, "class_names", ())
    left_out: int = getattr(source, "left_out", 0)
    return Held(images, labels, names, left_out)


def noise(*, count: int, channels: int, image_size: int, num_classes: int | None) -> Held:
    """`count` images of independent random grey values with random classes: to measure speed where no files are."""
    draw = generator(0, "images")
    shape = (count, channels, image_size, image_size)
    return Held(
        torch.randint(256, shape, generator=draw, dtype=torch.uint8),
        torch.randint(num_classes or 1, (count,), generator=draw),
    )


@rank_zero_only
def _tell(line: str) -> None:
    print(line)
