"""What a source of images is: a map-style data set of (uint8 image, class index)."""

from typing import Protocol, TypeAlias, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor

Image: TypeAlias = UInt8[Tensor, "c h w"]


@runtime_checkable
class Source(Protocol):
    """Item i is (image, class index); the class index is 0 where there are no classes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image, int]: ...
