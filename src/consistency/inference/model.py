"""A model from a checkpoint; its numbered samples and edits, drawn by one process or several.

Noise and label of number i depend on (seed, i) alone: batches and devices change nothing but roundings.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from consistency import editing
from consistency.denoiser import Denoiser
from consistency.errors import UserError, require
from consistency.inference.card import ModelCard
from consistency.pixels import quantised, to_uint8, to_unit
from consistency.randomness import SampleNoise, generator
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


@dataclass(frozen=True)
class Model:
    """A denoiser from a checkpoint; `weights` is the name of its set of weights."""

    denoiser: Denoiser
    card: ModelCard
    path: Path
    weights: str
    format: str

    def denoise(self, x_t: Data, t: Time, label: Label = None) -> Data:
        """Return the estimate of x_0: D(x_t, t) of a teacher, f(x_t, t) of a consistency model.

        label: class indices; None stands for "no class" in conditional networks that have an index for it.
        """
        no_class = getattr(self.denoiser.network, "no_class", None)
        if label is None and no_class is not None and self.card.num_classes is not None:
            label = torch.full(x_t.shape[:1], no_class, device=x_t.device)
        return self.denoiser(x_t, t, label)

    __call__ = denoise

    def _request(self, labels: object, seed: int) -> Request:
        return Request(denoise=self, card=self.card, labels=labels, seed=seed, device=self.device)

    @property
    def device(self) -> torch.device:
        """The device of the weights; `model.denoiser.to(device)` moves them."""
        return next(self.denoiser.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        return self.card.shape

    def sample(
        self,
        count: int,
        *,
        steps: int = 1,
        seed: int = 0,
        labels: int | str | Sequence[int | str] | None = None,
        sampler: Sampler | None = None,
        batch_size: int = 64,
    ) -> UInt8[Tensor, "n c h w"]:
        """Draw `count` images; image i depends on (seed, i) alone.

        steps: evaluations of a consistency model, points of the grid for a teacher.
        labels: a class, or several that are repeated in turn; None draws them at random.
        sampler: one of `consistency.samplers` with its settings; None takes that of the card.
        """
        require(count >= 1, "at least one image", count, "ask for more")
        sampler = sampler or self.card.sampler(steps)
        return samples(self._request(labels, seed), sampler, count, batch_size)

    def edit(
        self,
        images: UInt8[Tensor, "n c h w"],
        pairing: editing.Pairing,
        *,
        outputs: int = 1,
        seed: int = 0,
        labels: int | str | Sequence[int | str] | None = None,
        times: Sequence[float] | None = None,
        start: editing.Start = "reference",
        batch_size: int = 64,
    ) -> UInt8[Tensor, "n m c h w"]:
        """Edit images by Algorithm 4 of Song et al. 2023; return `outputs` of each.

        pairing: the known part of an image, `consistency.editing.colorize` or another.
        labels: a class for each image in turn; None draws them at random.
        times: noise levels of the evaluations; None takes the published grid.
        """
        shape = tuple(images.shape[1:])
        require(shape == self.shape, f"images of shape {self.shape}", shape, "resize them first")
        grid = self.card.process.grid
        loop = partial(
            editing.edit,
            task=pairing(self.shape, generator(seed, "edit")),
            times=editing.grid_times(grid) if times is None else times,
            t_min=grid.t_min,
            start=start,
            clip=True,
        )
        request = self._request(labels, seed)
        x_0 = edits(request, loop, to_unit(images), outputs=outputs, batch_size=batch_size)
        return to_uint8(x_0).unflatten(0, (len(images), outputs))


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

    def edited(numbers: Tensor, y: Data, label: Label) -> tuple[Data]:
        noise = SampleNoise(request.seed, numbers.tolist(), y.shape[1:], request.device)
        return (edit(request.denoise, noise, y, label=label),)

    numbers, each = torch.arange(len(y) * outputs), y.repeat_interleave(outputs, 0)
    labels = request.card.edit_labels(request.labels, request.seed, len(y), outputs)
    return by_batch(edited, request, batch_size, numbers, each, labels)[0]


def by_batch(
    function: Callable[..., tuple[Tensor, ...]], request: Request, size: int, *inputs: Tensor | None
) -> list[Tensor]:
    """Apply a function to batches of tensors on the device, and return its outputs whole, on the CPU."""
    outputs = []
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

    def draw(sampler: Sampler, batches: Batches) -> Iterator[Numbered]:
        with signals.blocked():  # a process that starts would answer Ctrl-C with a stack trace
            drawn = pool.map(partial(_generate, sampler), batches)
        return ((numbers, torch.from_numpy(pixels)) for numbers, pixels in drawn)

    try:
        yield draw
    except BrokenProcessPool as error:
        remedy = "look at the memory of the machine; the same command again goes on"
        raise UserError("processes that draw to the end", "one that was killed", remedy) from error
    finally:
        pool.shutdown(cancel_futures=True)


_request: Callable[[], Request]  # of a process that draws


def _start(parent: int, prepare: Callable[[int, int], Request], ranks: Any, processes: int) -> None:
    global _request
    signals.die_with(parent)
    _request = cache(partial(prepare, ranks.get(), processes))


def _generate(sampler: Sampler, numbers: Sequence[int]) -> tuple[Sequence[int], np.ndarray]:
    ((_, images),) = generate(_request(), sampler, [numbers])
    return numbers, images.cpu().numpy()
