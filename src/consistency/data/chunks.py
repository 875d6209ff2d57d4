"""Images of a source, written in chunks by several processes: what every form of prepared set shares.

A finished chunk is a file of its own, named by a digest of its images and settings; so a stopped run continues with the
missing chunks, and a chunk whose images or settings changed is written again. The same images and settings give the
same bytes, for any number of processes or interruptions.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from hydra.utils import instantiate
from PIL import Image as PILImage
from PIL import ImageStat
from torchvision.transforms.functional import to_pil_image

from consistency.data.crop import Crop
from consistency.data.decode import MODES, ImageError
from consistency.data.image_files import ImageFiles
from consistency.data.memory import InMemory
from consistency.data.parallel import write_missing
from consistency.errors import require


@dataclass(frozen=True)
class ImageFacts:
    """A written image. index: its number in the source; means: of each channel, 0 ... 255."""

    index: int
    name: str
    label: int
    height: int
    width: int
    means: list[float]

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {'grey' if len(self.means) == 1 else 'RGB'}"

    def require_alike(self, first: "ImageFacts") -> None:
        """Refuse an image that is not square, or of another size or mode than the first."""
        square = f"square images, or resolution=<pixels> to crop them, for {self.name}"
        require(self.height == self.width, square, self, "add resolution=64, for example")
        alike = f"images of one size and mode, as {first.name} of {first}"
        remedy = "choose resolution=<pixels>, and channels=1 for grey or channels=3 for RGB"
        require(str(self) == str(first), alike, f"{self.name} of {self}", remedy)


Chunks: TypeAlias = dict[Path, list[ImageFacts]]  # the images of finished chunks, by file

CHUNK = 500  # images in a chunk: as many as each process may lose when it is stopped


@dataclass(frozen=True)
class ChunkWriter(ABC):
    """Images of a source, written as chunks. settings: those of conf/prepare.yaml that change what is written.

    title, suffix: of the progress bar, and of the files.
    """

    source: ImageFiles | InMemory
    settings: dict[str, Any]
    title: ClassVar[str]
    suffix: ClassVar[str]

    def files(self, folder: Path) -> dict[Path, range]:
        """Return the file of every chunk, named by its number and digest, with the numbers of its images."""
        every = range(len(self.source))
        spans = [every[n : n + CHUNK] for n in every[::CHUNK]]
        return {
            folder / f"{n:08d}_{self.digest(span)}{self.suffix}": span
            for n, span in enumerate(spans)
        }

    def digest(self, span: range) -> str:
        """Return a digest of the settings and of each image's name, class and stamp."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for index in span:
            stamp, label = self.source.stamp(index), int(self.source.labels[index])
            head = f"{index} {self.source.name_of(index)} {label} {len(stamp)} "
            digest.update(head.encode(errors="surrogateescape") + stamp)
        return digest.hexdigest()[:32]

    @cached_property
    def crop(self) -> Crop:
        """The crop of the settings."""
        crop: Crop = instantiate(self.settings["crop"])
        return crop

    def read(self, index: int) -> tuple[PILImage.Image, ImageFacts] | str:
        """Return an image with its channels and its crop, or a line about an unusable one."""
        channels, resolution = self.settings["channels"], self.settings["resolution"]
        try:
            pixels, label = self.source[index]
        except ImageError as error:
            return f"{error.name}: {error.got}"
        image = to_pil_image(pixels)
        if channels is not None:
            image = image.convert(MODES[channels])
        if resolution is not None:
            image = self.crop(image, resolution)
        name, means = self.source.name_of(index), ImageStat.Stat(image).mean
        return image, ImageFacts(index, name, label, image.height, image.width, means)

    @abstractmethod
    def write(self, span: range, file: Path) -> None:
        """Write one chunk and its facts."""

    @abstractmethod
    def facts(self, file: Path) -> dict[str, Any]:
        """Read the facts of a chunk: `images`, a dictionary each, and `bad`, lines about unusable ones."""

    @abstractmethod
    def finish(self, chunks: Chunks, target: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Make `target` of all chunks, and return the facts of the set with what became known of them."""

    def write_all(
        self, files: Mapping[Path, range], workers: int | None
    ) -> tuple[Chunks, list[str]]:
        """Return all chunks, missing ones written, and lines about unusable images; stop at another size or mode."""
        chunks, bad, first = Chunks(), list[str](), None
        written = write_missing(files, self.write, workers=workers, title=self.title)
        with closing(written) as done:
            for file in done:
                facts = self.facts(file)
                bad += facts["bad"]
                chunks[file] = [ImageFacts(**image) for image in facts["images"]]
                for image in chunks[file]:
                    first = first or image
                    image.require_alike(first)
        return chunks, bad
