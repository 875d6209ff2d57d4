"""Sources whose images are files of an image format, wherever their bytes lie."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image as PILImage
from torch import Tensor
from tqdm import tqdm

from consistency.data.cropping import Crop, halving
from consistency.data.decoding import MODES, ImageError, colour_of, decode
from consistency.data.source import Image
from consistency.errors import require

OnBad: TypeAlias = Literal["stop", "skip"]
T = TypeVar("T")

SPAN = 64
"""Images a thread takes at once."""

MOST_TOLD = 20
"""Unreadable files that are named; the rest is counted."""


class PerProcess(Generic[T]):
    """A handle that is opened anew in every process that asks for it: open files do not survive a fork or a pickle."""

    def __init__(self, opening: Callable[[], T]) -> None:
        self.opening = opening
        self.held: tuple[int, T] | None = None

    def __call__(self) -> T:
        if self.held is None or self.held[0] != os.getpid():
            self.held = None  # first let go of a parent's: LMDB refuses to open what it thinks is open already
            self.held = (os.getpid(), self.opening())
        return self.held[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"opening": self.opening, "held": None}


class Encoded(ABC):
    """A source of encoded images, one name each.

    names, labels: of every image; class_names: empty without classes. image_size: the side to which `crop` brings an
    image, None for its own; channels: 1 grey, 3 colour, None for each image's own. num_classes: what a conditional model
    is told, against which the labels are checked. on_bad: "stop" raises `ImageError` at an image that cannot be used,
    when it is asked for; "skip" tries every image once at the start, leaves the bad ones out and says which and how many.
    So the order of the rest stays a function of position, on every rank and after a resume. background: the colour that
    transparent images are put on; None refuses them.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int] | None,
        *,
        where: str,
        class_names: Sequence[str],
        image_size: int | None,
        channels: int | None,
        crop: Crop,
        num_classes: int | None,
        on_bad: OnBad,
        background: str | None = None,
    ) -> None:
        require(channels in (1, 3, None), "data.channels of 1 or 3", channels, "set it")
        require(on_bad in ("stop", "skip"), "data.on_bad=stop or skip", on_bad, "choose one")
        self.where, self.names, self.class_names = where, list(names), list(class_names)
        self.left_out = 0
        self.labels = torch.tensor(labels or [0] * len(names), dtype=torch.int64)
        self.image_size, self.crop = image_size, crop
        self.background = colour_of(background)
        self.mode = None if channels is None else MODES[channels]
        if num_classes is not None:
            self._require_classes(num_classes)
        if on_bad == "skip":
            self._leave_out_bad()

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of an image file."""

    @abstractmethod
    def stamp(self, index: int) -> bytes:
        """What changes when the image does."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        name = self.names[index]
        image = decode(self.read(name), f"{self.where}/{name}", self.mode, self.background)
        if self.image_size is not None:
            image = self.crop(image, self.image_size)
        return to_tensor(image), int(self.labels[index])

    def _require_classes(self, num_classes: int) -> None:
        require(
            bool(self.class_names),
            f"classes for data.num_classes={num_classes} in {self.where}",
            "images without classes",
            "add data.source.classes=true if it has classes, or set data.num_classes=null",
        )
        highest = int(self.labels.max())
        require(
            highest < num_classes,
            f"class indices below data.num_classes={num_classes}",
            f"class index {highest} of {self.names[int(self.labels.argmax())]} in {self.where}",
            "set data.num_classes to the number of classes",
        )
        if len(self.class_names) < num_classes:
            shown = ", ".join(self.class_names[:MOST_TOLD])
            rank_zero_only(print)(
                f"data.num_classes={num_classes}, but {self.where} has {len(self.class_names)}: {shown}"
            )

    def _leave_out_bad(self) -> None:
        reasons: dict[int, str] = {}

        def attempt(index: int) -> None:
            try:
                self[index]
            except ImageError as error:
                reasons[index] = f"{error.name}: {error.reason}"

        in_threads(attempt, len(self), "trying every image (data.on_bad=skip)")
        total = len(self)
        require(
            len(reasons) < total, f"an image that can be read in {self.where}", "none", "check them"
        )
        tell_left_out([reasons[i] for i in sorted(reasons)], total)
        good = [i for i in range(total) if i not in reasons]
        self.left_out = len(reasons)
        self.names = [self.names[i] for i in good]
        self.labels = self.labels[good]


def to_tensor(image: PILImage.Image) -> UInt8[Tensor, "c h w"]:
    """Grey values (c, h, w) of a grey or RGB image."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()


def to_picture(pixels: UInt8[Tensor, "c h w"]) -> PILImage.Image:
    """The inverse of `to_tensor`."""
    rows = pixels.permute(1, 2, 0).numpy()
    return PILImage.fromarray(rows[..., 0] if len(pixels) == 1 else rows)


def in_threads(do: Callable[[int], None], count: int, title: str) -> None:
    """do(0) ... do(count-1) on all cores (decoding lets other threads run), with a progress bar if it takes a while."""

    def span(first: int) -> int:
        last = min(first + SPAN, count)
        for index in range(first, last):
            do(index)
        return last - first

    silent = getattr(rank_zero_only, "rank", 0) != 0 or count < 1000
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=count, desc=title, unit="img", disable=silent, leave=False) as bar,
    ):
        for done in pool.map(span, range(0, count, SPAN)):
            bar.update(done)


@rank_zero_only
def tell_left_out(lines: Sequence[str], total: int) -> None:
    """Says how many images were left out, and names the first."""
    print(f"{len(lines):,} of {total:,} images cannot be used and are left out")
    for line in told(lines):
        print(f"  {line}")


def told(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - MOST_TOLD
    return [*lines[:MOST_TOLD], *([f"... and {more:,} more"] if more > 0 else [])]


PLAIN: dict[str, Any] = dict(
    image_size=None, channels=None, crop=halving, num_classes=None, on_bad="stop"
)
"""An encoded source that gives its images as they are."""
