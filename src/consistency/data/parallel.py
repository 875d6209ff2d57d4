"""Work on many images at once, in threads or in processes, and handles that each process opens for itself."""

import os
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from consistency.runtime import signals

T = TypeVar("T")
Write: TypeAlias = Callable[[range, Path], None]
"""Writes images of these numbers to a file, whole."""

IMAGES_PER_TASK = 64  # that a thread takes at once
IMAGES_PER_PROCESS = 2000  # for which starting another process pays


class PerProcess(Generic[T]):
    """A handle that each process opens for itself: open files survive neither a fork nor a pickle."""

    def __init__(self, opening: Callable[[], T]) -> None:
        self.opening = opening
        self.handle: tuple[int, T] | None = None

    def __call__(self) -> T:
        if self.handle is None or self.handle[0] != os.getpid():
            self.handle = None  # a parent's first: LMDB refuses to open a database twice
            self.handle = (os.getpid(), self.opening())
        return self.handle[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"opening": self.opening, "handle": None}


def in_threads(work: Callable[[int], T], count: int, title: str) -> list[T]:
    """Return work(0) ... work(count-1), run on all cores, which decoding leaves free, with a progress bar if many."""
    silent = getattr(rank_zero_only, "rank", 0) != 0 or count < 1000
    with ThreadPool() as pool:
        done = pool.imap(work, range(count), IMAGES_PER_TASK)
        return list(tqdm(done, title, count, unit="img", disable=silent, leave=False))


def write_missing(
    files: Mapping[Path, range], write: Write, *, workers: int | None, title: str, show: bool = True
) -> Generator[Path, None, None]:
    """Yield `files` in order, written by `write` in several processes if they are missing.

    Starting a process takes seconds, so few images are written in this process unless `workers` is given. Processes
    are spawned, as threads do not survive a fork, and die with this one.

    files: with the numbers of their images.
    show: whether to show progress.
    """
    missing = {file: span for file, span in files.items() if not file.is_file()}
    total, images = (sum(map(len, spans)) for spans in (files.values(), missing.values()))
    done = total - images
    if show and done:
        print(f"continued   {done:,} images are done already")
    workers = min(workers or min(os.cpu_count() or 1, images // IMAGES_PER_PROCESS), len(missing))
    mapped: Callable[..., Any] = partial(map, write)
    with ExitStack() as stack:
        if workers > 1:
            start = (write, os.getpid())  # the images of `write` are sent once a process
            pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, start)
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            mapped = partial(pool.map, _write_in_process)
        bar = tqdm(desc=title, total=total, initial=done, unit="img", disable=not show)
        stack.enter_context(bar)
        with signals.blocked():
            written = mapped(missing.values(), missing)
        for file, span in files.items():
            if file in missing:
                next(written)
                bar.update(len(span))
            yield file


_write_here: Write


def _start(write: Write, parent: int) -> None:
    global _write_here
    signals.die_with(parent)
    _write_here = write


def _write_in_process(span: range, file: Path) -> None:
    _write_here(span, file)
