"""The command `prepare`: a zip in the form of NVlabs' dataset_tool, or shards, from any source of images."""

import hashlib
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from consistency.commands.overrides import shell_line
from consistency.data import shards
from consistency.data.cifar10 import CIFAR10
from consistency.data.huggingface import HuggingFace
from consistency.data.image_files import ImageFiles
from consistency.data.listing import has_labels
from consistency.data.lsun import FILE, Database
from consistency.data.memory import InMemory
from consistency.data.mnist import MNIST
from consistency.data.source import require_existing, require_split
from consistency.data.write_zip import Chunk, ChunkWriter, join
from consistency.data.zip_or_folder import Archive, Folder
from consistency.errors import require
from consistency.runtime.files import path_of

PREPARED = "prepared.json"
"""Beside shards: the facts that a zip has in its comment."""


def prepare(config: DictConfig, target: Path) -> None:
    """Make the set `output` from `source`; conf/prepare.yaml has the options."""
    _require_options(config, target)
    source = detect_source(
        config.source, split=config.split, classes=config.classes, background=config.background
    )
    kind, count = type(source).__name__, len(source.class_names)
    classes = f"{count} classes" if count else "no classes"
    print(f"source      {config.source} ({kind}): {len(source):,} images, {classes}")
    names = ["resolution", "channels", "crop", *(["background"] if config.background else [])]
    settings: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=True)
    writer = ChunkWriter(source, settings)
    parts = target.with_name(f".{target.name}.parts")
    files = writer.files(parts)
    digests = "".join(file.stem.partition("_")[2] for file in files)
    identity = hashlib.sha256(digests.encode()).hexdigest()
    if target.exists():
        facts = _facts_of(target)
        shards.require_same_settings(facts.get("identity"), identity, target, "a file or folder")
        print(f"nothing to do: {target} is made from this source with these settings")
    else:
        chunks = list(writer.write_all(files, config.num_workers))
        facts = {"identity": identity, "num_classes": count or None}
        facts |= _summary(chunks, len(source), config.on_bad)
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
    for valid, expected, got in (
        (config.to in shape, f"to= among {', '.join(shape)}", config.to),
        (config.on_bad in ("stop", "skip"), "on_bad=stop or skip", config.on_bad),
        (config.channels in (1, 3, None), "channels=1, 3 or null", config.channels),
        (size is None or size > 0, "a resolution of at least 1 pixel, or null", size),
        (workers is None or workers > 0, "num_workers >= 1, or null", workers),
        (
            (target.suffix == ".zip") == (config.to == "zip"),
            f"{shape.get(config.to)} at output=",
            target,
        ),
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
    expected, got = f"classes in source={source}, for classes=true", type(images).__name__
    fits = bool(images.class_names) or not classes
    require(fits, expected, f"{got}, a set without", "leave classes=false")
    return images


def _summary(chunks: Sequence[Chunk], total: int, on_bad: str) -> dict[str, Any]:
    """Return the facts of the images; print those that cannot be used, and refuse them unless they may be skipped."""
    images = [image for chunk in chunks for image in chunk.images]
    bad = [line for chunk in chunks for line in chunk.bad]
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
    try:
        if target.is_dir():
            return json.loads((target / PREPARED).read_text())
        with zipfile.ZipFile(target) as archive:
            facts = json.loads(archive.comment)
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}
    return facts if isinstance(facts, dict) else {}


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
