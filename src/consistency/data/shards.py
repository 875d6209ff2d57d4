"""Writes any source of images as the shards that `consistency.data.stream` reads."""

import io
import json
import multiprocessing
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from consistency.data.source import Source
from consistency.data.stream import INDEX, engine
from consistency.errors import require
from consistency.randomness import generator
from consistency.runtime.signals import die_with

UNFINISHED = "unfinished.json"


def write_shards(
    source: Source,
    folder: Path,
    *,
    num_workers: int = 1,
    shard_bytes: int = 64_000_000,
    seed: int = 0,
    show: bool = True,
) -> int:
    """Writes all images of `source` into `folder` and returns their number.

    In an order drawn from `seed`, the same for any number of workers: a stream mixes only neighbouring shards, so a set
    sorted by class must not stay sorted. Pixels are stored as they are, height x width x channels bytes an image.
    shard_bytes: size of a shard at most; num_workers: processes that read and write; show: a progress bar. Complete
    shards of as many images are left as they are, and what an interrupted call with the same settings has written is
    kept; a folder with anything else is a UserError. The source must be picklable. Must be called under
    `if __name__ == "__main__"`, as anything that starts processes.
    """
    litdata = engine()
    from litdata.processing.data_processor import DataProcessor

    require(len(source) >= 1, "a source with images", "none", "check its path")
    present = written(folder)
    if present == len(source):
        return present
    begun = folder / UNFINISHED
    settings = json.dumps([len(source), num_workers, shard_bytes, seed])
    ours = begun.is_file() and begun.read_text() == settings
    require(
        present is None and (ours or not folder.exists() or not any(folder.iterdir())),
        f"a new or empty folder for the shards of {len(source)} images at {folder}",
        f"shards of {present} images"
        if present is not None
        else "an interrupted writing with other settings"
        if begun.is_file()
        else "a folder with content",
        "choose another output=, or move the old one away",
    )
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(settings)
    order = torch.randperm(len(source), generator=generator(seed, "shards")).tolist()
    if _counted(folder) is None:
        # at Ctrl-C it would end this process with status 0
        DataProcessor._signal_handler = staticmethod(signal.default_int_handler)
        before = signal.getsignal(signal.SIGINT)
        try:
            with redirect_stdout(io.StringIO()):  # an advertisement and the diary of its workers
                litdata.optimize(
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
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
        finally:
            signal.signal(signal.SIGINT, before)
    count = _counted(folder)
    require(
        count == len(source),
        f"{len(source)} images in the shards at {folder}",
        count,
        "see the messages above; delete the folder and write again",
    )
    begun.unlink()
    return len(source)


class Items:
    """The images of a source by number, as litdata stores them; a worker that is sent this ends with who sends it."""

    def __init__(self, source: Source) -> None:
        self.source, self.sender = source, os.getpid()

    def __call__(self, index: int) -> dict[str, Any]:
        image, label = self.source[index]
        return {"image": image.contiguous(), "label": int(label)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if os.getpid() != self.sender:
            die_with(self.sender)
            from litdata.processing import data_processor

            data_processor.Process = (
                Belonging  # what the worker starts itself waits for it for ever
            )


class Belonging(multiprocessing.Process):
    """A process that ends with the one that makes it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.maker = os.getpid()

    def run(self) -> None:
        """Does its work, for as long as its maker lives."""
        die_with(self.maker)
        super().run()


def written(folder: Path) -> int | None:
    """The number of images in a folder of complete shards, None where there are none."""
    return None if (folder / UNFINISHED).exists() else _counted(folder)


def _counted(folder: Path) -> int | None:
    file = folder / INDEX
    if not file.is_file():
        return None
    shards: list[dict[str, Any]] = json.loads(file.read_text())["chunks"]
    return sum(int(shard["chunk_size"]) for shard in shards)
