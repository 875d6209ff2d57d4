"""Images in memory, among them the sets that are downloaded if they are missing."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_only

from consistency.data import source as sources
from consistency.data.parallel import in_threads
from consistency.data.source import Classes, Image, Images, Source, Split
from consistency.errors import UserError, require
from consistency.randomness import generator
from consistency.runtime.files import locked


@dataclass(eq=False, repr=False)
class InMemory(Source):
    """Images (n, c, h, w) of grey values 0 ... 255, with their class indices."""

    images: Images
    labels: Classes
    class_names: Sequence[str] = ()
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: list[int]) -> tuple[Images, Classes]:
        return self.images[indices], self.labels[indices]

    def stamp(self, index: int) -> bytes:
        return self.images[index].numpy().tobytes()


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
        sources.require_split(split)
        root = sources.required_path(path, "a folder", exists=False)
        needed = f"{root / self.home / self.marks[0]} and its companions (data.path={root})"
        remedy = "add data.download=true on a machine with a network, or put the files there"
        remedy += f" from {', '.join(self.sources())}"
        folder = self.find(root)
        if download and folder is None:
            with sources.downloading(needed, remedy):
                root.mkdir(parents=True, exist_ok=True)
                with locked(root / ".download.lock"):
                    if self.find(root) is None:
                        self.download(root)
                if (folder := self.find(root)) is None:
                    raise ValueError("it brought other files")
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


def load_into_memory(source: Source) -> Source:
    """Decode every image of a source, in as many threads as there are cores.

    Latents stay in their files, which the system keeps in memory by itself.
    """
    if isinstance(source, InMemory) or source.latents is not None:
        return source
    shape = source[0][0].shape
    images = torch.empty((len(source), *shape), dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64)

    def load(index: int) -> None:
        image, labels[index] = source[index]
        got = f"shape {tuple(image.shape)} of image number {index}"
        remedy = "prepare the images at one resolution and mode"
        require(image.shape == shape, f"images of shape {tuple(shape)}, as the first", got, remedy)
        images[index] = image

    in_threads(load, len(source), "decoding")
    size = f"{len(source):,} images, {images.nbytes / 2**20:,.0f} MiB"
    rank_zero_only(print)(f"held in memory: {size}")
    return InMemory(images, labels, source.class_names, source.left_out)


def noise(*, count: int, channels: int, image_size: int, num_classes: int | None) -> InMemory:
    """Draw `count` images of independent random grey values with random classes, to measure speed."""
    draw, shape = generator(0, "images"), (count, channels, image_size, image_size)
    images = torch.randint(256, shape, generator=draw, dtype=torch.uint8)
    return InMemory(images, torch.randint(num_classes or 1, (count,), generator=draw))
