"""Generation of numbered samples and edits: noise and label of number i depend on (seed, i) alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from consistency.editing import Start, Task, edit
from consistency.errors import require
from consistency.grids import KarrasGrid
from consistency.pixels import quantised
from consistency.randomness import SampleNoise, generator
from consistency.samplers import Sampler, heun, multistep, trigflow_multistep
from consistency.tensors import Data, Denoise, Label, sent


def drawn_labels(seed: int, indices: Sequence[int], num_classes: int) -> Int[Tensor, "n"]:
    """The uniformly drawn class of each sample number."""
    draws = [torch.randint(num_classes, (), generator=generator(seed, "label", i)) for i in indices]
    return torch.stack(draws)


def labels_of(
    labels: object, seed: int, indices: Sequence[int], card: Mapping[str, Any]
) -> Int[Tensor, "n"] | None:
    """The class of each sample number: given ones repeated in turn, drawn ones where `labels` is None.

    A class is given by its index, or by its name where the model's card has `class_names`.
    """
    num_classes, names = card["num_classes"], card.get("class_names") or []
    if num_classes is None:
        require(labels is None, "labels=null for a model without classes", labels, "leave it out")
        return None
    if labels is None:
        return drawn_labels(seed, indices, num_classes)
    given = list(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]  # fmt: skip
    found = [names.index(c) if isinstance(c, str) and c in names else c for c in given]
    valid = bool(found) and all(type(c) is int and 0 <= c < num_classes for c in found)
    known = f", or of {', '.join(names[:9])}{' ...' if len(names) > 9 else ''}" if names else ""
    require(
        valid, f"labels from 0 to {num_classes - 1}{known}", labels, "for example labels=[0,1,2]"
    )
    return torch.tensor([found[i % len(found)] for i in indices])


def labels_of_edits(
    labels: object, seed: int, count: int, outputs: int, card: Mapping[str, Any]
) -> Int[Tensor, "n"] | None:
    """The class of each of `outputs` results for each of `count` images: given ones go by image, drawn ones by result."""
    if labels is None:
        return labels_of(None, seed, range(count * outputs), card)
    given = labels_of(labels, seed, range(count), card)
    return None if given is None else given.repeat_interleave(outputs)


def sampler_of(card: Mapping[str, Any], steps: int) -> Sampler:
    """A sampler of so many steps that suits a model: Heun's for a teacher, else Algorithm 1 of Song et al. 2023.

    The points are those of the card where it names as many, else the first of the Karras grid with one point more.
    """
    require(steps >= 1, "steps >= 1", steps, "1 or 2 suit a consistency model, 18 a denoiser")
    process = card["process"]
    sigma_data, t_min, t_max = process["sigma_data"], process["t_min"], process["t_max"]
    grid = KarrasGrid(t_min=t_min, t_max=t_max, rho=process["rho"])
    if card["role"] == "teacher":
        return partial(heun, grid=grid, steps=max(steps, 2), clip=False)
    own = list(process.get("times") or [])
    times = [t_max] if steps == 1 else own
    if len(times) != steps:
        times = grid.points(steps + 1)[:-1].tolist()
    if str(card["preconditioning"].get("_target_")).endswith(".TrigFlow"):
        angles = [math.atan(t / sigma_data) for t in times]
        return partial(trigflow_multistep, times=angles, sigma_data=sigma_data, clip=True)
    return partial(multistep, times=times, t_min=t_min, t_max=t_max, clip=True)


def generate(
    denoise: Denoise,
    sampler: Sampler,
    *,
    indices: Sequence[int],
    labels: Label,
    shape: Sequence[int],
    seed: int,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[UInt8[Tensor, "b c h w"]]:
    """Yields the samples number `indices`, a batch at a time, as uint8 on `device`; shape: (channels, height, width)."""
    for first in range(0, len(indices), batch_size):
        chosen = slice(first, first + batch_size)
        noise = SampleNoise(seed, indices[chosen], shape, device)
        label = None if labels is None else sent(labels[chosen], device)
        with torch.inference_mode():
            yield quantised(sampler(denoise, noise, label))


def edits(
    denoise: Denoise,
    task: Task,
    y: Float[Tensor, "n c h w"],
    *,
    outputs: int,
    labels: Int[Tensor, "m"] | None,
    times: Sequence[float],
    t_min: float,
    start: Start,
    clip: bool,
    seed: int,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[Data]:
    """Yields `outputs` edited images for every image of y in turn, a batch at a time, in [-1, 1] on the CPU."""
    total = len(y) * outputs
    for first in range(0, total, batch_size):
        numbers = torch.arange(first, min(first + batch_size, total))
        noise = SampleNoise(seed, numbers.tolist(), y.shape[1:], device)
        label = None if labels is None else labels[numbers].to(device)
        with torch.inference_mode():
            x_0 = edit(
                denoise,
                noise,
                y[numbers // outputs].to(device),
                task,
                label,
                times=times,
                t_min=t_min,
                start=start,
                clip=clip,
            )
        yield x_0.cpu()
