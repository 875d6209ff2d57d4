"""Images of a diffusers pipeline and of our sampler from the same noise."""

from typing import Any

import torch
from torch import Tensor

from consistency.inference.model import Model


def pipeline_images(pipe: Any, label: list[int] | None, **steps: Any) -> Tensor:
    """Draw two images of the real pipeline from a fixed generator, in [-1, 1]."""
    draw = torch.Generator().manual_seed(3)
    images = pipe(
        batch_size=2, class_labels=label, generator=draw, output_type="np", **steps
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def our_images(loaded: Model, label: list[int] | None, times: list[float]) -> Tensor:
    """Draw images from the same noise with our sampler, in [-1, 1]."""
    from consistency.samplers import multistep

    draw, side = torch.Generator().manual_seed(3), loaded.card.image_size
    return multistep(
        loaded.denoise,
        lambda: torch.randn(2, loaded.card.channels, side, side, generator=draw),
        None if label is None else torch.tensor(label),
        times=times,
        t_min=loaded.card.preconditioning["t_min"],
        t_max=times[0],
        clip=True,
    )


def same_images(pipe: Any, loaded: Model, label: list[int] | None) -> None:
    """Check that one step, and two steps at points of the pipeline's grid, agree up to float32 rounding."""
    from consistency.grids import KarrasGrid

    noise = pipe.scheduler.config
    grid = KarrasGrid(t_min=noise.sigma_min, t_max=noise.sigma_max, rho=noise.rho)
    middle = float(grid.points(noise.num_train_timesteps)[22])
    one = pipeline_images(pipe, label, num_inference_steps=1)
    two = pipeline_images(pipe, label, num_inference_steps=None, timesteps=[22, 0])
    assert float(one.std()) > 0.05
    torch.testing.assert_close(our_images(loaded, label, [noise.sigma_max]), one, rtol=0, atol=1e-5)
    ours = our_images(loaded, label, [noise.sigma_max, middle])
    torch.testing.assert_close(ours, two, rtol=0, atol=2e-5)
