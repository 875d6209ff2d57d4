"""Writes any source of images as the shards that `consistency.data.shards` reads."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from consistency.data.parallel import write_missing
from consistency.data.shards import INDEX, engine
from consistency.data.source import Source
from consistency.errors import require
from consistency.randomness import generator
from consistency.runtime.files import write_text

UNFINISHED = "unfinished.json"
"""In a folder of incomplete shards: the settings they are written with."""


def write_shards(
    source: Source,
    folder: Path,
    *,
    num_workers: int | None = None,
    shard_bytes: int = 64_000_000,
    seed: int = 0,
    show: bool = True,
) -> int:
    """Write all images of a source, which must be picklable, and return their number.

    The order is drawn from `seed`: a stream mixes only neighbouring shards, so a set sorted by class must not stay
    sorted. Pixels are stored as they are, height x width x channels bytes an image. The shards do not depend on the
    number of workers. Complete shards of as many images stay, and an interrupted call with the same settings is
    continued; other folders are refused. As this starts processes, call it under `if __name__ == "__main__"`.

    folder: of the shards.
    num_workers: processes that read and write; None for as many as there are cores and enough images for.
    shard_bytes: largest size of a shard.
    show: whether to show a progress bar.
    """
    engine()
    count = len(source)
    require(count >= 1, "a source with images", "none", "check its path")
    if count_images(folder) == count:
        return count
    _begin(folder, [count, shard_bytes, seed])
    order = torch.randperm(count, generator=generator(seed, "shards")).tolist()
    writer = ShardWriter(source, order, folder, shard_bytes)
    files = list(
        write_missing(writer.files(), writer.write, workers=num_workers, title="writing", show=show)
    )
    indices = [json.loads(file.read_text()) for file in files]
    shards = [shard for index in indices for shard in index["chunks"]]
    write_text(folder / INDEX, json.dumps({"chunks": shards, "config": indices[0]["config"]}))
    for file in [*files, folder / UNFINISHED]:
        file.unlink()
    return count


def count_images(folder: Path) -> int | None:
    """Return the number of images in a folder of complete shards, None for other folders."""
    file = folder / INDEX
    if (folder / UNFINISHED).exists() or not file.is_file():
        return None
    return sum(int(shard["chunk_size"]) for shard in json.loads(file.read_text())["chunks"])


def _begin(folder: Path, settings: list[int]) -> None:
    """Make the folder and note the settings in it; refuse a folder with other content."""
    unfinished, count = folder / UNFINISHED, count_images(folder)
    if unfinished.is_file():
        before = json.loads(unfinished.read_text())
        require_same_settings(before, settings, folder, "interrupted shards")
    elif folder.exists() and any(folder.iterdir()):
        content = "a folder with content" if count is None else f"shards of {count} images"
        require_same_settings(count, settings, folder, content)
    write_text(unfinished, json.dumps(settings))
    for part in folder.glob(f"{PART}*"):
        shutil.rmtree(part)


def require_same_settings(before: object, now: object, output: Path, content: str) -> None:
    """Refuse to continue the work at `output`, which has this content, with other settings than before."""
    require(
        before == now,
        f"output={output} to be new, or begun from the same images with the same settings",
        f"{content}, made otherwise",
        "choose another output=, or move the old one away",
    )


PART = "part_"
"""Begins the names of folders of shards that are being written."""


@dataclass(frozen=True)
class ShardWriter:
    """Images of a source in an order, written as shards. As all images have one shape, so have all shards but the last."""

    source: Source
    order: Sequence[int]
    folder: Path
    shard_bytes: int

    def files(self) -> dict[Path, range]:
        """Return the file that describes each shard, written after it, with the positions of its images."""
        with TemporaryDirectory(dir=self.folder, prefix=PART) as part:
            item, _ = self._writer(part, 0).serialize(self._item(0))
        count, total = max(1, self.shard_bytes // len(item)), len(self.order)
        spans = [range(n, min(n + count, total)) for n in range(0, total, count)]
        return {self.folder / f"{number}.json": span for number, span in enumerate(spans)}

    def write(self, span: range, file: Path) -> None:
        """Write a shard and its description."""
        with TemporaryDirectory(dir=self.folder, prefix=PART) as part:
            writer = self._writer(part, int(file.stem))
            for position in span:
                writer.add_item(position, self._item(position))
            writer.done()
            (shard,), (index,) = Path(part).glob("*.bin"), Path(part).glob("*.json")
            os.replace(shard, self.folder / shard.name)
            os.replace(index, file)

    def _item(self, position: int) -> dict[str, Any]:
        image, label = self.source[self.order[position]]
        return {"image": image.contiguous(), "label": int(label)}

    def _writer(self, folder: str, number: int) -> Any:
        from litdata.streaming.writer import BinaryWriter

        return BinaryWriter(folder, chunk_bytes=self.shard_bytes, chunk_index=number)
