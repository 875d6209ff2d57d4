"""Images held in memory, decoded."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int64, UInt8
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from consistency.data.encoded import in_threads
from consistency.data.source import Image, Source


class Held:
    """Images (n, c, h, w), grey values 0 ... 255, and their class indices; class_names is empty without classes."""

    def __init__(
        self,
        images: UInt8[Tensor, "n c h w"],
        labels: Int64[Tensor, "n"],
        class_names: Sequence[str] = (),
    ) -> None:
        self.images, self.labels, self.class_names = images, labels, list(class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.images[index], int(self.labels[index])

    def batch(
        self, indices: Sequence[int] | Int64[Tensor, "b"]
    ) -> tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, "b"]]:
        """Images and class indices of many samples at once."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[chosen], self.labels[chosen]

    def stamp(self, index: int) -> bytes:
        """What changes when the image does: its pixels."""
        return self.images[index].numpy().tobytes()


def kept(source: Callable[[], Source], in_memory: bool) -> Callable[[], Source]:
    """The same source, decoded once and held in memory where `in_memory` says so."""
    return (lambda: hold(source())) if in_memory else source


def hold(source: Source) -> Source:
    """Every image of a source, decoded by as many threads as there are cores; a source already held is returned."""
    if hasattr(source, "batch"):
        return source
    images = torch.empty((len(source), *source[0][0].shape), dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64)

    def place(index: int) -> None:
        images[index], labels[index] = source[index]

    in_threads(place, len(source), "decoding")
    _tell(f"held in memory: {len(source):,} images, {images.nbytes / 2**20:,.0f} MiB")
    return Held(images, labels, getattr(source, "class_names", ()))


@rank_zero_only
def _tell(line: str) -> None:
    print(line)
