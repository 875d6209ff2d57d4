"""MNIST and Fashion-MNIST: IDX files, downloaded by torchvision where they are not there."""

import gzip
import math
import zlib
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision import datasets

from consistency.data.download import fetched
from consistency.data.held import Held
from consistency.errors import UserError, require
from consistency.paths import path_of

Split: TypeAlias = Literal["train", "test", "all"]
PREFIXES = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
MOST_BYTES = 1 << 30


class MNIST(Held):
    """70,000 handwritten digits, 28x28 grey, 10 classes [LeCun et al. 1998]; 60,000 to train on, 10,000 to test.

    path: the folder that holds the four files (train- and t10k-images-idx3-ubyte, -labels-idx1-ubyte, with or without
    .gz), or where torchvision put them. With `download` torchvision fetches them if they are not there.
    """

    origin: ClassVar[type[datasets.MNIST]] = datasets.MNIST

    def __init__(self, *, path: str | None, split: Split, download: bool = False) -> None:
        require(split in PREFIXES, "split train, test or all", split, "choose one")
        require(
            path is not None, "a folder in data.path", "data.path=null", "add data.path=<folder>"
        )
        root = path_of(str(path))
        name = self.origin.__name__
        found = idx_folder(root, name)
        if found is None:
            needed = f"{root / name / 'raw'}/{PREFIXES[split][0]}-{IMAGES} and its three companions"
            sources = [f"{self.origin.mirrors[0]}{file}" for file, _ in self.origin.resources]
            fetched(
                root,
                lambda folder: self.origin(folder, download=True),
                allowed=download,
                needed=needed,
                sources=sources,
            )
            found = idx_folder(root, name)
        assert found is not None
        images, labels = read_idx(found, split)
        super().__init__(images, labels, self.origin.classes)


class FashionMNIST(MNIST):
    """70,000 pictures of clothes in the form of MNIST [Xiao et al. 2017, arXiv:1708.07747]."""

    origin = datasets.FashionMNIST


def idx_folder(root: Path, name: str | None = None) -> Path | None:
    """Where the IDX files are: `root` itself, or torchvision's <root>/<name>/raw."""
    choices = [root, root / "raw", *([root / name / "raw"] if name else [])]
    first = f"train-{IMAGES}"
    return next(
        (f for f in choices if any((f / n).is_file() for n in (first, f"{first}.gz"))), None
    )


def read_idx(folder: Path, split: Split) -> tuple[UInt8[Tensor, "n 1 h w"], Tensor]:
    """Images and class indices of a split."""
    parts = []
    for prefix in PREFIXES[split]:
        images = read_idx_file(folder, f"{prefix}-{IMAGES}", 3)
        labels = read_idx_file(folder, f"{prefix}-{LABELS}", 1)
        require(
            len(images) == len(labels) and len(images) > 0,
            f"as many images as labels in {folder}/{prefix}-*",
            f"{len(images):,} images and {len(labels):,} labels",
            "get both files again",
        )
        parts.append((images, labels))
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return images[:, None], labels.long()


def read_idx_file(folder: Path, name: str, axes: int) -> UInt8[Tensor, "..."]:
    """An IDX file of bytes with so many axes, packed or not."""
    plain, packed = folder / name, folder / f"{name}.gz"
    file = plain if plain.is_file() else packed
    try:
        with gzip.open(file) if file == packed else file.open("rb") as stream:
            head = stream.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes((0, 0, 8, axes)):
                raise _bad(file, f"a file that starts with {head[:4].hex() or 'nothing'}")
            shape = tuple(int(n) for n in np.frombuffer(head, ">u4", axes, 4))
            if math.prod(shape) > MOST_BYTES:
                raise _bad(file, f"one that announces {math.prod(shape):,} bytes")
            content = stream.read(math.prod(shape) + 1)  # a packed file may go on for ever
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(file, f"a file that cannot be read ({error})") from error
    if len(content) != math.prod(shape):
        more = "more than " if len(content) > math.prod(shape) else ""
        raise _bad(file, f"{more}{min(len(content), math.prod(shape)):,} bytes for shape {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())


def _bad(file: Path, got: str) -> UserError:
    return UserError(
        f"expected an IDX file of bytes at {file}\n  got: {got}\n  do: get the file again"
    )
