"""What a source of images is: a map-style data set of (uint8 image, class index)."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Generator, Tensor

Image: TypeAlias = UInt8[Tensor, "c h w"]
Images: TypeAlias = UInt8[Tensor, "b c h w"]
Classes: TypeAlias = Int[Tensor, "b"]


@runtime_checkable
class Source(Protocol):
    """Item i is (image, class index); the class index is 0 where there are no classes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image, int]: ...


@runtime_checkable
class BatchedSource(Protocol):
    """A source that gives many items at once faster than one by one: `batch([i, j])` is items i and j, stacked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image, int]: ...

    def batch(self, indices: list[int]) -> tuple[Images, Classes]:
        """The images and class indices (int64) of `indices`, in their order."""
        ...


@runtime_checkable
class OrderedSource(Protocol):
    """A source that is read fastest in orders of its own choice."""

    def order(self, draw: Generator) -> Int[Tensor, "n"]:
        """A random permutation of all indices, a function of the generator's state alone."""
        ...


def batch_of(source: Source, indices: Sequence[int]) -> tuple[Images, Classes]:
    """Items `indices` of a source, stacked: (images, class indices as int64)."""
    if isinstance(source, BatchedSource):
        return source.batch(list(indices))
    images, classes = zip(*(source[index] for index in indices), strict=True)
    return torch.stack(images), torch.tensor(classes, dtype=torch.long)
