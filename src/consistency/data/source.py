"""The interface of a source of images: a map-style data set of (uint8 image, class index)."""

import socket
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Int, UInt8
from torch import Generator, Tensor

from consistency.errors import UserError, require
from consistency.runtime.files import path_of

Image: TypeAlias = UInt8[Tensor, "c h w"]
Images: TypeAlias = UInt8[Tensor, "b c h w"]
Classes: TypeAlias = Int[Tensor, "b"]
Split: TypeAlias = Literal["train", "test", "all"]

PATIENCE = 30.0  # seconds without an answer after which a download fails


class Source(ABC):
    """Base of all sources. Item i is (image, class index); the class index is 0 without classes.

    Only `__len__` and `__getitem__` are needed.

    class_names: names of the classes in the order of their indices; empty without classes.
    left_out: number of images left out because they cannot be used.
    """

    class_names: Sequence[str] = ()
    left_out: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image, int]: ...

    def batch(self, indices: list[int]) -> tuple[Images, Classes]:
        """Return the images and class indices (int64) of `indices`, stacked in their order."""
        images, classes = zip(*(self[index] for index in indices), strict=True)
        return torch.stack(images), torch.tensor(classes, dtype=torch.long)

    def order(self, draw: Generator) -> Int[Tensor, "n"]:
        """Draw a permutation of all indices, a function of the generator's state alone."""
        return torch.randperm(len(self), generator=draw)

    def name_of(self, index: int) -> str:
        """Return the name of an image for messages."""
        return f"#{index}"

    def stamp(self, index: int) -> bytes:
        """Return bytes that change whenever the stored image does; empty if that is unknown."""
        return b""


def require_split(split: str) -> None:
    """Refuse a split that no data set in memory has."""
    require(split in get_args(Split), "split=train, test or all", split, "choose one")


def required_path(path: str | None, expected: str, *, exists: bool = True) -> Path:
    """Return data.path, which holds what is `expected`; refuse null and, if `exists`, a missing file or folder."""
    require(path is not None, f"{expected} in data.path", "data.path=null", "add data.path=<path>")
    file = path_of(str(path))
    if exists:
        require_existing(file, f"{expected} at data.path={file}")
    return file


def require_existing(file: Path, expected: str) -> None:
    """Refuse a missing file or folder."""
    remedy = "check the path; a relative one starts at the folder the command runs in"
    require(file.exists(), expected, "missing", remedy)


@contextmanager
def downloading(needed: str, remedy: str) -> Iterator[None]:
    """Download what is `needed` in the body, with a time limit for answers; if that fails, name the remedy."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    except (OSError, RuntimeError, ValueError, tarfile.TarError) as error:
        last_line = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        got = f"no such file, and the download failed ({last_line})"
        raise UserError(needed, got, remedy) from error
    finally:
        socket.setdefaulttimeout(before)
