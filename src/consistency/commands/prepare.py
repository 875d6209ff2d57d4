"""The command `prepare`: a zip in the form of NVlabs' dataset_tool, or shards, from any source of images.

Several processes write the images in chunks. A finished chunk is a zip of its own, named by a digest of its images
and settings; so a stopped run continues with the missing chunks, and a chunk whose images or settings changed is
written again. The same images and settings give the same bytes, for any number of processes or interruptions.
"""

import hashlib
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import ImageStat
from torchvision.transforms.functional import to_pil_image

from consistency.commands.overrides import shell_line
from consistency.data import shards
from consistency.data.cifar10 import CIFAR10
from consistency.data.crop import Crop
from consistency.data.decode import MODES, ImageError
from consistency.data.huggingface import HuggingFace
from consistency.data.image_files import ImageFiles
from consistency.data.listing import LABELS, has_labels
from consistency.data.lsun import FILE, Database
from consistency.data.memory import InMemory
from consistency.data.mnist import MNIST
from consistency.data.parallel import write_missing
from consistency.data.source import require_existing, require_split
from consistency.data.zip_or_folder import Archive, Folder
from consistency.errors import require
from consistency.runtime.files import path_of, written_whole

PREPARED = "prepared.json"  # beside shards: the facts that a zip has in its comment
CHUNK = 500  # images in a chunk: as many as each process may lose when it is stopped
FACTS = "facts.json"  # the entry of a chunk that describes its images
EARLIEST = (1980, 1, 1, 0, 0, 0)  # of every entry, so that the same images give the same bytes


def prepare(config: DictConfig, target: Path) -> None:
    """Make the set `output` from `source`; conf/prepare.yaml has the options."""
    _require_options(config, target)
    source = detect_source(
        config.source, split=config.split, classes=config.classes, background=config.background
    )
    kind, count = type(source).__name__, len(source.class_names)
    print(f"source      {config.source} ({kind}): {len(source):,} images, {count or 'no'} classes")
    names = ["resolution", "channels", "crop", *(["background"] if config.background else [])]
    settings: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=True)
    writer = ChunkWriter(source, settings)
    parts = target.with_name(f".{target.name}.parts")
    files = writer.files(parts)
    digests = "".join(file.stem.partition("_")[2] for file in files)
    identity = hashlib.sha256(digests.encode()).hexdigest()
    if target.exists():
        facts = _facts_of(target)
        expected = f"output={target} to be new, or made from the same images with the same settings"
        remedy = "choose another output=, or move the old one away"
        got = "a file or folder made otherwise"
        require(facts.get("identity") == identity, expected, got, remedy)
        print(f"nothing to do: {target} is made from this source with these settings")
    else:
        chunks, bad = writer.write_all(files, config.num_workers)
        images = [image for chunk in chunks.values() for image in chunk]
        facts = {"identity": identity, "num_classes": count or None}
        facts |= _summary(images, bad, config.on_bad)
        file, folder = target if config.to == "zip" else parts / "joined.zip", parts / "shards"
        join(chunks, file, facts)
        if config.to == "shards":
            shards.write_shards(Archive(path=str(file), classes=count > 0), folder)
            (folder / PREPARED).write_text(json.dumps(facts, sort_keys=True))
            folder.replace(target)
    shutil.rmtree(parts, ignore_errors=True)
    _print_result(target, facts)


def _require_options(config: DictConfig, target: Path) -> None:
    size, workers = config.resolution, config.num_workers
    shape = {"zip": "a file *.zip", "shards": "a folder"}
    fits = (target.suffix == ".zip") == (config.to == "zip")
    for valid, expected, got in (
        (config.to in shape, f"to= among {', '.join(shape)}", config.to),
        (config.on_bad in ("stop", "skip"), "on_bad=stop or skip", config.on_bad),
        (config.channels in (1, 3, None), "channels=1, 3 or null", config.channels),
        (size is None or size > 0, "a resolution of at least 1 pixel, or null", size),
        (workers is None or workers > 0, "num_workers >= 1, or null", workers),
        (fits, f"{shape.get(config.to)} at output=", target),
    ):
        require(valid, expected, got, "choose one")
    if config.to == "shards":
        shards.engine()  # fails before the work if the extra is missing


def detect_source(
    source: str, *, split: str, classes: bool, background: str | None = None
) -> ImageFiles | InMemory:
    """Open the images at `source`, in any of the known forms, in their own size and number of channels."""
    if source.startswith("hf:"):
        name = source.removeprefix("hf:")
        return HuggingFace(name=name, split=split, classes=classes, background=background)
    require_split(split)
    path = path_of(source)
    require_existing(path, f"images at source={source}")
    known = path.is_dir() or path.suffix.lower() == ".zip" or zipfile.is_zipfile(path)
    expected, got = f"a zip of images or a folder at source={source}", f"a file {path.name}"
    require(known, expected, got, "unpack it, or give the folder it is in")
    images: ImageFiles | InMemory
    if path.is_file() or has_labels(path):
        images = Archive(path=source, classes=classes or None, background=background)
    elif (path / FILE).is_file():
        images = Database(path=source, background=background)
    elif kind := next((kind for kind in (MNIST, CIFAR10) if kind.find(path)), None):
        images = kind(path=source, split=split)  # type: ignore[arg-type]  # checked above
    else:
        images = Folder(path=source, classes=classes, background=background)
    fits, got = bool(images.class_names) or not classes, f"{type(images).__name__}, a set without"
    require(fits, f"classes in source={source}, for classes=true", got, "leave classes=false")
    return images


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
                image = to_pil_image(pixels)
                if channels is not None:
                    image = image.convert(MODES[channels])
                if resolution is not None:
                    image = crop(image, resolution)
                with archive.open(_entry(str(index)), "w") as entry:
                    image.save(entry, format="PNG", compress_level=0, optimize=False)
                name, means = self.source.name_of(index), ImageStat.Stat(image).mean
                images.append(ImageFacts(index, name, label, image.height, image.width, means))
            facts = {"images": [vars(image) for image in images], "bad": bad}
            archive.writestr(_entry(FACTS), json.dumps(facts))

    def write_all(
        self, files: Mapping[Path, range], workers: int | None
    ) -> tuple[Chunks, list[str]]:
        """Return all chunks, missing ones written, and lines about unusable images; stop at another size or mode."""
        chunks, bad, first = Chunks(), list[str](), None
        with closing(write_missing(files, self.write, workers=workers, title="preparing")) as done:
            for file in done:
                with zipfile.ZipFile(file) as archive:
                    facts = json.loads(archive.read(FACTS))
                bad += facts["bad"]
                chunks[file] = [ImageFacts(**image) for image in facts["images"]]
                for image in chunks[file]:
                    first = first or image
                    image.require_alike(first)
        return chunks, bad


def _entry(name: str) -> zipfile.ZipInfo:
    """Return the head of an entry, the same on every machine and at every time."""
    head = zipfile.ZipInfo(name, EARLIEST)
    head.create_system, head.external_attr = 3, 0o644 << 16
    return head


def join(chunks: Chunks, file: Path, facts: dict[str, Any]) -> None:
    """Write the zip: 00000/img00000000.png ... in order, dataset.json, and the facts as the archive's comment."""
    table: list[list[Any]] = []
    with written_whole(file) as whole, zipfile.ZipFile(whole, "w") as archive:
        for chunk, images in chunks.items():
            with zipfile.ZipFile(chunk) as part:
                for image in images:
                    number = f"{len(table):08d}"
                    name = f"{number[:5]}/img{number}.png"
                    archive.writestr(_entry(name), part.read(str(image.index)))
                    table.append([name, image.label])
        labels = table if facts["num_classes"] is not None else None
        archive.writestr(_entry(LABELS), json.dumps({"labels": labels}))
        archive.comment = json.dumps(facts, sort_keys=True).encode()


def _summary(images: Sequence[ImageFacts], bad: Sequence[str], on_bad: str) -> dict[str, Any]:
    """Return the facts of the images; print those that cannot be used, and refuse them unless they may be skipped."""
    total = len(images) + len(bad)
    if bad:
        print(f"{len(bad):,} of {total:,} images cannot be used:")
        print(*(f"  {line}" for line in bad), sep="\n")
    expected = f"images that can be used, all {total:,} of them"
    remedy = "mend or remove them and run the command again, which continues from here, or leave them out with on_bad=skip"
    usable = bool(images) and (on_bad == "skip" or not bad)
    require(usable, expected, f"{len(bad):,} that cannot, listed above", remedy)
    counts = Counter(image.label for image in images).values()
    return {
        "count": len(images),
        "left_out": len(bad),
        "resolution": images[0].height,
        "channels": len(images[0].means),
        "images_per_class": [min(counts), max(counts)],
        "channel_means": np.mean([image.means for image in images], axis=0).round(4).tolist(),
    }


def _facts_of(target: Path) -> dict[str, Any]:
    """Return the facts that an earlier run wrote with its zip or shards; nothing for other files."""
    with suppress(OSError, TypeError, ValueError, zipfile.BadZipFile):
        if target.is_dir():
            return dict(json.loads((target / PREPARED).read_text()))
        with zipfile.ZipFile(target) as archive:
            return dict(json.loads(archive.comment))
    return {}


def _print_result(target: Path, facts: dict[str, Any]) -> None:
    size, channels, classes = facts["resolution"], facts["channels"], facts["num_classes"]
    least, most = facts["images_per_class"]
    means = " ".join(f"{mean:.2f}" for mean in facts["channel_means"])
    kind = "zip" if target.is_file() else "stream"
    options = [f"data={kind}", f"data.path={target}"]
    options += [f"data.image_size={size}", f"data.channels={channels}"]
    options += [f"data.num_classes={classes}"] if classes else []
    options += ["data.source.classes=true"] if classes and kind == "zip" else []
    print(
        f"images      {facts['count']:,}, left out {facts['left_out']:,}",
        f"size        {size}x{size}, {'grey' if channels == 1 else 'RGB'}",
        f"classes     {f'{classes}, of {least:,} to {most:,} images' if classes else 'none'}",
        f"means       {means} (of 0 to 255, by channel)",
        f"written     {target}",
        f"train on it {shell_line('train', *options)}",
        sep="\n",
    )
