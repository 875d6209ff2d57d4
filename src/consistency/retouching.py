"""The command that edits images with a checkpoint, and the two kinds of task that it can be given."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import Float, UInt8
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Generator, Tensor

from consistency import pictures
from consistency.checkpoint import load
from consistency.command import require_fresh
from consistency.data.cropping import halving
from consistency.data.decoding import read_picture
from consistency.data.listing import read_images
from consistency.editing import (
    Pairing,
    Pixels,
    Start,
    difference,
    grid_times,
    interpolate,
    invert,
)
from consistency.errors import require
from consistency.generation import edits
from consistency.grids import KarrasGrid
from consistency.inference.model import Model
from consistency.paths import path_of
from consistency.pixels import to_uint8, to_unit
from consistency.preconditioning import TrigFlow
from consistency.randomness import SampleNoise, generator
from consistency.samplers import heun, indexed_times
from consistency.sampling import chosen_device, fill_process, plain
from consistency.tensors import Data, Label

Panel: TypeAlias = tuple[str, UInt8[Tensor, "rows c h w"]]
"""A caption and images, one below the other."""


@dataclass(frozen=True, kw_only=True)
class MaskFile:
    """Free are the white pixels of a picture, cut and resized as the images are."""

    path: str

    def __call__(self, height: int, width: int, draw: Generator) -> Float[Tensor, "h w"]:
        black = (0, 0, 0)  # what is transparent has not been painted
        picture = read_picture(path_of(self.path), "L", black)
        picture = picture.point(lambda v: 255 * (v >= 128))
        square = picture
        if picture.size != (width, height):
            square = halving(picture, height)
        omega = torch.from_numpy(np.array(square) >= 128).float()
        require(
            bool(omega.any()),
            f"a mask with white pixels, which are drawn anew, at {self.path}",
            "one that is black throughout",
            "paint white what shall change",
        )
        return omega


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a task: the model, the images and how many of what."""

    model: Model
    grid: KarrasGrid
    device: torch.device
    seed: int
    batch_size: int
    outputs: int
    labels: Any
    start: Start | None
    images: UInt8[Tensor, "n c h w"] | None
    teacher: Model | None

    def labels_for(self, count: int, each: int = 1) -> Label:
        """The class of each of count x each images."""
        return self.model.card.edit_labels(self.labels, self.seed, count, each)


@dataclass(frozen=True, kw_only=True)
class Edited:
    """What came of it: results (a row of them for every input), panels to show before and beside them, findings."""

    results: UInt8[Tensor, "n m c h w"]
    panels: Sequence[Panel] = ()
    caption: str = "after"
    findings: dict[str, float] = field(default_factory=dict)
    moving: bool = False


@runtime_checkable
class Errand(Protocol):
    """A task as the command sees it."""

    def __call__(self, request: Request) -> Edited: ...


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Algorithm 4 with a pair of transform and mask.

    Points of evaluation: `times`, or those at `indices` of the grid with `num_scales` points, or all of that grid.
    """

    pairing: Pairing
    times: Sequence[float] | None
    indices: Sequence[int] | None
    num_scales: int
    start: Start
    clip: bool

    def __call__(self, request: Request) -> Edited:
        require(
            request.images is not None,
            "an image or a folder of images to edit",
            "none",
            "add input=<file or folder>",
        )
        assert request.images is not None
        y, count = to_unit(request.images), request.outputs
        task = self.pairing(request.model.shape, generator(request.seed, "edit"))
        x_0 = torch.cat(
            list(
                edits(
                    request.model,
                    task,
                    y,
                    outputs=count,
                    labels=request.labels_for(len(y), count),
                    times=self.points(request.grid),
                    t_min=request.grid.t_min,
                    start=request.start or self.start,
                    clip=self.clip,
                    seed=request.seed,
                    batch_size=request.batch_size,
                    device=request.device,
                )
            )
        )
        each, a = y.repeat_interleave(count, 0), task.transform
        known = (task.omega == 0).expand_as(a(each))
        apart = (a(x_0) - a(each)).abs()[known]
        panels: list[Panel] = [("input", request.images), ("known", to_uint8(task.reference(y)))]
        if isinstance(a, Pixels) and known.any():
            panels.insert(1, ("free", to_uint8(2 * task.omega.expand_as(y) - 1)))
        return Edited(
            results=to_uint8(x_0).unflatten(0, (len(y), count)),
            panels=panels if known.any() else panels[:1],
            findings={"largest change of what was given": float(apart.max())} if len(apart) else {},
        )

    def points(self, grid: KarrasGrid) -> Sequence[float]:
        """The points of evaluation."""
        if self.times is not None:
            return self.times
        if self.indices is not None:
            return indexed_times(self.indices, self.num_scales, grid)
        return grid_times(grid, self.num_scales)


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Frames between two images that go over the sphere of noise.

    Given images are turned into noise by the PF-ODE of a denoiser, `teacher`, on a grid with `steps` points; from each
    the way goes to the next. Without images the noises are drawn.
    """

    frames: int
    steps: int
    clip: bool

    def __call__(self, request: Request) -> Edited:
        require(
            request.start is None,
            "start=null: an interpolation begins at noise of its own",
            request.start,
            "leave it out",
        )
        if request.images is None:
            pairs, shape = request.outputs, request.model.shape
            findings: dict[str, float] = {}
            panels: list[Panel] = []
            z_0, z_1 = (
                SampleNoise(request.seed, range(first, 2 * pairs, 2), shape)() for first in (0, 1)
            )
            label_0 = label_1 = request.labels_for(pairs)
        else:
            z, findings, panels = self.inverted(request, request.images)
            z_0, z_1, pairs = z[:-1], z[1:], len(z) - 1
            label = request.labels_for(len(z))
            label_0, label_1 = (None, None) if label is None else (label[:-1], label[1:])
        t_max = request.grid.t_max
        ways = []
        for first in range(0, pairs, request.batch_size):
            part = slice(first, first + request.batch_size)
            first_end, last_end, first_label, last_label = (
                None if value is None else value[part].to(request.device)
                for value in (z_0, z_1, label_0, label_1)
            )
            assert first_end is not None and last_end is not None
            with torch.inference_mode():
                shown = interpolate(
                    request.model,
                    first_end,
                    last_end,
                    first_label,
                    last_label,
                    frames=self.frames,
                    t_max=t_max,
                    clip=self.clip,
                )
            ways.append(to_uint8(shown.transpose(0, 1).flatten(0, 1)))
        return Edited(
            results=torch.cat(ways).unflatten(0, (pairs, self.frames)),
            panels=panels,
            caption="between",
            findings=findings,
            moving=True,
        )

    def inverted(
        self, request: Request, images: UInt8[Tensor, "n c h w"]
    ) -> tuple[Data, dict[str, float], list[Panel]]:
        """The noise of every image, and how far from it the teacher and the model end that start from that noise."""
        require(
            request.teacher is not None,
            "a denoiser whose PF-ODE turns the images into noise",
            "teacher=null",
            "add teacher=<run or file of mode=edm>, or leave input= out to interpolate drawn noise",
        )
        assert request.teacher is not None
        require(
            len(images) >= 2,
            "at least two images to go between",
            len(images),
            "give input= a folder with two or more",
        )
        teacher, grid, device = request.teacher, request.grid, request.device
        y, label = to_unit(images), request.labels_for(len(images))
        walk = partial(heun, grid=grid, steps=self.steps, clip=False)
        found: list[list[Tensor]] = [[], [], []]
        for first in range(0, len(y), request.batch_size):
            part = slice(first, first + request.batch_size)
            x, here = y[part].to(device), None if label is None else label[part].to(device)
            with torch.inference_mode():
                z = invert(teacher, x, here, grid=grid, steps=self.steps)
                back = walk(teacher, partial(torch.clone, z), here)
                t = z.new_full((len(z),), grid.t_max)
                once = request.model(grid.t_max * z, t, here)
            for values, value in zip(found, (z, back, once), strict=True):
                values.append(value.cpu())
        z, back, once = (torch.cat(values) for values in found)
        findings = {
            "round trip of the teacher, root mean square": float(difference(back, y).mean()),
            "round trip through the model, root mean square": float(difference(once, y).mean()),
        }
        return z, findings, [("from", images[:-1]), ("to", images[1:])]


def edit(config: DictConfig, output: Path) -> None:
    """Writes grid.png, edited.npz and edit.yaml, and with `images` one PNG a result, into the folder `output`."""
    starts = ("reference", "noise", "input", None)
    require(config.start in starts, "start=reference or start=noise", config.start, "choose one")
    require(
        not config.mask or "mask" in config.task.get("pairing", {}),
        "no mask for a task without one",
        "mask=",
        "choose task=inpaint, or leave the mask out",
    )
    require_fresh(output)
    device = chosen_device(config.device)
    model = opened(config.checkpoint, config.weights, config.role, device)
    fill_process(config, model)
    shape, process = model.shape, config.process
    teacher = None
    if config.teacher is not None:
        teacher = opened(config.teacher, config.weights, "teacher", device)
        require(
            teacher.shape == shape,
            f"a teacher of images of shape {shape}",
            teacher.shape,
            "choose the teacher of this model",
        )
    errand: Errand = instantiate(config.task, _convert_="all")
    images = None
    if config.input is not None:
        images = read_images(config.input, *shape[:2], config.background)
    edited = errand(
        Request(
            model=model,
            grid=KarrasGrid(t_min=process.t_min, t_max=process.t_max, rho=process.rho),
            device=device,
            seed=config.seed,
            batch_size=config.batch_size,
            outputs=config.outputs,
            labels=plain(config.labels),
            start=config.start,
            images=images,
            teacher=teacher,
        )
    )
    write(edited, output, single=config.images)
    OmegaConf.save(config, output / "edit.yaml", resolve=True)
    for finding, value in edited.findings.items():
        print(f"{finding}: {value:.3g}")
    count = edited.results.shape[0] * edited.results.shape[1]
    print(f"{count} images of {model.path} ({model.weights}): {output / 'grid.png'}")


def opened(path: str, weights: str, role: Any, device: torch.device) -> Model:
    """The checkpoint on its device, if the noise process is the one that editing knows."""
    model = load(path, weights=weights, role=role)
    require(
        not isinstance(model.denoiser.preconditioning, TrigFlow),
        "a model of the variance-exploding process",
        f"{path}, one of TrigFlow",
        "choose another checkpoint",
    )
    model.denoiser.to(device)
    return model


def write(edited: Edited, output: Path, *, single: bool) -> None:
    """A sheet to look at, arrays, a GIF of what moves, single PNGs."""
    output.mkdir(parents=True, exist_ok=True)
    results = edited.results
    panels = [(caption, pictures.grid(images, 1)) for caption, images in edited.panels]
    panels.append((edited.caption, pictures.grid(results.flatten(0, 1), results.shape[1])))
    pictures.side_by_side(panels).save(output / "grid.png")
    pixels = results.movedim(2, -1).numpy()
    np.savez(output / "edited.npz", allow_pickle=False, arr_0=pixels)
    if edited.moving:
        there_and_back = torch.cat([results, results.flip(1)[:, 1:-1]], 1)
        pictures.animation(there_and_back, output / "grid.gif")
    if single:
        folder = output / "images"
        folder.mkdir()
        for row, column in np.ndindex(*pixels.shape[:2]):
            image = Image.fromarray(pixels[row, column].squeeze())
            image.save(folder / f"{row:05d}_{column:03d}.png")
