"""Generation of numbered samples and edits: noise and label of number i depend on (seed, i) alone."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from consistency.editing import Start, Task, edit
from consistency.pixels import quantised
from consistency.randomness import SampleNoise
from consistency.samplers import Sampler
from consistency.tensors import Data, Denoise, Label, sent


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
