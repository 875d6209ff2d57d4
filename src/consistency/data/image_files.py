"""Sources whose images are files of an image format: in a folder, a zip or a database."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only

from consistency.data.crop import Crop, halving
from consistency.data.decode import MODES, ImageError, colour_of, read_image, to_tensor
from consistency.data.parallel import in_threads
from consistency.data.source import Image, Source
from consistency.errors import require

MOST_LISTED = 20  # unusable images that are named; the rest is counted


class Index(NamedTuple):
    """Names of all images, their class indices (None: all 0), and the names of the classes."""

    names: Sequence[str]
    labels: Sequence[int] | None = None
    class_names: Sequence[str] = ()


def file_stamp(file: Path) -> bytes:
    """Return size and time of a file."""
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}".encode()


@dataclass(kw_only=True, eq=False, repr=False)
class ImageFiles(Source):
    """Base of the sources of image files.

    image_size, channels: of every image after `crop`; None keeps the images' own.
    num_classes: number of classes of the model, which the labels must fit; None without classes.
    on_bad: "stop" raises `ImageError` when an unusable image is read; "skip" decodes every image once at the
        start and leaves the unusable ones out, so that the order of the rest is a function of position alone.
    background: colour put behind transparent images, by name or as #rrggbb; None refuses them.
    """

    image_size: int | None = None
    channels: int | None = None
    crop: Crop = halving
    num_classes: int | None = None
    on_bad: Literal["stop", "skip"] = "stop"
    background: str | None = None

    def __post_init__(self) -> None:
        require(self.channels in (1, 3, None), "data.channels of 1 or 3", self.channels, "set it")
        require(self.on_bad in ("stop", "skip"), "data.on_bad=stop or skip", self.on_bad, "set it")
        self.mode = None if self.channels is None else MODES[self.channels]
        self.colour = colour_of(self.background)
        self.where = ""
        names, labels, class_names = self.open()
        self.names, self.class_names = list(names), list(class_names)
        self.labels = torch.tensor(labels or [0] * len(names), dtype=torch.int64)
        if self.num_classes is not None:
            self._require_classes(self.num_classes)
        if self.on_bad == "skip":
            self._leave_out_bad()

    @abstractmethod
    def open(self) -> Index:
        """Open the set, and set `where` to its path or name."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the bytes of an image file; raise one of `UNREADABLE` if that fails."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        read = partial(self.read, self.names[index])
        image = read_image(read, self.name_of(index), self.mode, self.colour)
        if self.image_size is not None:
            image = self.crop(image, self.image_size)
        return to_tensor(image), int(self.labels[index])

    def name_of(self, index: int) -> str:
        return f"{self.where}/{self.names[index]}"

    def _require_classes(self, num_classes: int) -> None:
        expected = f"classes for data.num_classes={num_classes} in {self.where}"
        remedy = "add data.source.classes=true if it has classes, or set data.num_classes=null"
        require(bool(self.class_names), expected, "images without classes", remedy)
        highest, name = int(self.labels.max()), self.name_of(int(self.labels.argmax()))
        expected = f"class indices below data.num_classes={num_classes}"
        remedy = "set data.num_classes to the number of classes"
        require(highest < num_classes, expected, f"class index {highest} of {name}", remedy)
        if len(self.class_names) < num_classes:
            has = f"{self.where} has {len(self.class_names)}: {', '.join(self.class_names[:MOST_LISTED])}"
            rank_zero_only(print)(f"data.num_classes={num_classes}, but {has}")

    def _leave_out_bad(self) -> None:
        def objection(index: int) -> str:
            try:
                self[index]
            except ImageError as error:
                return f"  {error.name}: {error.got}"
            return ""

        reasons = in_threads(objection, len(self), "trying every image (data.on_bad=skip)")
        usable = [index for index, reason in enumerate(reasons) if not reason]
        require(bool(usable), f"an image that can be read in {self.where}", "none", "check them")
        lines = list(filter(None, reasons))
        self.left_out = len(lines)
        if more := len(lines[MOST_LISTED:]):
            lines[MOST_LISTED:] = [f"  ... and {more:,} more"]
        left_out = f"{self.left_out:,} of {len(self):,} images cannot be used and are left out"
        rank_zero_only(print)(left_out, *lines, sep="\n")
        self.names = [self.names[i] for i in usable]
        self.labels = self.labels[usable]
