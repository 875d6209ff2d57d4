"""The command that makes a zip in the form of NVlabs' dataset_tool, or shards, of any source of images."""

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
from consistency.data.detect import detect_source
from consistency.data.shards import engine
from consistency.data.write_shards import require_same_settings, write_shards
from consistency.data.write_zip import Chunk, ChunkWriter, ImageSettings, join
from consistency.data.zip_or_folder import Archive
from consistency.errors import UserError, require

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
    crop = OmegaConf.to_container(config.crop, resolve=True)
    settings = ImageSettings(config.resolution, config.channels, crop, config.background)
    writer, parts = ChunkWriter(source, settings), target.with_name(f".{target.name}.parts")
    files = writer.files(parts)
    digests = "".join(file.stem.partition("_")[2] for file in files)
    identity = hashlib.sha256(digests.encode()).hexdigest()
    if target.exists():
        facts = _facts_of(target)
        require_same_settings(facts.get("identity"), identity, target, "a file or folder")
        shutil.rmtree(parts, ignore_errors=True)
        print(f"nothing to do: {target} is made from this source with these settings")
    else:
        parts.mkdir(parents=True, exist_ok=True)
        chunks = list(writer.write_all(files, config.num_workers))
        facts = {
            "identity": identity,
            **_count_bad(chunks, len(source), config.on_bad),
            **_summary(chunks),
            "num_classes": count or None,
        }
        _write(chunks, facts, target, parts)
        shutil.rmtree(parts)
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
    ):
        require(valid, expected, got, "choose one")
    require(
        (target.suffix == ".zip") == (config.to == "zip"),
        f"{shape[config.to]} at output=",
        target,
        "give output=<folder>/<name>.zip" if config.to == "zip" else "give output=<folder>",
    )
    if config.to == "shards":
        engine()  # fails before the work if the extra is missing


def _write(chunks: Sequence[Chunk], facts: dict[str, Any], target: Path, parts: Path) -> None:
    """Join the chunks to a zip, at `target` or, for shards there, in `parts`."""
    labelled = facts["num_classes"] is not None
    if target.suffix == ".zip":
        join(chunks, target, labelled=labelled, facts=facts)
        return
    file, folder = parts / "joined.zip", parts / "shards"
    join(chunks, file, labelled=labelled, facts=facts)
    source = Archive(path=str(file), classes=labelled)
    write_shards(source, folder)
    (folder / PREPARED).write_text(json.dumps(facts, sort_keys=True))
    folder.replace(target)


def _count_bad(chunks: Sequence[Chunk], total: int, on_bad: str) -> dict[str, int]:
    """Print the images that cannot be used; refuse them unless they may be skipped."""
    bad = [line for chunk in chunks for line in chunk.bad]
    if bad:
        print(f"{len(bad):,} of {total:,} images cannot be used:")
        for line in bad:
            print(f"  {line}")
    if bad and (on_bad == "stop" or len(bad) == total):
        raise UserError(
            f"images that can be used, all {total:,} of them",
            f"{len(bad):,} that cannot, listed above",
            "mend or remove them and run the command again, which continues from here, or leave them out with on_bad=skip",
        )
    return {"count": total - len(bad), "left_out": len(bad)}


def _summary(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Return size, images of the smallest and largest class, and channel means."""
    images = [image for chunk in chunks for image in chunk.images]
    counts = Counter(image.label for image in images).values()
    return {
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
    if classes:
        options += [f"data.num_classes={classes}"]
        options += ["data.source.classes=true"] if kind == "zip" else []
    print(f"images      {facts['count']:,}, left out {facts['left_out']:,}")
    print(f"size        {size}x{size}, {'grey' if channels == 1 else 'RGB'}")
    print(f"classes     {f'{classes}, of {least:,} to {most:,} images' if classes else 'none'}")
    print(f"means       {means} (of 0 to 255, by channel)")
    print(f"written     {target}")
    print(f"train on it {shell_line('train', *options)}")
