"""Sets that are downloaded if they are missing, and downloads by one process of a machine with a time limit."""

import socket
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch

from consistency.data.memory import InMemory
from consistency.data.source import Classes, Images, Split, require_split, required_path
from consistency.errors import UserError
from consistency.runtime.files import locked

PATIENCE = 30.0  # seconds without an answer after which a download fails


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


class Downloaded(InMemory):
    """Base of sets in files that torchvision downloads.

    path: the folder of the files, or the one below which torchvision puts them, in `home`.

    train, test: names of the parts of the splits.
    marks: files of which every copy of the set has one.
    """

    home: ClassVar[str]
    train: ClassVar[Sequence[str]]
    test: ClassVar[Sequence[str]]
    marks: ClassVar[Sequence[str]]

    def __init__(self, *, path: str | None, split: Split, download: bool = False) -> None:
        require_split(split)
        root = required_path(path, "a folder", exists=False)
        needed = f"{root / self.home / self.marks[0]} and its companions (data.path={root})"
        remedy = "add data.download=true on a machine with a network, or put the files there"
        remedy += f" from {', '.join(self.sources())}"
        if download and self.find(root) is None:
            with downloading(needed, remedy):
                root.mkdir(parents=True, exist_ok=True)
                with locked(root / ".download.lock"):
                    if self.find(root) is None:
                        self.download(root)
                if self.find(root) is None:
                    raise ValueError("it brought other files")
        folder = self.find(root)
        if folder is None:
            raise UserError(needed, "no such file, and data.download=false", remedy)
        names = {"train": self.train, "test": self.test, "all": [*self.train, *self.test]}[split]
        parts = [self.read(folder, name) for name in names]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        super().__init__(images, labels, self.class_names)

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
