"""Images held decoded in memory: the fastest source, for sets that fit."""

import torch
from tqdm import tqdm

from consistency.data.source import Classes, Image, Images, Source, batch_of
from consistency.errors import require
from consistency.randomness import generator

READ_AT_ONCE = 256


class Held:
    """All images of a source as one uint8 array: count x channels x height x width bytes in every process.

    images: (n, c, h, w); classes: (n,) int64.
    """

    def __init__(self, images: Images, classes: Classes) -> None:
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.images[index], int(self.classes[index])

    def batch(self, indices: list[int]) -> tuple[Images, Classes]:
        """Items `indices`, stacked."""
        return self.images[indices], self.classes[indices]


def hold(source: Source, *, show: bool = True) -> Held:
    """Decodes a whole source into memory, with a progress bar where `show`. Images of unequal shapes are a UserError."""
    count, first = len(source), source[0][0]
    images = torch.empty((count, *first.shape), dtype=torch.uint8)
    classes = torch.empty(count, dtype=torch.long)
    bar = tqdm(total=count, desc="Decoding into memory", unit="image", disable=not show)
    with bar:
        for start in range(0, count, READ_AT_ONCE):
            part = slice(start, min(start + READ_AT_ONCE, count))
            read, labels = batch_of(source, range(part.start, part.stop))
            require(
                read.shape[1:] == first.shape,
                f"images of one shape, {tuple(first.shape)} as the first",
                f"shape {tuple(read.shape[1:])} among images {part.start} to {part.stop - 1}",
                "prepare the images at one resolution and mode",
            )
            images[part], classes[part] = read, labels
            bar.update(len(read))
    return Held(images, classes)


def noise(*, count: int, channels: int, image_size: int, num_classes: int | None) -> Held:
    """`count` images of independent random grey values with random classes: to measure speed where no files are."""
    draw = generator(0, "images")
    shape = (count, channels, image_size, image_size)
    return Held(
        torch.randint(256, shape, generator=draw, dtype=torch.uint8),
        torch.randint(num_classes or 1, (count,), generator=draw),
    )
