"""CIFAR-10 in its original form: Python pickles, read as data and never run."""

import math
import tarfile
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import download_url

from consistency.data.download import fetched
from consistency.data.held import Held
from consistency.errors import UserError, require
from consistency.formats.pickles import CALLS, Machine, Object
from consistency.paths import path_of

Split: TypeAlias = Literal["train", "test", "all"]
FOLDER = datasets.CIFAR10.base_folder
TRAIN, TEST = (
    [name for name, _ in files]
    for files in (datasets.CIFAR10.train_list, datasets.CIFAR10.test_list)
)
FILES = {"train": TRAIN, "test": TEST, "all": [*TRAIN, *TEST]}
SHAPE = (3, 32, 32)
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


class CIFAR10(Held):
    """60,000 colour images of 32x32 pixels, 10 classes [Krizhevsky 2009]; 50,000 to train on, 10,000 to test.

    path: the folder that holds cifar-10-batches-py, or that folder itself. With `download` torchvision fetches it (and
    checks the archive's sum) if it is not there.
    """

    def __init__(self, *, path: str | None, split: Split, download: bool = False) -> None:
        require(split in FILES, "split train, test or all", split, "choose one")
        require(
            path is not None, "a folder in data.path", "data.path=null", "add data.path=<folder>"
        )
        root = path_of(str(path))
        if cifar_folder(root) is None:
            fetched(
                root,
                _fetch,
                allowed=download,
                needed=f"{root / FOLDER / TRAIN[0]} and its companions",
                sources=[datasets.CIFAR10.url],
            )
        folder = cifar_folder(root)
        assert folder is not None
        parts = [read_batch(folder / name) for name in FILES[split]]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        super().__init__(images, labels, CLASSES)


def cifar_folder(root: Path) -> Path | None:
    """Where the batches are: `root` itself or cifar-10-batches-py in it."""
    choices = (root / FOLDER, root)
    return next((f for f in choices if any((f / n).is_file() for n in FILES["all"])), None)


def _fetch(root: Path) -> None:
    cifar = datasets.CIFAR10
    if cifar_folder(root) is None:
        download_url(cifar.url, str(root), cifar.filename, cifar.tgz_md5)
        with tarfile.open(root / cifar.filename) as archive:
            archive.extractall(root, filter="data")  # nothing outside of `root`
        if cifar_folder(root) is None:
            raise ValueError(f"{cifar.filename} holds no batches")


def read_batch(file: Path) -> tuple[UInt8[Tensor, "n 3 32 32"], Int64[Tensor, "n"]]:
    """Images and class indices of one batch: the rows of b"data" are 1,024 red, green and blue values each."""
    try:
        content = file.read_bytes()
        table = ArrayMachine(len(content)).run(content)
        plain = {k.decode() if isinstance(k, bytes) else k: v for k, v in table.items()}
        rows, labels = _array(plain["data"]), plain["labels"]
        images = rows.reshape(-1, *SHAPE)
        whole = all(type(label) is int and 0 <= label < len(CLASSES) for label in labels)
        if not whole or len(labels) != len(images):
            raise ValueError(f"{len(images):,} images and other labels than as many classes")
    except Exception as error:  # a damaged pickle fails in any way
        raise UserError(
            f"expected a batch of CIFAR-10 at {file}\n"
            f"  got: something else, or a damaged file ({type(error).__name__}: {error})\n"
            f"  do: get {datasets.CIFAR10.url} and unpack it there"
        ) from error
    return images, torch.tensor(labels, dtype=torch.int64)


def _blank(*_: object) -> Object:
    """Stands for an array; its content comes later, as its state."""
    return Object("numpy.ndarray", None)


class ArrayMachine(Machine):
    """Carries out a pickle that holds arrays of numpy: each is left as an `Object` with its description."""

    calls: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "numpy.core.multiarray._reconstruct": _blank,
        "numpy._core.multiarray._reconstruct": _blank,
        "numpy.dtype": CALLS["numpy.dtype"],
        "_codecs.encode": CALLS["_codecs.encode"],
    }
    known: ClassVar[Set[str]] = {*calls, "numpy.ndarray"}

    def set_state(self, target: Any, state: Any) -> Any:
        """Gives an array its description; all else as in checkpoints."""
        if isinstance(target, Object) and target.kind == "numpy.ndarray":
            target.state = state
            return target
        return super().set_state(target, state)


def _array(found: Object) -> UInt8[Tensor, "..."]:
    """The bytes of an array of bytes in row order; Python 2 wrote them as text."""
    _, shape, kind, by_column, content = found.state
    if kind.state != "u1" or by_column or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array of something else than bytes")
    stored = content.encode("latin-1") if isinstance(content, str) else content
    if math.prod(shape) != len(stored):
        raise ValueError(f"{len(stored):,} bytes for shape {shape}")
    return torch.frombuffer(bytearray(stored), dtype=torch.uint8).reshape(shape)
