"""The work of sampling, counted, and the pipeline of diffusers that its speed is compared with."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from consistency.checkpoints.diffusers import write_diffusers
from consistency.evaluation.timing import Speed
from consistency.inference.generate import Request, generate
from consistency.inference.model import Model
from consistency.samplers import Sampler
from consistency.tensors import Data, Label, Time


def draw(request: Request, sampler: Sampler, batch: int) -> None:
    """Draw the first samples as `sample.py` does."""
    for _ in generate(request, sampler, [range(batch)]):
        pass


def counted(request: Request, sampler: Sampler, batch: int) -> tuple[Speed, int]:
    """Draw a batch, and return a speed with its floating-point operations, and the network's evaluations of an image."""
    calls = 0

    def denoise(x_t: Data, t: Time, label: Label = None, **end: Time) -> Data:
        nonlocal calls
        calls += 1
        return request.denoise(x_t, t, label, **end)

    with FlopCounterMode(display=False) as counter:
        draw(replace(request, denoise=denoise), sampler, batch)
    return Speed(batch, counter.get_total_flops()), calls


class DiffusersPipeline:
    """Batches of the ConsistencyModelPipeline of diffusers with a model's weights, as tensors, in float32.

    evaluations: of the network for each image, at points of the pipeline's own grid.
    """

    part: ClassVar[str] = "sample"

    def __init__(self, model: Model, batch: int, evaluations: int) -> None:
        from diffusers import ConsistencyModelPipeline

        with TemporaryDirectory() as folder:
            write_diffusers(Path(folder), model.card, model.denoiser.network.state_dict())
            pipeline = ConsistencyModelPipeline.from_pretrained(
                folder, use_safetensors=True, low_cpu_mem_usage=False
            )
        pipeline.set_progress_bar_config(disable=True)
        labels = model.card.labels(None, 0, range(batch))
        self.pipeline = pipeline.to(model.device)
        self.settings = {
            "batch_size": batch,
            "num_inference_steps": evaluations,
            "class_labels": None if labels is None else labels.tolist(),
            "generator": torch.Generator().manual_seed(0),
            "output_type": "pt",
        }

    def __call__(self) -> Tensor:
        """Draw a batch, with values in [0, 1]."""
        images: Tensor = self.pipeline(**self.settings).images
        return images
