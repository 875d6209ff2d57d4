"""Work on many images at once, in threads or in processes, and handles that each process opens for itself."""

import multiprocessing
import os
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from consistency.runtime import signals
from consistency.runtime.signals import die_with

T = TypeVar("T")

IMAGES_PER_TASK = 64
"""Images that a thread takes at once."""

IMAGES_PER_PROCESS = 2000
"""Images for which starting another process pays."""


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


def in_threads(work: Callable[[int], None], count: int, title: str) -> None:
    """Run work(0) ... work(count-1) on all cores, with a progress bar if there are many.

    Decoding releases the interpreter's lock, so threads suffice.
    """

    def run(first: int) -> int:
        last = min(first + IMAGES_PER_TASK, count)
        for index in range(first, last):
            work(index)
        return last - first

    silent = getattr(rank_zero_only, "rank", 0) != 0 or count < 1000
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=count, desc=title, unit="img", disable=silent, leave=False) as bar,
    ):
        for done in pool.map(run, range(0, count, IMAGES_PER_TASK)):
            bar.update(done)


def write_missing(
    files: Mapping[Path, range],
    write: Callable[[range, Path], None],
    *,
    workers: int | None,
    title: str,
    show: bool = True,
) -> Generator[Path, None, None]:
    """Yield `files` in order, written by `write` in several processes if they are missing.

    The processes die with this one. They are spawned, because threads do not survive a fork. That takes seconds, so
    that few images are written in this process unless `workers` is given.

    files: with the numbers of their images.
    write: writes a file whole; it is sent to each process once.
    show: whether to show progress.
    """
    missing = {file: span for file, span in files.items() if not file.is_file()}
    total, images = (sum(map(len, spans)) for spans in (files.values(), missing.values()))
    if show and images < total:
        print(f"continued   {total - images:,} images are done already")
    wanted = workers or min(os.cpu_count() or 1, images // IMAGES_PER_PROCESS)
    with (
        closing(_write(missing, write, min(wanted, len(missing)))) as written,
        tqdm(total=total, initial=total - images, unit="img", desc=title, disable=not show) as bar,
    ):
        for file, span in files.items():
            if file in missing:
                next(written)
                bar.update(len(span))
            yield file


def _write(
    files: Mapping[Path, range], write: Callable[[range, Path], None], workers: int
) -> Generator[None, None, None]:
    """Write files in order, yielding after each."""
    if workers <= 1:
        yield from map(write, files.values(), files)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(write, os.getpid()),
    ) as pool:
        try:
            with signals.blocked():
                written = pool.map(_write_in_process, files.values(), files)
            yield from written
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_write_here: Callable[[range, Path], None]


def _start(write: Callable[[range, Path], None], parent: int) -> None:
    global _write_here
    die_with(parent)
    _write_here = write


def _write_in_process(span: range, file: Path) -> None:
    _write_here(span, file)
