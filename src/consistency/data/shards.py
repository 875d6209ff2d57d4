"""Writes any source of images as the shards that `consistency.data.stream` reads."""

import io
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from consistency.data.source import Source
from consistency.data.stream import INDEX, engine
from consistency.errors import require
from consistency.orphans import end_with
from consistency.randomness import generator
from consistency.runtime.files import write_text

UNFINISHED = "unfinished.json"
"""In a folder of incomplete shards: the settings they are written with."""


def write_shards(
    source: Source,
    folder: Path,
    *,
    num_workers: int = 1,
    shard_bytes: int = 64_000_000,
    seed: int = 0,
    show: bool = True,
) -> int:
    """Write all images of a source, which must be picklable, and return their number.

    The order is drawn from `seed`, the same for any number of workers: a stream mixes only neighbouring shards, so a
    set sorted by class must not stay sorted. Pixels are stored as they are, height x width x channels bytes an image.
    Complete shards of as many images stay, and an interrupted call with the same settings is continued; other
    folders are refused. As this starts processes, call it under `if __name__ == "__main__"`.

    folder: of the shards.
    num_workers: processes that read and write.
    shard_bytes: largest size of a shard.
    show: whether to show a progress bar.
    """
    require(len(source) >= 1, "a source with images", "none", "check its path")
    if count_images(folder) == len(source):
        return len(source)
    _begin(folder, [len(source), num_workers, shard_bytes, seed])
    if _count_indexed(folder) is None:
        order = torch.randperm(len(source), generator=generator(seed, "shards")).tolist()
        with _killable():
            engine().optimize(
                Items(source),
                order,
                str(folder),
                chunk_bytes=shard_bytes,
                num_workers=num_workers,
                keep_data_ordered=True,
                reorder_files=False,
                use_checkpoint=True,
                verbose=show,
            )
    count = _count_indexed(folder)
    require(
        count == len(source),
        f"{len(source)} images in the shards at {folder}",
        count,
        "see the messages above; delete the folder and write again",
    )
    (folder / UNFINISHED).unlink()
    return len(source)


def count_images(folder: Path) -> int | None:
    """Return the number of images in a folder of complete shards, None for other folders."""
    return None if (folder / UNFINISHED).exists() else _count_indexed(folder)


def _count_indexed(folder: Path) -> int | None:
    file = folder / INDEX
    if not file.is_file():
        return None
    shards: list[dict[str, Any]] = json.loads(file.read_text())["chunks"]
    return sum(int(shard["chunk_size"]) for shard in shards)


def _begin(folder: Path, settings: list[int]) -> None:
    """Make the folder and note the settings in it; refuse a folder with other content."""
    unfinished, count = folder / UNFINISHED, count_images(folder)
    if unfinished.is_file():
        before = json.loads(unfinished.read_text())
        require_same_settings(before, settings, folder, "an interrupted writing of shards")
    elif folder.exists() and any(folder.iterdir()):
        content = "a folder with content" if count is None else f"shards of {count} images"
        require_same_settings(count, settings, folder, content)
    write_text(unfinished, json.dumps(settings))


def require_same_settings(before: object, now: object, output: Path, content: str) -> None:
    """Refuse to continue the work at `output`, which has this content, with other settings than before."""
    require(
        before == now,
        f"output={output} to be new, or begun from the same images with the same settings",
        f"{content}, from others",
        "choose another output=, or move the old one away",
    )


@contextmanager
def _killable() -> Iterator[None]:
    """Let Ctrl-C end litdata with all its processes, and hide what it prints."""
    from litdata.processing.data_processor import DataProcessor

    # its own handler ends this process with status 0
    DataProcessor._signal_handler = staticmethod(signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        signal.signal(signal.SIGINT, before)


class Items:
    """The images of a source by number, as litdata stores them. A worker that receives this dies with its sender."""

    def __init__(self, source: Source) -> None:
        self.source, self.sender = source, os.getpid()

    def __call__(self, index: int) -> dict[str, Any]:
        image, label = self.source[index]
        return {"image": image.contiguous(), "label": int(label)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if os.getpid() != self.sender:
            end_with(self.sender)
            from litdata.processing import data_processor

            data_processor.Process = ChildProcess  # otherwise its own children wait for it for ever


class ChildProcess(multiprocessing.Process):
    """A process that dies with its parent."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.maker = os.getpid()

    def run(self) -> None:
        end_with(self.maker)
        super().run()
