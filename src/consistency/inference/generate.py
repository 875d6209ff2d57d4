"""Numbered samples and edits, drawn by one process or several.

Noise and label of number i depend on (seed, i) alone: batches and devices change nothing but roundings.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from consistency.errors import UserError
from consistency.inference.card import ModelCard
from consistency.pixels import quantised
from consistency.randomness import SampleNoise
from consistency.runtime import signals
from consistency.samplers import Sampler
from consistency.tensors import Data, Denoise, sent

Batches: TypeAlias = Iterable[Sequence[int]]
"""Numbers of samples, batch by batch."""

Numbered: TypeAlias = tuple[Sequence[int], UInt8[Tensor, "_b _c _h _w"]]
"""Numbers of some samples, and the samples."""

Draw: TypeAlias = Callable[[Sampler, Batches], Iterator[Numbered]]
"""(sampler, batches) -> the samples of every batch in turn."""

AHEAD = 2
"""Batches of a process that may wait for their reader."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that samples depend on, except the sampler and their numbers.

    denoise: the model, on `device`.
    card: its shape and classes.
    labels: classes of the samples, as `ModelCard.labels` takes them.
    seed: of noise and random labels.
    """

    denoise: Denoise
    card: ModelCard
    labels: object = None
    seed: int = 0
    device: torch.device | str = "cpu"


def in_batches(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut numbers into batches."""
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def generate(request: Request, sampler: Sampler, batches: Batches) -> Iterator[Numbered]:
    """Yield numbers and uint8 samples of every batch, on the device of the request."""
    card, device = request.card, request.device
    for numbers in batches:
        noise = SampleNoise(request.seed, numbers, card.shape, device)
        labels = card.labels(request.labels, request.seed, numbers)
        label = None if labels is None else sent(labels, device)
        with torch.inference_mode():
            images = quantised(sampler(request.denoise, noise, label))
        yield numbers, images


def samples(
    request: Request, sampler: Sampler, count: int, batch_size: int
) -> UInt8[Tensor, "n c h w"]:
    """Return samples number 0 to count - 1, on the CPU."""
    batches = generate(request, sampler, in_batches(range(count), batch_size))
    return torch.cat([images for _, images in batches]).cpu()


def edits(
    request: Request, edit: Callable[..., Data], y: Data, *, outputs: int, batch_size: int
) -> Float[Tensor, "m c h w"]:
    """Return `outputs` edits of every image of y in turn, in [-1, 1] on the CPU.

    edit: `consistency.editing.edit` with its settings: (denoise, noise, images, label=...) -> edited images.
    """
    labels = request.card.edit_labels(request.labels, request.seed, len(y), outputs)
    parts = []
    for numbers in in_batches(range(len(y) * outputs), batch_size):
        rows = torch.tensor(numbers)
        noise = SampleNoise(request.seed, numbers, y.shape[1:], request.device)
        label = None if labels is None else labels[rows].to(request.device)
        with torch.inference_mode():
            part = edit(request.denoise, noise, y[rows // outputs].to(request.device), label=label)
        parts.append(part.cpu())
    return torch.cat(parts)


@contextmanager
def drawing(prepare: Callable[[int, int], Request], processes: int) -> Iterator[Draw]:
    """Yield `generate` with a request of this process, or the same on several processes of this machine.

    prepare: (rank, processes) -> the request of a process, with the model on its device; it is pickled.
    """
    if processes == 1:
        yield partial(generate, prepare(0, 1))
        return
    with ExitStack() as stack:
        workers = [ProcessPoolExecutor(1, get_context("spawn")) for _ in range(processes)]
        for worker in workers:
            stack.callback(worker.shutdown, cancel_futures=True)
        try:
            with signals.blocked():  # a process that starts would answer Ctrl-C with a stack trace
                ready = [
                    worker.submit(_prepare, os.getpid(), prepare, rank, processes)
                    for rank, worker in enumerate(workers)
                ]
            for future in ready:
                future.result()
            yield partial(_generate_on, workers)
        except BrokenProcessPool as error:
            raise UserError(
                "processes that draw to the end",
                "one that was killed",
                "look at the memory of the machine; the same command again goes on",
            ) from error


def _generate_on(
    workers: Sequence[ProcessPoolExecutor], sampler: Sampler, batches: Batches
) -> Iterator[Numbered]:
    waiting: deque[Future[tuple[Sequence[int], np.ndarray]]] = deque()

    def first() -> Numbered:
        numbers, pixels = waiting.popleft().result()
        return numbers, torch.from_numpy(pixels)

    for position, numbers in enumerate(batches):
        if position >= AHEAD * len(workers):
            yield first()
        waiting.append(workers[position % len(workers)].submit(_generate, sampler, numbers))
    while waiting:
        yield first()


_request: Request
"""Of a process that draws."""


def _prepare(
    parent: int, prepare: Callable[[int, int], Request], rank: int, processes: int
) -> None:
    global _request
    signals.die_with(parent)
    _request = prepare(rank, processes)


def _generate(sampler: Sampler, numbers: Sequence[int]) -> tuple[Sequence[int], np.ndarray]:
    ((_, images),) = generate(_request, sampler, [numbers])
    return numbers, images.cpu().numpy()
