"""MNIST, Fashion-MNIST and CIFAR-10 in their original files, which torchvision downloads if they are missing."""

import gzip
import math
import tarfile
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import download_url

from consistency.checkpoints.pickle_reader import Machine
from consistency.data.download import locked, timeout
from consistency.data.memory import InMemory
from consistency.data.source import Classes, Images, Split, require_split, required_path
from consistency.errors import UserError, require

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
MOST_BYTES = 1 << 30
SHAPE = (3, 32, 32)
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


class Downloaded(InMemory):
    """Base of the sets in this file.

    path: the folder of the files, or the one below which torchvision puts them, in `home`.

    train, test: names of the parts of the splits.
    marks: files of which every copy of the set has one.
    """

    home: ClassVar[str]
    train: ClassVar[Sequence[str]]
    test: ClassVar[Sequence[str]]
    marks: ClassVar[Sequence[str]]
    classes: ClassVar[Sequence[str]]

    def __init__(self, *, path: str | None, split: Split, download: bool = False) -> None:
        require_split(split)
        root = required_path(path, "a folder", exists=False)
        folder = self.find(root)
        reason = "no such file" if download else "no such file, and data.download=false"
        if folder is None and download:
            try:
                root.mkdir(parents=True, exist_ok=True)
                with locked(root / ".download.lock"), timeout():
                    if self.find(root) is None:
                        self.download(root)
                folder = self.find(root)
            except (OSError, RuntimeError, ValueError, tarfile.TarError) as error:
                last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
                reason = f"no such file, and the download failed ({last_line})"
        if folder is None:
            needed = f"{root / self.home / self.marks[0]} and its companions (data.path={root})"
            remedy = "add data.download=true on a machine with a network, or put the files there"
            raise UserError(needed, reason, f"{remedy} from {', '.join(self.sources())}")
        names = {"train": self.train, "test": self.test, "all": [*self.train, *self.test]}[split]
        parts = [self.read(folder, name) for name in names]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        super().__init__(images, labels, self.classes)

    @classmethod
    def find(cls, root: Path) -> Path | None:
        """Return the folder of the files: `root` or one in it."""
        folders = (root, root / "raw", root / cls.home)
        return next((f for f in folders if any((f / name).is_file() for name in cls.marks)), None)

    @abstractmethod
    def download(self, root: Path) -> None: ...

    @abstractmethod
    def sources(self) -> list[str]: ...

    @abstractmethod
    def read(self, folder: Path, part: str) -> tuple[Images, Classes]: ...


class MNIST(Downloaded):
    """70,000 handwritten digits, 28x28 grey, 10 classes [LeCun et al. 1998]; 60,000 to train on, 10,000 to test.

    Its four files are train- and t10k-images-idx3-ubyte, -labels-idx1-ubyte, with or without .gz.
    """

    origin: ClassVar[type[datasets.MNIST]] = datasets.MNIST
    home, train, test = "MNIST/raw", ["train"], ["t10k"]
    marks, classes = [f"train-{IMAGES}", f"train-{IMAGES}.gz"], origin.classes

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
    classes = origin.classes


def read_idx(folder: Path, name: str, axes: int) -> UInt8[Tensor, "..."]:
    """Read an IDX file of bytes with so many axes, compressed or not."""
    plain, packed = folder / name, folder / f"{name}.gz"
    file = plain if plain.is_file() else packed

    def bad(got: str) -> UserError:
        return UserError(f"an IDX file of bytes at {file}", got, "get the file again")

    try:
        with gzip.open(file) if file == packed else file.open("rb") as stream:
            head = stream.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes((0, 0, 8, axes)):
                raise bad(f"a file that starts with {head[:4].hex() or 'nothing'}")
            shape = tuple(int(n) for n in np.frombuffer(head, ">u4", axes, 4))
            size = math.prod(shape)
            if size > MOST_BYTES:
                raise bad(f"one that announces {size:,} bytes")
            content = stream.read(size + 1)  # a compressed file may go on for ever
    except (OSError, EOFError, zlib.error) as error:
        raise bad(f"a file that cannot be read ({error})") from error
    if len(content) != size:
        more = "more than " if len(content) > size else ""
        raise bad(f"{more}{min(len(content), size):,} bytes for shape {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())


class CIFAR10(Downloaded):
    """60,000 colour images of 32x32 pixels, 10 classes [Krizhevsky 2009]; 50,000 to train on, 10,000 to test.

    Its files are Python pickles, which are read as data and never run.
    """

    home = datasets.CIFAR10.base_folder
    train = tuple(name for name, _ in datasets.CIFAR10.train_list)
    test = tuple(name for name, _ in datasets.CIFAR10.test_list)
    marks, classes = (*train, *test), CLASSES

    def download(self, root: Path) -> None:
        origin = datasets.CIFAR10
        download_url(origin.url, str(root), origin.filename, origin.tgz_md5)
        with tarfile.open(root / origin.filename) as archive:
            archive.extractall(root, filter="data")  # nothing outside of `root`
        if self.find(root) is None:
            raise ValueError(f"{origin.filename} holds no batches")

    def sources(self) -> list[str]:
        return [datasets.CIFAR10.url]

    def read(self, folder: Path, part: str) -> tuple[Images, Classes]:
        return read_batch(folder / part)


def read_batch(file: Path) -> tuple[UInt8[Tensor, "n 3 32 32"], Int64[Tensor, "n"]]:
    """Read images and class indices of one batch: the rows of b"data" are 1,024 red, green and blue values each."""
    try:
        content = file.read_bytes()
        table = Machine(len(content)).run(content)
        entries = {k.decode() if isinstance(k, bytes) else k: v for k, v in table.items()}
        rows, labels = entries["data"].state, entries["labels"]
        if rows.dtype != torch.uint8:
            raise ValueError(f"pixels of type {rows.dtype}")
        images = rows.reshape(-1, *SHAPE)
        known = all(type(label) is int and 0 <= label < len(CLASSES) for label in labels)
        if not known or len(labels) != len(images):
            raise ValueError(f"{len(images):,} images and other labels than as many classes")
    except Exception as error:  # a damaged pickle fails in any way
        got = f"a damaged or other file ({type(error).__name__}: {error})"
        remedy = f"get {datasets.CIFAR10.url} and unpack it there"
        raise UserError(f"a batch of CIFAR-10 at {file}", got, remedy) from error
    return images, torch.tensor(labels, dtype=torch.int64)
