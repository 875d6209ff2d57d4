"""The speed of sampling, and the pipeline of diffusers that it is compared with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from consistency.checkpoints.diffusers import write_diffusers
from consistency.evaluation.timing import Speed, begin_peak_memory, peak_memory, repeated
from consistency.inference.generate import Request, generate
from consistency.inference.model import Model
from consistency.samplers import Sampler
from consistency.tensors import Data, Label, Time


class DiffusersPipeline:
    """Batches of the ConsistencyModelPipeline of diffusers with a model's weights, as tensors, in float32.

    evaluations: of the network for each image, at points of the pipeline's own grid.
    """

    part: ClassVar[str] = "sample"

    def __init__(self, model: Model, batch: int, evaluations: int) -> None:
        from diffusers import ConsistencyModelPipeline

        with TemporaryDirectory() as folder:
            write_diffusers(Path(folder), model.card, model.denoiser.network.state_dict())
            pipeline = ConsistencyModelPipeline.from_pretrained(folder, use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.card = pipeline.to(model.device), model.card
        self.batch, self.evaluations, self.draw = batch, evaluations, torch.Generator()

    def __call__(self) -> Tensor:
        """Draw a batch, with values in [0, 1]."""
        labels = self.card.labels(None, 0, range(self.batch))
        images: Tensor = self.pipeline(
            batch_size=self.batch,
            num_inference_steps=self.evaluations,
            class_labels=None if labels is None else labels.tolist(),
            generator=self.draw,
            output_type="pt",
        ).images
        return images


def count(request: Request, sampler: Sampler, batch: int) -> tuple[Speed, int]:
    """Draw a batch, and return a speed with its floating-point operations, and the evaluations for each image."""
    calls = 0

    def denoise(x_t: Data, t: Time, label: Label = None) -> Data:
        nonlocal calls
        calls += 1
        return request.denoise(x_t, t, label)

    with FlopCounterMode(display=False) as counter:
        draw(replace(request, denoise=denoise), sampler, batch)
    return Speed(batch, counter.get_total_flops()), calls


def draw(request: Request, sampler: Sampler, batch: int) -> None:
    """Draw the first samples, as `sample.py` does."""
    for _ in generate(request, sampler, [range(batch)]):
        pass


def measure(
    speed: Speed,
    ours: Callable[[], object],
    baseline: Callable[[], object] | None,
    *,
    windows: int,
    seconds: float,
    device: torch.device,
) -> None:
    """Measure the windows of `speed`, those of two functions that draw a batch in turn."""
    ours()
    begin_peak_memory(device)
    for number in range(windows):
        speed.rates.append(repeated(ours, speed.batch, seconds, device))
        speed.memory = speed.memory or peak_memory(device)
        if baseline is not None:
            if number == 0:
                baseline()
            speed.baseline_rates.append(repeated(baseline, speed.batch, seconds, device))
