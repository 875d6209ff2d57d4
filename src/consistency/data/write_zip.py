"""Any source of images as a zip in the form of NVlabs' dataset_tool, at one size and number of channels.

Several processes write the images in chunks. A finished chunk is a zip of its own, named by a digest of its images
and settings; so a stopped run continues with the missing chunks, and a chunk whose images or settings changed is
written again. The same images and settings give the same bytes, for any number of processes or interruptions.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from PIL import ImageStat

from consistency.data.crop import Crop
from consistency.data.decode import MODES, ImageError, to_picture
from consistency.data.image_files import ImageFiles
from consistency.data.listing import LABELS
from consistency.data.memory import InMemory
from consistency.data.parallel import write_missing
from consistency.errors import require
from consistency.runtime.files import written_whole

CHUNK = 500  # images in a chunk: as many as each process may lose when it is stopped
FACTS = "facts.json"  # the entry of a chunk that describes its images
EARLIEST = (1980, 1, 1, 0, 0, 0)  # of every entry, so that the same images give the same bytes


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


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: its file, its images, and the unusable images with their reasons."""

    file: Path
    images: list[ImageFacts]
    bad: list[str]


@dataclass(frozen=True)
class ChunkWriter:
    """Images of a source, written as chunks. settings: those of conf/prepare.yaml that change the images."""

    source: ImageFiles | InMemory
    settings: dict[str, Any]

    def files(self, folder: Path) -> dict[Path, range]:
        """Return the file of every chunk, named by its number and digest, with the numbers of its images."""
        every = range(len(self.source))
        spans = [every[n : n + CHUNK] for n in every[::CHUNK]]
        return {folder / f"{n:08d}_{self.digest(span)}.zip": span for n, span in enumerate(spans)}

    def digest(self, span: range) -> str:
        """Return a digest of the settings and of each image's name, class and stamp."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for index in span:
            stamp, label = self.source.stamp(index), int(self.source.labels[index])
            head = f"{index} {self.source.name_of(index)} {label} {len(stamp)} "
            digest.update(head.encode(errors="surrogateescape") + stamp)
        return digest.hexdigest()[:32]

    def write(self, span: range, file: Path) -> None:
        """Write one chunk, as PNG without compression, and its facts."""
        channels, resolution = self.settings["channels"], self.settings["resolution"]
        crop: Crop = instantiate(self.settings["crop"])
        images, bad = [], []
        with written_whole(file) as whole, zipfile.ZipFile(whole, "w") as archive:
            for index in span:
                try:
                    pixels, label = self.source[index]
                except ImageError as error:
                    bad.append(f"{error.name}: {error.got}")
                    continue
                image = to_picture(pixels)
                if channels is not None:
                    image = image.convert(MODES[channels])
                if resolution is not None:
                    image = crop(image, resolution)
                with archive.open(_entry(str(index)), "w") as entry:
                    image.save(entry, format="PNG", compress_level=0, optimize=False)
                name, means = self.source.name_of(index), ImageStat.Stat(image).mean
                images.append(ImageFacts(index, name, label, image.height, image.width, means))
            facts = {"images": [asdict(image) for image in images], "bad": bad}
            archive.writestr(_entry(FACTS), json.dumps(facts))

    def write_all(self, files: Mapping[Path, range], workers: int | None) -> Iterator[Chunk]:
        """Yield all chunks in order, written if they are missing; stop at the first image of another size or mode."""
        first: ImageFacts | None = None
        with closing(write_missing(files, self.write, workers=workers, title="preparing")) as done:
            for file in done:
                with zipfile.ZipFile(file) as archive:
                    facts = json.loads(archive.read(FACTS))
                images = [ImageFacts(**image) for image in facts["images"]]
                for image in images:
                    first = first or image
                    image.require_alike(first)
                yield Chunk(file, images, facts["bad"])


def _entry(name: str) -> zipfile.ZipInfo:
    """Return the head of an entry, the same on every machine and at every time."""
    head = zipfile.ZipInfo(name, EARLIEST)
    head.create_system, head.external_attr = 3, 0o644 << 16
    return head


def join(chunks: Sequence[Chunk], file: Path, facts: dict[str, Any]) -> None:
    """Write the zip: 00000/img00000000.png ... in order, dataset.json, and the facts as the archive's comment."""
    table: list[list[Any]] = []
    with written_whole(file) as whole, zipfile.ZipFile(whole, "w") as archive:
        for chunk in chunks:
            with zipfile.ZipFile(chunk.file) as part:
                for image in chunk.images:
                    number = f"{len(table):08d}"
                    name = f"{number[:5]}/img{number}.png"
                    archive.writestr(_entry(name), part.read(str(image.index)))
                    table.append([name, image.label])
        labels = table if facts["num_classes"] is not None else None
        archive.writestr(_entry(LABELS), json.dumps({"labels": labels}))
        archive.comment = json.dumps(facts, sort_keys=True).encode()
