"""CIFAR-10 in its original form: Python pickles, read as data and never run."""

import tarfile
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import download_url

from consistency.checkpoints.pickle_reader import Machine
from consistency.data.download import find_or_download
from consistency.data.memory import InMemory
from consistency.data.source import Split, require_split, required_path
from consistency.errors import UserError

FOLDER = datasets.CIFAR10.base_folder
TRAIN, TEST = (
    [name for name, _ in files]
    for files in (datasets.CIFAR10.train_list, datasets.CIFAR10.test_list)
)
FILES = {"train": TRAIN, "test": TEST, "all": [*TRAIN, *TEST]}
SHAPE = (3, 32, 32)
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


class CIFAR10(InMemory):
    """60,000 colour images of 32x32 pixels, 10 classes [Krizhevsky 2009]; 50,000 to train on, 10,000 to test.

    path: the folder of cifar-10-batches-py, or that folder itself.
    split: train, test or all.
    download: whether torchvision downloads missing files.
    """

    def __init__(self, *, path: str | None, split: Split, download: bool = False) -> None:
        require_split(split)
        root = required_path(path, "a folder", exists=False)
        folder = find_or_download(
            root,
            cifar_folder,
            _download,
            allowed=download,
            needed=f"{root / FOLDER / TRAIN[0]} and its companions",
            sources=[datasets.CIFAR10.url],
        )
        parts = [read_batch(folder / name) for name in FILES[split]]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        super().__init__(images, labels, CLASSES)


def cifar_folder(root: Path) -> Path | None:
    """Return the folder of the batches: `root` itself or cifar-10-batches-py in it."""
    choices = (root / FOLDER, root)
    return next((f for f in choices if any((f / n).is_file() for n in FILES["all"])), None)


def _download(root: Path) -> None:
    cifar = datasets.CIFAR10
    if cifar_folder(root) is None:
        download_url(cifar.url, str(root), cifar.filename, cifar.tgz_md5)
        with tarfile.open(root / cifar.filename) as archive:
            archive.extractall(root, filter="data")  # nothing outside of `root`
        if cifar_folder(root) is None:
            raise ValueError(f"{cifar.filename} holds no batches")


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
        raise UserError(
            f"a batch of CIFAR-10 at {file}",
            f"a damaged or other file ({type(error).__name__}: {error})",
            f"get {datasets.CIFAR10.url} and unpack it there",
        ) from error
    return images, torch.tensor(labels, dtype=torch.int64)
