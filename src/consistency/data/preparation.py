"""Any source of images -> a zip in the form of NVlabs' dataset_tool, or shards, at one size and number of channels.

The images are worked on in chunks, by several processes. A finished chunk is a zip of its own beside the output, named
by a digest of what it was made from; so a run that was stopped goes on with the chunks that are missing, and a chunk whose
images or settings changed is made anew. When all are there they are joined, in order, and the result takes its name
in one step. The same images and settings give the same bytes, whatever the number of processes or interruptions.
"""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image as PILImage
from tqdm import tqdm

from consistency.commands.overrides import shell_line
from consistency.data.archive import Archive
from consistency.data.cropping import Crop
from consistency.data.decoding import MODES, ImageError
from consistency.data.encoded import PLAIN, Encoded, to_picture
from consistency.data.held import Held
from consistency.data.listing import LABELS
from consistency.data.opening import opened
from consistency.data.shards import write_shards
from consistency.data.stream import engine
from consistency.errors import UserError, require
from consistency.runtime import signals
from consistency.runtime.signals import die_with

TARGETS = ("zip", "shards")
PREPARED = "prepared.json"
"""Beside shards: what a zip says of itself in its comment."""

CHUNK = 500
"""Images a chunk: what a stopped run may lose of each process."""

WORTH_A_PROCESS = 2000
"""Images for which starting a further process pays."""

FACTS = "facts.json"
"""The entry of a chunk that says what is in it."""

EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The time of every entry, so that the same images give the same bytes."""


@dataclass(frozen=True)
class Settings:
    """How images are treated; crop is the configuration of what `Worker` calls."""

    resolution: int | None
    channels: int | None
    crop: Any
    background: str | None = None


@dataclass(frozen=True)
class Written:
    """An image of a chunk: its number in the source, class index, size and the mean of each channel, 0 ... 255."""

    index: int
    name: str
    label: int
    height: int
    width: int
    means: list[float]

    @property
    def kind(self) -> str:
        """Size and mode in words."""
        return f"{self.width}x{self.height} {'grey' if len(self.means) == 1 else 'RGB'}"


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: its file, what is in it, and the images that cannot be used with their reasons."""

    file: Path
    written: list[Written]
    bad: list[str]


def prepare(config: DictConfig, target: Path) -> None:
    """Makes the set `output` from `source`; see conf/prepare.yaml."""
    require(config.to in TARGETS, f"to= among {', '.join(TARGETS)}", config.to, "choose one")
    require(config.on_bad in ("stop", "skip"), "on_bad=stop or skip", config.on_bad, "choose one")
    require(config.channels in (1, 3, None), "channels=1, 3 or null", config.channels, "choose one")
    size, workers = config.resolution, config.num_workers
    require(size is None or size > 0, "a resolution of at least 1 pixel, or null", size, "set it")
    require(workers is None or workers > 0, "num_workers >= 1, or null", workers, "set it")
    require(
        (target.suffix == ".zip") == (config.to == "zip"),
        "a file *.zip at output=" if config.to == "zip" else "a folder at output=",
        target,
        "give output=<folder>/<name>.zip" if config.to == "zip" else "give output=<folder>",
    )
    if config.to == "shards":
        engine()  # tells now, not after the work, where the extra is missing
    source = opened(
        config.source, split=config.split, classes=config.classes, background=config.background
    )
    _tell_source(config.source, source)
    crop = OmegaConf.to_container(config.crop, resolve=True)
    settings = Settings(size, config.channels, crop, config.background)
    digests = [digest_of(source, settings, span) for span in spans(len(source))]
    identity = hashlib.sha256("".join(digests).encode()).hexdigest()
    parts = target.with_name(f".{target.name}.parts")
    if target.exists():
        facts = _facts_of(target)
        require(
            facts.get("identity") == identity,
            f"output={target} to be new, or made from this source with these settings",
            "something else",
            "choose another output=, or move the old one away",
        )
        shutil.rmtree(parts, ignore_errors=True)
        print(f"nothing to do: {target} is made from this source with these settings")
        _tell_result(target, facts)
        return
    parts.mkdir(parents=True, exist_ok=True)
    files = [parts / f"{n:08d}_{digest}.zip" for n, digest in enumerate(digests)]
    chunks = list(_finished(source, settings, files, workers))
    facts = {"identity": identity} | _summary(source, chunks, config.on_bad)
    joined = parts / "joined.zip"
    join(chunks, joined, labelled=bool(source.class_names), facts=facts)
    os.replace(joined if config.to == "zip" else _sharded(joined, facts), target)
    shutil.rmtree(parts)
    _tell_result(target, facts)


# ------------------------------------------------------------------------------------ chunks


def spans(size: int) -> list[range]:
    """The numbers of the images of each chunk."""
    return [range(first, min(first + CHUNK, size)) for first in range(0, size, CHUNK)]


def digest_of(source: Encoded | Held, settings: Settings, span: range) -> str:
    """Names what a chunk is made from: the settings, and each image by name, class and what changes when it does."""
    given = {n: v for n, v in asdict(settings).items() if n != "background" or v is not None}
    found = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
    for index in span:
        stamp = source.stamp(index)
        head = f"{index} {name_of(source, index)} {int(source.labels[index])} {len(stamp)} "
        found.update(head.encode(errors="surrogateescape") + stamp)
    return found.hexdigest()[:32]


def name_of(source: Encoded | Held, index: int) -> str:
    """What an image is called in its source."""
    return f"{source.where}/{source.names[index]}" if isinstance(source, Encoded) else f"#{index}"


class Worker:
    """Makes chunks. Every process has its own, so that the source is sent to each once."""

    here: "Worker"

    def __init__(self, source: Encoded | Held, settings: Settings) -> None:
        self.source, self.settings = source, settings
        self.crop: Crop = instantiate(settings.crop)

    @classmethod
    def start(cls, source: Encoded | Held, settings: Settings, parent: int) -> None:
        """Makes the worker of this process, which ends with its parent."""
        die_with(parent)
        cls.here = cls(source, settings)

    @classmethod
    def work(cls, span: range, file: Path) -> int:
        """Has this process's worker make a chunk; returns its number of images."""
        cls.here.make(span, file)
        return len(span)

    def make(self, span: range, file: Path) -> None:
        """Writes the images of one chunk, as PNG without compression, and its facts; the file is whole or not there."""
        written, bad = [], []
        unfinished = file.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            for index in span:
                try:
                    image, label = self.image(index)
                except ImageError as error:
                    bad.append(f"{error.name}: {error.reason}")
                    continue
                png = io.BytesIO()
                image.save(png, format="PNG", compress_level=0, optimize=False)
                archive.writestr(entry(str(index)), png.getvalue())
                pixels = np.asarray(image).reshape(image.height * image.width, -1)
                means = pixels.mean(axis=0, dtype=np.float64).tolist()
                name = name_of(self.source, index)
                written.append(Written(index, name, label, image.height, image.width, means))
            facts = {"written": [asdict(image) for image in written], "bad": bad}
            archive.writestr(entry(FACTS), json.dumps(facts))
        os.replace(unfinished, file)

    def image(self, index: int) -> tuple[PILImage.Image, int]:
        """An image of the source as the settings want it, and its class index."""
        pixels, label = self.source[index]
        image = to_picture(pixels)
        if self.settings.channels is not None:
            image = image.convert(MODES[self.settings.channels])
        if self.settings.resolution is not None:
            image = self.crop(image, self.settings.resolution)
        return image, label


def entry(name: str) -> zipfile.ZipInfo:
    """The head of an entry, the same on every machine and at every time."""
    head = zipfile.ZipInfo(name, EARLIEST)
    head.create_system, head.external_attr = 3, 0o644 << 16
    return head


def _finished(
    source: Encoded | Held, settings: Settings, files: Sequence[Path], workers: int | None
) -> Iterator[Chunk]:
    """All chunks in order, made where they are missing; stops at the first image that mixes sizes or modes."""
    all_spans = zip(spans(len(source)), files, strict=True)
    missing = {file: span for span, file in all_spans if not file.is_file()}
    done = len(source) - sum(len(span) for span in missing.values())
    if done > 0:
        print(f"continued   {done:,} images are there already")
    first: Written | None = None
    with (
        closing(_make(source, settings, missing, workers)) as made,
        tqdm(total=len(source), initial=done, unit="img", desc="preparing") as bar,
    ):
        for file in files:
            if file in missing:
                bar.update(next(made))
            chunk = _read_chunk(file)
            for image in chunk.written:
                first = first or image
                _require_alike(first, image)
            yield chunk


def _make(
    source: Encoded | Held, settings: Settings, missing: Mapping[Path, range], workers: int | None
) -> Generator[int, None, None]:
    """Makes the chunks; the number of images of each as it is there, in order.

    Processes are started fresh, because threads do not survive a fork. That takes seconds, so that small sets are made
    in this one unless `workers` says otherwise.
    """
    images = sum(len(span) for span in missing.values())
    workers = min(workers or min(os.cpu_count() or 1, images // WORTH_A_PROCESS), len(missing))
    if workers <= 1:
        worker = Worker(source, settings)
        for file, span in missing.items():
            worker.make(span, file)
            yield len(span)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=Worker.start,
        initargs=(source, settings, os.getpid()),
    ) as pool:
        try:
            with signals.blocked():
                made = pool.map(Worker.work, missing.values(), missing)
            yield from made
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what waits is not begun
            raise


def _require_alike(first: Written, image: Written) -> None:
    require(
        image.height == image.width,
        f"square images, or resolution=<pixels> to crop them, for {image.name}",
        image.kind,
        "add resolution=64, for example",
    )
    require(
        image.kind == first.kind,
        f"images of one size and mode, as {first.name} of {first.kind}",
        f"{image.name} of {image.kind}",
        "say what they shall become: resolution=<pixels>, and channels=1 for grey or channels=3 for RGB",
    )


def _read_chunk(file: Path) -> Chunk:
    with zipfile.ZipFile(file) as archive:
        facts = json.loads(archive.read(FACTS))
    return Chunk(file, [Written(**image) for image in facts["written"]], facts["bad"])


# ---------------------------------------------------------------------------------- the whole


def join(chunks: Sequence[Chunk], file: Path, *, labelled: bool, facts: dict[str, Any]) -> None:
    """The zip: 00000/img00000000.png ... in order, dataset.json, and the facts as the archive's comment."""
    table: list[list[Any]] = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for chunk in chunks:
            with zipfile.ZipFile(chunk.file) as part:
                for image in chunk.written:
                    number = f"{len(table):08d}"
                    name = f"{number[:5]}/img{number}.png"
                    archive.writestr(entry(name), part.read(str(image.index)))
                    table.append([name, image.label])
        labels = {"labels": table if labelled else None}
        archive.writestr(entry(LABELS), json.dumps(labels))
        archive.comment = json.dumps(facts, sort_keys=True).encode()
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _sharded(prepared: Path, facts: dict[str, Any]) -> Path:
    """The folder of shards of a prepared zip, beside it; written on where it was interrupted."""
    labelled = facts["num_classes"] is not None
    source = Archive(path=str(prepared), classes=labelled, **PLAIN)
    folder = prepared.with_name("shards")
    write_shards(source, folder, num_workers=os.cpu_count() or 1)
    (folder / PREPARED).write_text(json.dumps(facts, sort_keys=True))
    return folder


def _summary(source: Encoded | Held, chunks: Sequence[Chunk], on_bad: str) -> dict[str, Any]:
    """Count, size, classes and channel means; says which images cannot be used, and stops there if so asked."""
    bad = [line for chunk in chunks for line in chunk.bad]
    images = [image for chunk in chunks for image in chunk.written]
    if bad:
        print(f"{len(bad):,} of {len(source):,} images cannot be used:")
        for line in bad:
            print(f"  {line}")
    if bad and (on_bad == "stop" or not images):
        raise UserError(
            f"expected images that can be used, all {len(source):,} of them\n"
            f"  got: {len(bad):,} that cannot, listed above\n"
            "  do: mend or remove them and run the command again, which goes on from here, or leave them out with on_bad=skip"
        )
    counts = Counter(image.label for image in images).values()
    return {
        "count": len(images),
        "left_out": len(bad),
        "resolution": images[0].height,
        "channels": len(images[0].means),
        "num_classes": len(source.class_names) or None,
        "images_per_class": [min(counts), max(counts)],
        "channel_means": np.mean([image.means for image in images], axis=0).round(4).tolist(),
    }


def _facts_of(target: Path) -> dict[str, Any]:
    """What an earlier run wrote of its zip or shards; nothing of what is none of ours."""
    try:
        if target.is_dir():
            return json.loads((target / PREPARED).read_text())
        with zipfile.ZipFile(target) as archive:
            facts = json.loads(archive.comment)
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}
    return facts if isinstance(facts, dict) else {}


def _tell_source(given: str, source: Encoded | Held) -> None:
    classes = f"{len(source.class_names)} classes" if source.class_names else "no classes"
    print(f"source      {given} ({type(source).__name__}): {len(source):,} images, {classes}")


def _tell_result(target: Path, facts: dict[str, Any]) -> None:
    size, channels, classes = facts["resolution"], facts["channels"], facts["num_classes"]
    least, most = facts["images_per_class"]
    means = " ".join(f"{mean:.2f}" for mean in facts["channel_means"])
    print(f"images      {facts['count']:,}, left out {facts['left_out']:,}")
    print(f"size        {size}x{size}, {'grey' if channels == 1 else 'RGB'}")
    print(f"classes     {f'{classes}, of {least:,} to {most:,} images' if classes else 'none'}")
    print(f"means       {means} (of 0 to 255, by channel)")
    print(f"written     {target}")
    kind = "zip" if target.is_file() else "stream"
    options = [f"data={kind}", f"data.path={target}"]
    options += [f"data.image_size={size}", f"data.channels={channels}"]
    if classes:
        options += [f"data.num_classes={classes}"]
        options += ["data.source.classes=true"] if kind == "zip" else []
    print(f"train on it {shell_line('train', *options)}")
