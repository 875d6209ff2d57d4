"""Numbered samples and edits, drawn by one process or several.

Noise and label of number i depend on (seed, i) alone: batches and devices change nothing but roundings.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import repeat
from multiprocessing import get_context
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from consistency.editing import ImageSpace, Space
from consistency.errors import UserError
from consistency.inference.autoencoder import Autoencoder, autoencoder_of
from consistency.inference.card import ModelCard
from consistency.pixels import quantised
from consistency.randomness import SampleNoise
from consistency.runtime import signals
from consistency.samplers import Sampler
from consistency.tensors import Data, Denoise, Label, Time, sent

# Numbers of samples, batch by batch; numbers with their samples; and (sampler, batches) -> the samples of each in turn.
Batches: TypeAlias = Iterable[Sequence[int]]
Numbered: TypeAlias = tuple[Sequence[int], UInt8[Tensor, "_b _c _h _w"]]
Draw: TypeAlias = Callable[[Sampler, Batches], Iterator[Numbered]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that samples depend on, except the sampler and their numbers.

    denoise: the model, on `device`.
    labels: classes of the samples, as `ModelCard.labels` takes them.
    """

    denoise: Denoise
    card: ModelCard
    labels: object = None
    seed: int = 0
    device: torch.device | str = "cpu"

    @property
    def space(self) -> Space:
        """Images to x_0 and back: the same, or the autoencoder of latents; `UserError` if it is missing, or another."""
        latents = self.card.latents
        return ImageSpace() if latents is None else autoencoder_of(latents, self.device)

    def decode(self, x_0: Data) -> UInt8[Tensor, "b _c _h _w"]:
        """Return x_0 as images of 0 ... 255, on its device; latents are decoded."""
        space = self.space
        return space.images(x_0) if isinstance(space, Autoencoder) else quantised(x_0)


def counting(request: Request) -> tuple[Request, list[int]]:
    """Return the request with a denoiser that notes the size of each batch it is called with, and these sizes."""
    sizes, denoise = list[int](), request.denoise

    def noted(x_t: Data, t: Time, label: Label = None, **end: Time) -> Data:
        sizes.append(len(x_t))
        return denoise(x_t, t, label, **end)

    return replace(request, denoise=noted), sizes


def fitting_batch(shape: Sequence[int], device: torch.device | str) -> int:
    """Return how many images (c, h, w) keep a device busy and fit its memory beside a network for them: 1 to 256.

    They have 65,536 pixels on a CPU and 262,144 elsewhere, 64 images of 32x32 and of 64x64: larger batches of small images
    are faster, of large images only larger.
    """
    pixels = 1 << (16 if torch.device(device).type == "cpu" else 18)
    images = min(256, max(1, pixels // (shape[1] * shape[2])))
    return 1 << (images.bit_length() - 1)


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
            images = request.decode(sampler(request.denoise, noise, label))
        yield numbers, images


def samples(
    request: Request, sampler: Sampler, count: int, batch_size: int | None = None
) -> UInt8[Tensor, "n c h w"]:
    """Return samples number 0 to count - 1, on the CPU."""
    size = batch_size or fitting_batch(request.card.shape, request.device)
    batches = generate(request, sampler, in_batches(range(count), size))
    return torch.cat([images for _, images in batches]).cpu()


def trajectory(
    request: Request, sampler: Sampler, count: int
) -> list[tuple[float, UInt8[Tensor, "n _c _h _w"]]]:
    """Return the time and the estimates of the first `count` samples at every evaluation."""
    estimates: list[tuple[float, Tensor]] = []

    def denoise(x_t: Data, t: Time, label: Label = None, **end: Time) -> Data:
        estimate = request.denoise(x_t, t, label, **end)
        estimates.append((float(t[0]), request.decode(estimate).cpu()))
        return estimate

    samples(replace(request, denoise=denoise), sampler, count, count)
    return estimates


def edits(
    request: Request, edit: Callable[..., Data], y: Data, *, outputs: int, batch_size: int | None
) -> Float[Tensor, "m c h w"]:
    """Return `outputs` edits of every image of y in turn, in [-1, 1] on the CPU.

    edit: `consistency.editing.edit` with its settings: (denoise, noise, images, label=...) -> edited images.
    """

    def edited(numbers: Tensor, y: Data, label: Label) -> tuple[Data]:
        noise = SampleNoise(request.seed, numbers.tolist(), request.card.shape, request.device)
        return (edit(request.denoise, noise, y, label=label),)

    numbers, each = torch.arange(len(y) * outputs), y.repeat_interleave(outputs, 0)
    labels = request.card.edit_labels(request.labels, request.seed, len(y), outputs)
    return by_batch(edited, request, batch_size, numbers, each, labels)[0]


def by_batch(
    function: Callable[..., tuple[Tensor, ...]],
    request: Request,
    size: int | None,
    *inputs: Tensor | None,
) -> list[Tensor]:
    """Apply a function to batches of tensors on the device, and return its outputs whole, on the CPU."""
    size, outputs = size or fitting_batch(request.card.shape, request.device), []
    for batch in zip(*(repeat(x) if x is None else x.split(size) for x in inputs), strict=False):
        with torch.inference_mode():
            values = function(*(x if x is None else x.to(request.device) for x in batch))
        outputs.append([value.cpu() for value in values])
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]


@contextmanager
def drawing(prepare: Callable[[int, int], Request], processes: int) -> Iterator[Draw]:
    """Yield `generate` with a request of this process, or the same on several processes of this machine.

    prepare: (rank, processes) -> the request of a process; it is pickled.
    """
    if processes == 1:
        yield partial(generate, prepare(0, 1))
        return
    context = get_context("spawn")
    ranks = context.SimpleQueue()
    for rank in range(processes):
        ranks.put(rank)
    pool = ProcessPoolExecutor(processes, context, _start, (os.getpid(), prepare, ranks, processes))
    try:
        yield partial(_generate_on, pool, 2 * processes)
    except BrokenProcessPool as error:
        remedy = "look at the memory of the machine; the same command again goes on"
        raise UserError("processes that draw to the end", "one that was killed", remedy) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _generate_on(
    pool: ProcessPoolExecutor, ahead: int, sampler: Sampler, batches: Batches
) -> Iterator[Numbered]:
    waiting: deque[Future[tuple[Sequence[int], np.ndarray]]] = deque()

    def first() -> Numbered:
        numbers, pixels = waiting.popleft().result()
        return numbers, torch.from_numpy(pixels)

    for numbers in batches:
        if len(waiting) == ahead:
            yield first()
        with signals.blocked():  # a process that starts would answer Ctrl-C with a stack trace
            waiting.append(pool.submit(_generate, sampler, numbers))
    while waiting:
        yield first()


_request: Callable[[], Request]  # of a process that draws


def _start(parent: int, prepare: Callable[[int, int], Request], ranks: Any, processes: int) -> None:
    global _request
    signals.die_with(parent)
    _request = cache(partial(prepare, ranks.get(), processes))


def _generate(sampler: Sampler, numbers: Sequence[int]) -> tuple[Sequence[int], np.ndarray]:
    ((_, images),) = generate(_request(), sampler, [numbers])
    return numbers, images.cpu().numpy()
