"""MNIST and Fashion-MNIST in their original IDX files."""

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

from consistency.data.memory import Downloaded
from consistency.data.source import Classes, Images
from consistency.errors import UserError, require

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
MOST_BYTES = 1 << 30


class MNIST(Downloaded):
    """70,000 handwritten digits, 28x28 grey, 10 classes [LeCun et al. 1998]; 60,000 to train on, 10,000 to test.

    Its four files are train- and t10k-images-idx3-ubyte, -labels-idx1-ubyte, with or without .gz.
    """

    origin: ClassVar[type[datasets.MNIST]] = datasets.MNIST
    home, train, test = "MNIST/raw", ["train"], ["t10k"]
    marks, class_names = [f"train-{IMAGES}", f"train-{IMAGES}.gz"], origin.classes

    def download(self, root: Path) -> None:
        self.origin(root, download=True)

    def sources(self) -> list[str]:
        return [f"{self.origin.mirrors[0]}{file}" for file, _ in self.origin.resources]

    def read(self, folder: Path, part: str) -> tuple[Images, Classes]:
        images = read_idx(folder, f"{part}-{IMAGES}", 3)
        labels = read_idx(folder, f"{part}-{LABELS}", 1)
        got = f"{len(images):,} images and {len(labels):,} labels"
        expected = f"as many images as labels in {folder}/{part}-*"
        require(len(images) == len(labels) > 0, expected, got, "get both files again")
        return images[:, None], labels.long()


class FashionMNIST(MNIST):
    """70,000 pictures of clothes in the form of MNIST [Xiao et al. 2017, arXiv:1708.07747]."""

    origin, home = datasets.FashionMNIST, "FashionMNIST/raw"
    class_names = origin.classes


def read_idx(folder: Path, name: str, axes: int) -> UInt8[Tensor, "..."]:
    """Read an IDX file of bytes with so many axes, compressed or not."""
    plain, packed = folder / name, folder / f"{name}.gz"
    file = plain if plain.is_file() else packed
    try:
        with gzip.open(file) if file == packed else file.open("rb") as stream:
            head = stream.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes((0, 0, 8, axes)):
                raise ValueError(f"it starts with {head[:4].hex() or 'nothing'}")
            shape = np.frombuffer(head, ">u4", axes, 4).tolist()
            size = math.prod(shape)
            if size > MOST_BYTES:
                raise ValueError(f"it announces {size:,} bytes")
            content = stream.read(size + 1)  # a compressed file may go on for ever
            if len(content) != size:
                more = "more than " if len(content) > size else ""
                raise ValueError(f"{more}{min(len(content), size):,} bytes for shape {shape}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        got = f"a file that cannot be read ({error})"
        raise UserError(f"an IDX file of bytes at {file}", got, "get the file again") from error
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())
