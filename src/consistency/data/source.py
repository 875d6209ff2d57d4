"""The interface of a source: a map-style data set of (uint8 image, class index), or of latents in the place of images."""

import socket
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Generator, Tensor

from consistency.errors import UserError, require
from consistency.inference.card import LatentSpace
from consistency.pixels import to_unit
from consistency.randomness import WHOLE, Share
from consistency.runtime.files import path_of
from consistency.tensors import Data

Image: TypeAlias = UInt8[Tensor, "c h w"]
Images: TypeAlias = UInt8[Tensor, "b c h w"]
Items: TypeAlias = Shaped[Tensor, "b k h w"]
"""Images, or what a source of latents stores in their place."""

Classes: TypeAlias = Int[Tensor, "b"]
Split: TypeAlias = Literal["train", "test", "all"]

PATIENCE = 30.0  # seconds without an answer after which a download fails


class Source(ABC):
    """Base of all sources. Item i is (image, class index); the class index is 0 without classes.

    Only `__len__` and `__getitem__` are needed.

    class_names: names of the classes in the order of their indices; empty without classes.
    left_out: number of images left out because they cannot be used.
    latents: of which autoencoder the items are latents; None for images.
    """

    class_names: Sequence[str] = ()
    left_out: int = 0
    latents: LatentSpace | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image, int]: ...

    def batch(self, indices: list[int]) -> tuple[Items, Classes]:
        """Return the images and class indices (int64) of `indices`, stacked in their order."""
        images, classes = zip(*(self[index] for index in indices), strict=True)
        return torch.stack(images), torch.tensor(classes, dtype=torch.long)

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of the training data."""
        return tuple(self[0][0].shape)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of the images, decoded ones of latents."""
        return self.shape

    def training_data(
        self, batch: Items, draw: Generator, share: Share = WHOLE, *, flip: bool = False
    ) -> Data:
        """Return x_0 of a batch of items, `share` of an optimizer step's: images in [-1, 1], mirrored at random if `flip`."""
        x_0 = to_unit(batch)
        if not flip:
            return x_0
        coin = torch.rand(share.parts * len(x_0), generator=draw, device=draw.device) < 0.5
        coin = coin[share.rows(len(x_0))]
        return torch.where(coin[:, None, None, None], x_0.flip(-1), x_0)

    def decoded(self, batch: Items) -> Images:
        """Return the images of a batch of items, on its device."""
        return batch

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
