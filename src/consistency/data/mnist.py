"""MNIST and Fashion-MNIST: IDX files, downloaded by torchvision if they are missing."""

import gzip
import math
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision import datasets

from consistency.data.download import find_or_download
from consistency.data.memory import InMemory
from consistency.data.source import Split, require_split, required_path
from consistency.errors import UserError, require

PREFIXES = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
MOST_BYTES = 1 << 30


class MNIST(InMemory):
    """70,000 handwritten digits, 28x28 grey, 10 classes [LeCun et al. 1998]; 60,000 to train on, 10,000 to test.

    path: the folder of the four files (train- and t10k-images-idx3-ubyte, -labels-idx1-ubyte, with or without
        .gz), or the folder that torchvision put them below.
    split: train, test or all.
    download: whether torchvision downloads missing files.
    """

    origin: ClassVar[type[datasets.MNIST]] = datasets.MNIST

    def __init__(self, *, path: str | None, split: Split, download: bool = False) -> None:
        require_split(split)
        root, name = required_path(path, "a folder", exists=False), self.origin.__name__
        folder = find_or_download(
            root,
            lambda root: idx_folder(root, name),
            lambda root: self.origin(root, download=True),
            allowed=download,
            needed=f"{root / name / 'raw'}/{PREFIXES[split][0]}-{IMAGES} and its three companions",
            sources=[f"{self.origin.mirrors[0]}{file}" for file, _ in self.origin.resources],
        )
        images, labels = read_idx(folder, split)
        super().__init__(images, labels, self.origin.classes)


class FashionMNIST(MNIST):
    """70,000 pictures of clothes in the form of MNIST [Xiao et al. 2017, arXiv:1708.07747]."""

    origin = datasets.FashionMNIST


def idx_folder(root: Path, name: str | None = None) -> Path | None:
    """Return the folder of the IDX files: `root` itself, or torchvision's <root>/<name>/raw."""
    choices = [root, root / "raw", *([root / name / "raw"] if name else [])]
    first = f"train-{IMAGES}"
    return next(
        (f for f in choices if any((f / n).is_file() for n in (first, f"{first}.gz"))), None
    )


def read_idx(folder: Path, split: Split) -> tuple[UInt8[Tensor, "n 1 h w"], Tensor]:
    """Read images and class indices of a split."""
    parts = []
    for prefix in PREFIXES[split]:
        images = read_idx_file(folder, f"{prefix}-{IMAGES}", 3)
        labels = read_idx_file(folder, f"{prefix}-{LABELS}", 1)
        require(
            len(images) == len(labels) > 0,
            f"as many images as labels in {folder}/{prefix}-*",
            f"{len(images):,} images and {len(labels):,} labels",
            "get both files again",
        )
        parts.append((images, labels))
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return images[:, None], labels.long()


def read_idx_file(folder: Path, name: str, axes: int) -> UInt8[Tensor, "..."]:
    """Read an IDX file of bytes with so many axes, compressed or not."""
    plain, packed = folder / name, folder / f"{name}.gz"
    file = plain if plain.is_file() else packed
    try:
        with gzip.open(file) if file == packed else file.open("rb") as stream:
            head = stream.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes((0, 0, 8, axes)):
                raise _bad(file, f"a file that starts with {head[:4].hex() or 'nothing'}")
            shape = tuple(int(n) for n in np.frombuffer(head, ">u4", axes, 4))
            size = math.prod(shape)
            if size > MOST_BYTES:
                raise _bad(file, f"one that announces {size:,} bytes")
            content = stream.read(size + 1)  # a compressed file may go on for ever
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(file, f"a file that cannot be read ({error})") from error
    if len(content) != size:
        more = "more than " if len(content) > size else ""
        raise _bad(file, f"{more}{min(len(content), size):,} bytes for shape {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())


def _bad(file: Path, got: str) -> UserError:
    return UserError(f"an IDX file of bytes at {file}", got, "get the file again")
