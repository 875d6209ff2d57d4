"""A model that was read from a checkpoint: its denoiser, and samples and edits that are drawn with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from consistency.denoiser import Denoiser
from consistency.editing import Pairing, Start, edit, grid_times, interpolate, invert
from consistency.errors import UserError, require
from consistency.inference.card import EXPLODING, ModelCard
from consistency.inference.generate import Request, edits, samples
from consistency.pixels import to_uint8, to_unit
from consistency.randomness import SampleNoise, generator
from consistency.samplers import Sampler
from consistency.tensors import Data, Label, Time


@dataclass(frozen=True)
class Model:
    """A denoiser from a checkpoint; `weights` is the name of its set of weights."""

    denoiser: Denoiser
    card: ModelCard
    path: Path
    weights: str
    format: str

    def denoise(self, x_t: Data, t: Time, label: Label = None, r: Time | None = None) -> Data:
        """Return the estimate of x_0: D(x_t, t) of a teacher, f(x_t, t) of a consistency model.

        r: the time at which an average velocity ends; None for 0.
        label: class indices; None stands for "no class" in conditional networks that have an index for it.
        """
        no_class = getattr(self.denoiser.network, "no_class", None)
        if label is None and no_class is not None and self.card.num_classes is not None:
            label = torch.full(x_t.shape[:1], no_class, device=x_t.device)
        return self.denoiser(x_t, t, label, r)

    __call__ = denoise

    def _request(self, labels: object, seed: int) -> Request:
        return Request(denoise=self, card=self.card, labels=labels, seed=seed, device=self.device)

    @property
    def device(self) -> torch.device:
        """The device of the weights; `model.denoiser.to(device)` moves them."""
        return next(self.denoiser.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images, decoded ones of a model of latents."""
        return self.card.image_shape

    def sample(
        self,
        count: int,
        *,
        steps: int = 1,
        seed: int = 0,
        labels: int | str | Sequence[int | str] | None = None,
        sampler: Sampler | None = None,
        batch_size: int | None = None,
    ) -> UInt8[Tensor, "n c h w"]:
        """Draw `count` images; image i depends on (seed, i) alone.

        steps: evaluations of a consistency model, points of the grid for a teacher.
        labels: a class, or several that are repeated in turn; None draws them at random.
        batch_size: images at once; None takes what suits their size and the device, as in `edit`.
        sampler: one of `consistency.samplers` with its settings; None takes that of the card.
        """
        require(count >= 1, "at least one image", count, "ask for more")
        sampler = sampler or self.card.sampler(steps)
        return samples(self._request(labels, seed), sampler, count, batch_size)

    def edit(
        self,
        images: UInt8[Tensor, "n c h w"],
        pairing: Pairing,
        *,
        outputs: int = 1,
        seed: int = 0,
        labels: int | str | Sequence[int | str] | None = None,
        times: Sequence[float] | None = None,
        start: Start = "reference",
        batch_size: int | None = None,
    ) -> UInt8[Tensor, "n m c h w"]:
        """Edit images by Algorithm 4 of Song et al. 2023; return `outputs` of each.

        pairing: the known part of an image, `consistency.editing.colorize` or another.
        labels: a class for each image in turn; None draws them at random.
        times: noise levels of the evaluations; None takes the published grid.
        """
        shape = tuple(images.shape[1:])
        require(shape == self.shape, f"images of shape {self.shape}", shape, "resize them first")
        self.card.require_variance_exploding("edits")
        self.card.require_start(start)
        request = self._request(labels, seed)
        grid = self.card.process.grid
        loop = partial(
            edit,
            task=pairing(self.shape, generator(seed, "edit")),
            times=grid_times(grid) if times is None else times,
            t_min=grid.t_min,
            start=start,
            clip=self.card.clips,
            space=request.space,
        )
        x_0 = edits(request, loop, to_unit(images), outputs=outputs, batch_size=batch_size)
        return to_uint8(x_0).unflatten(0, (len(images), outputs))

    def interpolate(
        self,
        images: UInt8[Tensor, "_n c h w"] | None = None,
        teacher: "Model | None" = None,
        *,
        frames: int = 9,
        steps: int = 40,
        seed: int = 0,
        labels: int | str | Sequence[int | str] | None = None,
    ) -> UInt8[Tensor, "_m f c h w"]:
        """Draw `frames` images from each image to the next, over the sphere of noise [Song et al. 2023, Appendix D].

        images: None interpolates between two drawn noises.
        teacher: the denoiser whose PF-ODE turns the images into noise, on a grid with `steps` points.
        labels: a class for each image in turn; None draws them at random.
        """
        self.card.require_variance_exploding("interpolation")
        request, grid = self._request(labels, seed), self.card.process.grid
        numbers = [0, 0] if images is None else range(len(images))
        label = self.card.labels(labels, seed, numbers)
        label = None if label is None else label.to(self.device)
        ends = (None, None) if label is None else (label[:-1], label[1:])
        with torch.inference_mode():
            if images is None:
                z = SampleNoise(seed, range(2), self.card.shape, self.device)()
            else:
                denoise = self._require_teacher(images, teacher)
                x_0 = request.space.encoded(to_unit(images).to(self.device))
                z = invert(denoise, x_0, label, grid=grid, steps=steps)
            clip, t_max = self.card.clips, grid.t_max
            shown = interpolate(self, z[:-1], z[1:], *ends, frames=frames, t_max=t_max, clip=clip)
            decoded = request.decode(shown.flatten(0, 1)).cpu()
        return decoded.unflatten(0, shown.shape[:2]).transpose(0, 1)

    def _require_teacher(self, images: Tensor, teacher: "Model | None") -> "Model":
        """Return the teacher if it and the images suit this model."""
        shape = tuple(images.shape[1:])
        expected, got = f"two or more images of shape {self.shape}", f"{len(images)} of {shape}"
        require(shape == self.shape and len(images) >= 2, expected, got, "resize or add some")
        expected = f"a teacher, a denoiser of {EXPLODING} and of the same images or latents"
        remedy = "choose a run or file of mode=edm, or interpolate between drawn noises"
        if teacher is None:
            raise UserError(expected, "none", remedy)
        ours, theirs = self.card, teacher.card
        same = theirs.shape == ours.shape and theirs.latents == ours.latents
        suited = same and theirs.role == "teacher" and theirs.noise_process == EXPLODING
        require(suited, expected, f"{teacher.path}, a {theirs.role} of {theirs.shape}", remedy)
        return teacher
