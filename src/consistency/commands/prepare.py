"""The command `prepare`: a zip in the form of NVlabs' dataset_tool, shards, or latents, from any source of images.

`consistency.data.chunks` writes the images and continues a stopped run.
"""

import hashlib
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from consistency.commands.overrides import shell_line
from consistency.data import shards
from consistency.data.chunks import Chunks, ChunkWriter, ImageFacts
from consistency.data.cifar10 import CIFAR10
from consistency.data.encode import TYPES, LatentWriter
from consistency.data.huggingface import HuggingFace
from consistency.data.image_files import ImageFiles
from consistency.data.latents import MOMENTS, SAMPLES, TABLE
from consistency.data.listing import LABELS, has_labels
from consistency.data.lsun import FILE, Database
from consistency.data.memory import InMemory
from consistency.data.mnist import MNIST
from consistency.data.parallel import PerProcess
from consistency.data.source import require_existing, require_split
from consistency.data.zip_or_folder import Archive, Folder
from consistency.errors import require
from consistency.inference import autoencoder
from consistency.latents import SCALINGS
from consistency.runtime.devices import chosen_device
from consistency.runtime.files import path_of, written_whole

PREPARED = "prepared.json"  # beside shards: the facts that a zip has in its comment
FACTS = "facts.json"  # the entry of a chunk that describes its images
CPU = torch.device("cpu")
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
    writer, workers = FORMS[config.to](config, source, settings)
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
        chunks, bad = writer.write_all(files, workers)
        images = [image for chunk in chunks.values() for image in chunk]
        facts = {"identity": identity, "num_classes": count or None}
        facts |= _summary(images, bad, config.on_bad)
        facts = writer.finish(chunks, target, facts)
    shutil.rmtree(parts, ignore_errors=True)
    _print_result(target, facts)


def _require_options(config: DictConfig, target: Path) -> None:
    size, workers = config.resolution, config.num_workers
    shape = {"zip": "a file *.zip", "shards": "a folder", "latents": "a folder"}
    fits = (target.suffix == ".zip") == (config.to == "zip")
    named = (config.autoencoder is None) == (config.to != "latents")
    for valid, expected, got in (
        (config.to in shape, f"to= among {', '.join(shape)}", config.to),
        (config.on_bad in ("stop", "skip"), "on_bad=stop or skip", config.on_bad),
        (config.channels in (1, 3, None), "channels=1, 3 or null", config.channels),
        (size is None or size > 0, "a resolution of at least 1 pixel, or null", size),
        (workers is None or workers > 0, "num_workers >= 1, or null", workers),
        (fits, f"{shape.get(config.to)} at output=", target),
        (named, "autoencoder= for to=latents, and for it alone", config.autoencoder),
        (config.scaling in SCALINGS, f"scaling= among {', '.join(SCALINGS)}", config.scaling),
        (config.store in (MOMENTS, SAMPLES), f"store={MOMENTS} or {SAMPLES}", config.store),
        (config.dtype in TYPES, f"dtype= among {', '.join(TYPES)}", config.dtype),
    ):
        require(valid, expected, got, "choose one")


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


class ZipWriter(ChunkWriter):
    """Chunks that are zips of PNG without compression, joined to one."""

    title, suffix = "preparing", ".zip"

    def write(self, span: range, file: Path) -> None:
        images, bad = [], []
        with written_whole(file) as whole, zipfile.ZipFile(whole, "w") as archive:
            for index in span:
                read = self.read(index)
                if isinstance(read, str):
                    bad.append(read)
                    continue
                image, facts = read
                with archive.open(_entry(str(index)), "w") as entry:
                    image.save(entry, format="PNG", compress_level=0, optimize=False)
                images.append(vars(facts))
            archive.writestr(_entry(FACTS), json.dumps({"images": images, "bad": bad}))

    def facts(self, file: Path) -> dict[str, Any]:
        with zipfile.ZipFile(file) as archive:
            facts: dict[str, Any] = json.loads(archive.read(FACTS))
        return facts

    def finish(self, chunks: Chunks, target: Path, facts: dict[str, Any]) -> dict[str, Any]:
        join(chunks, target, facts)
        return facts


class ShardsWriter(ZipWriter):
    """Chunks that are zips, joined to one and then cut into shards."""

    def finish(self, chunks: Chunks, target: Path, facts: dict[str, Any]) -> dict[str, Any]:
        parts = next(iter(chunks)).parent
        file, folder = parts / "joined.zip", parts / "shards"
        join(chunks, file, facts)
        classes = facts["num_classes"] is not None
        shards.write_shards(Archive(path=str(file), classes=classes), folder)
        (folder / PREPARED).write_text(json.dumps(facts, sort_keys=True))
        folder.replace(target)
        return facts


Made: TypeAlias = tuple[ChunkWriter, int | None]  # a writer, and the number of its processes


def to_zip(config: DictConfig, source: ImageFiles | InMemory, settings: dict[str, Any]) -> Made:
    """Return the writer of a zip."""
    return ZipWriter(source, settings), config.num_workers


def to_shards(config: DictConfig, source: ImageFiles | InMemory, settings: dict[str, Any]) -> Made:
    """Return the writer of shards; fail before the work if the extra is missing."""
    shards.engine()
    return ShardsWriter(source, settings), config.num_workers


def to_latents(config: DictConfig, source: ImageFiles | InMemory, settings: dict[str, Any]) -> Made:
    """Return the writer of latents, one process a device; open the autoencoder once, before the work."""
    device, devices = chosen_device(config.device, config.devices), config.devices
    place = path_of(config.autoencoder)
    name = str(place.absolute()) if place.exists() else config.autoencoder
    encoder = autoencoder.opened(name, None, config.scaling, device if devices == 1 else CPU)
    channels = int(encoder.network.config.in_channels)
    remedy = "leave it out"
    expected = f"channels={channels} of the autoencoder, or null"
    require(config.channels in (None, channels), expected, config.channels, remedy)
    own = {name: config[name] for name in ("scaling", "flip", "store", "dtype", "seed")}
    settings |= own | {"channels": channels, "sha256": encoder.sha256}
    ranks = get_context("spawn").SimpleQueue()
    for rank in range(devices):
        ranks.put(rank)
    return LatentWriter(source, settings, name, device, devices, PerProcess(ranks.get)), devices


FORMS = {"zip": to_zip, "shards": to_shards, "latents": to_latents}
"""The writers of the forms of a prepared set."""


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
    with suppress(OSError, TypeError, ValueError, StopIteration, zipfile.BadZipFile):
        if target.is_dir():
            names = (PREPARED, TABLE)
            file = next(target / name for name in names if (target / name).is_file())
            return dict(json.loads(file.read_text()))
        with zipfile.ZipFile(target) as archive:
            return dict(json.loads(archive.comment))
    return {}


def _print_result(target: Path, facts: dict[str, Any]) -> None:
    size, channels, classes = facts["resolution"], facts["channels"], facts["num_classes"]
    least, most = facts["images_per_class"]
    means = " ".join(f"{mean:.2f}" for mean in facts["channel_means"])
    lines = [f"means       {means} (of 0 to 255, by channel)"]
    kind = "zip" if target.is_file() else "stream"
    side = size
    if latents := facts.get("latents"):
        kind, (channels, side, _) = "latents", facts["shape"]
        mean, deviation = (
            " ".join(f"{value:.3f}" for value in facts[name]) for name in ("means", "deviations")
        )
        lines += [
            f"latents     {side}x{side}x{channels}, {facts['stored']}, {facts['orientations']} orientations",
            f"autoencoder {latents['autoencoder']}, sha256 {latents['sha256'][:12]}",
            f"scaling     {latents['scaling']}: means {mean}, deviations {deviation}, by channel",
        ]
    options = [f"data={kind}", f"data.path={target}"]
    options += [f"data.image_size={side}", f"data.channels={channels}"]
    options += [f"data.num_classes={classes}"] if classes else []
    options += ["data.source.classes=true"] if classes and kind == "zip" else []
    options += ["data.flip=true"] if facts.get("orientations") == 2 else []
    print(
        f"images      {facts['count']:,}, left out {facts['left_out']:,}",
        f"size        {size}x{size}, {'grey' if facts['channels'] == 1 else 'RGB'}",
        f"classes     {f'{classes}, of {least:,} to {most:,} images' if classes else 'none'}",
        *lines,
        f"written     {target}",
        f"train on it {shell_line('train', *options)}",
        sep="\n",
    )
