"""CIFAR-10 in its original batches."""

import tarfile
from pathlib import Path

import torch
from torchvision import datasets
from torchvision.datasets.utils import download_url

from consistency.checkpoints.pickle_reader import Machine
from consistency.data.memory import Downloaded
from consistency.data.source import Classes, Images
from consistency.errors import UserError


class CIFAR10(Downloaded):
    """60,000 colour images of 32x32 pixels, 10 classes [Krizhevsky 2009]; 50,000 to train on, 10,000 to test.

    Its files are Python pickles, which are read as data and never run.
    """

    home = datasets.CIFAR10.base_folder
    train = tuple(name for name, _ in datasets.CIFAR10.train_list)
    test = tuple(name for name, _ in datasets.CIFAR10.test_list)
    marks = (*train, *test)
    class_names = "airplane automobile bird cat deer dog frog horse ship truck".split()

    def download(self, root: Path) -> None:
        origin = datasets.CIFAR10
        download_url(origin.url, str(root), origin.filename, origin.tgz_md5)
        with tarfile.open(root / origin.filename) as archive:
            archive.extractall(root, filter="data")  # nothing outside of `root`

    def sources(self) -> list[str]:
        return [datasets.CIFAR10.url]

    def read(self, folder: Path, part: str) -> tuple[Images, Classes]:
        return read_batch(folder / part)


def read_batch(file: Path) -> tuple[Images, Classes]:
    """Read images (n, 3, 32, 32) and class indices of one batch: the rows of b"data" are 1,024 red, green and blue values each."""
    try:
        content = file.read_bytes()
        table = Machine(len(content)).run(content)
        entries = {k.decode() if isinstance(k, bytes) else k: v for k, v in table.items()}
        images, labels = entries["data"].state.reshape(-1, 3, 32, 32), entries["labels"]
        known = all(
            type(label) is int and 0 <= label < len(CIFAR10.class_names) for label in labels
        )
        if not known or len(labels) != len(images) or images.dtype != torch.uint8:
            got = f"{len(labels):,} labels up to {max(labels)}"
            raise ValueError(f"{len(images):,} images of {images.dtype}, {got}")
    except Exception as error:  # a damaged pickle fails in any way
        got = f"a damaged or other file ({type(error).__name__}: {error})"
        remedy = f"get {datasets.CIFAR10.url} and unpack it there"
        raise UserError(f"a batch of CIFAR-10 at {file}", got, remedy) from error
    return images, torch.tensor(labels, dtype=torch.int64)
