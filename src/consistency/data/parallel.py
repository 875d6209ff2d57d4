"""Work on many images at once, in threads or in processes."""

import multiprocessing
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from consistency.orphans import end_with
from consistency.runtime import interrupt

IMAGES_PER_TASK = 64
"""Images that a thread takes at once."""

IMAGES_PER_PROCESS = 2000
"""Images for which starting another process pays."""


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


def in_processes(
    work: Callable[..., int], tasks: Sequence[tuple[Any, ...]], *, images: int, workers: int | None
) -> Generator[int, None, None]:
    """Yield the results of work(*task), in order, from processes that die with this one.

    Processes are spawned, because threads do not survive a fork. That takes seconds, so that few images are worked
    on in this process unless `workers` is given. Each process receives `work` once.
    """
    wanted = workers or min(os.cpu_count() or 1, images // IMAGES_PER_PROCESS)
    if min(wanted, len(tasks)) <= 1:
        yield from (work(*task) for task in tasks)
        return
    with ProcessPoolExecutor(
        min(wanted, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(work, os.getpid()),
    ) as pool:
        try:
            with interrupt.held():
                results = pool.map(_run, tasks)
            yield from results
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_work: Callable[..., int]


def _start(work: Callable[..., int], parent: int) -> None:
    global _work
    end_with(parent)
    _work = work


def _run(task: tuple[Any, ...]) -> int:
    return _work(*task)
