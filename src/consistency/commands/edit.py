"""The command `edit`, and its two kinds of task: zero-shot edits and interpolation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import Float, UInt8
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Generator, Tensor

from consistency import editing
from consistency.checkpoints.load import load
from consistency.commands.cli import require_fresh
from consistency.commands.overrides import shell_line
from consistency.data.crop import halving
from consistency.data.decode import read_picture
from consistency.data.listing import read_images
from consistency.editing import Pairing, Pixels, Start, difference, grid_times, interpolate, invert
from consistency.errors import UserError, require
from consistency.grids import KarrasGrid
from consistency.inference import plots
from consistency.inference.card import Role
from consistency.inference.generate import Request, edits
from consistency.inference.model import Model
from consistency.inference.options import fill_process, plain
from consistency.pixels import to_uint8, to_unit
from consistency.randomness import SampleNoise, generator
from consistency.runtime.devices import chosen_device
from consistency.runtime.files import path_of, written_whole
from consistency.samplers import heun, indexed_times
from consistency.tensors import Data, Label

Panel: TypeAlias = tuple[str, UInt8[Tensor, "rows c h w"]]
"""A caption and images, one below the other."""


@dataclass(frozen=True, kw_only=True)
class MaskFile:
    """The white pixels of a picture are free; it is cut and resized as the images are."""

    path: str

    def __call__(self, height: int, width: int, draw: Generator) -> Float[Tensor, "h w"]:
        black = (0, 0, 0)  # what is transparent has not been painted
        picture = read_picture(path_of(self.path), "L", black)
        picture = picture.point(lambda v: 255 * (v >= 128))
        if picture.size != (width, height):
            picture = halving(picture, height)
        omega = torch.from_numpy(np.array(picture) >= 128).float()
        require(
            bool(omega.any()),
            f"a mask with white pixels, which are drawn anew, at {self.path}",
            "one that is black throughout",
            "paint the part white that shall change",
        )
        return omega


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """The model and images of a task.

    request: model, labels and seed.
    outputs: results for every image.
    start: where the loop begins; None leaves it to the task.
    images: None if the command has none.
    teacher: a denoiser that inverts images; None if the command has none.
    """

    request: Request
    grid: KarrasGrid
    batch_size: int
    outputs: int
    start: Start | None
    images: UInt8[Tensor, "n c h w"] | None
    teacher: Model | None

    def labels(self, count: int) -> Label:
        """Return the classes of `count` images."""
        return self.request.card.edit_labels(self.request.labels, self.request.seed, count, 1)


@dataclass(frozen=True, kw_only=True)
class Edited:
    """The outcome of a task.

    results: a row of them for every input.
    panels: pictures to show before the results, with captions.
    caption: of the results.
    findings: numbers to print, by name.
    moving: whether a row of results is an animation.
    """

    results: UInt8[Tensor, "n m c h w"]
    panels: Sequence[Panel] = ()
    caption: str = "after"
    findings: dict[str, float] = field(default_factory=dict)
    moving: bool = False


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Algorithm 4 with a pair of transform and mask.

    times: points of evaluation; None for those at `indices` of the grid.
    indices: of the grid with `num_scales` points; None for all.
    """

    pairing: Pairing
    times: Sequence[float] | None
    indices: Sequence[int] | None
    num_scales: int
    start: Start
    clip: bool

    def __call__(self, wanted: EditRequest) -> Edited:
        if wanted.images is None:
            raise UserError(
                "an image or a folder of images to edit", "none", "add input=<file or folder>"
            )
        y, count, request = to_unit(wanted.images), wanted.outputs, wanted.request
        task = self.pairing(request.card.shape, generator(request.seed, "edit"))
        loop = partial(
            editing.edit,
            task=task,
            times=self.points(wanted.grid),
            t_min=wanted.grid.t_min,
            start=wanted.start or self.start,
            clip=self.clip,
        )
        x_0 = edits(request, loop, y, outputs=count, batch_size=wanted.batch_size)
        each, a = y.repeat_interleave(count, 0), task.transform
        known = (task.omega == 0).expand_as(a(each))
        change = (a(x_0) - a(each)).abs()[known]
        panels: list[Panel] = [("input", wanted.images), ("known", to_uint8(task.reference(y)))]
        if isinstance(a, Pixels) and known.any():
            panels.insert(1, ("free", to_uint8(2 * task.omega.expand_as(y) - 1)))
        return Edited(
            results=to_uint8(x_0).unflatten(0, (len(y), count)),
            panels=panels if known.any() else panels[:1],
            findings={"largest change of the known part": float(change.max())}
            if len(change)
            else {},
        )

    def points(self, grid: KarrasGrid) -> Sequence[float]:
        """Return the points of evaluation."""
        if self.times is not None:
            return self.times
        if self.indices is not None:
            return indexed_times(self.indices, self.num_scales, grid)
        return grid_times(grid, self.num_scales)


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Frames between two images, over the sphere of noise.

    Images are turned into noise by the PF-ODE of the teacher on a grid with `steps` points; frames go from each image to
    the next. Without images the noises are random.
    """

    frames: int
    steps: int
    clip: bool

    def __call__(self, wanted: EditRequest) -> Edited:
        require(
            wanted.start is None,
            "start=null: an interpolation begins at noise of its own",
            wanted.start,
            "leave it out",
        )
        findings: dict[str, float] = {}
        panels: list[Panel] = []
        if wanted.images is None:
            pairs, request = wanted.outputs, wanted.request
            z = SampleNoise(request.seed, range(2 * pairs), request.card.shape)()
            z_0, z_1 = z[::2], z[1::2]
            label_0 = label_1 = wanted.labels(pairs)
        else:
            images = wanted.images
            z, findings = self.inverted(wanted, images)
            z_0, z_1, pairs, label = z[:-1], z[1:], len(z) - 1, wanted.labels(len(z))
            label_0, label_1 = (None, None) if label is None else (label[:-1], label[1:])
            panels = [("from", images[:-1]), ("to", images[1:])]

        def frames(z_0: Data, z_1: Data, label_0: Label, label_1: Label) -> tuple[Tensor]:
            shown = interpolate(
                wanted.request.denoise,
                z_0,
                z_1,
                label_0,
                label_1,
                frames=self.frames,
                t_max=wanted.grid.t_max,
                clip=self.clip,
            )
            return (shown.transpose(0, 1).flatten(0, 1),)

        (shown,) = _by_batch(frames, wanted, z_0, z_1, label_0, label_1)
        return Edited(
            results=to_uint8(shown).unflatten(0, (pairs, self.frames)),
            panels=panels,
            caption="between",
            findings=findings,
            moving=True,
        )

    def inverted(
        self, wanted: EditRequest, images: UInt8[Tensor, "n c h w"]
    ) -> tuple[Data, dict[str, float]]:
        """Return the noise of every image, and how far from it teacher and model end that start at this noise."""
        if wanted.teacher is None:
            raise UserError(
                "a denoiser whose PF-ODE turns the images into noise",
                "teacher=null",
                "add teacher=<run or file of mode=edm>, or leave input= out to interpolate random noise",
            )
        require(
            len(images) >= 2,
            "at least two images to interpolate",
            len(images),
            "give input= a folder with two or more",
        )
        teacher, grid, y = wanted.teacher, wanted.grid, to_unit(images)
        walk = partial(heun, grid=grid, steps=self.steps, clip=False)

        def round_trip(x: Data, label: Label) -> tuple[Data, Data, Data]:
            z = invert(teacher, x, label, grid=grid, steps=self.steps)
            t = z.new_full((len(z),), grid.t_max)
            model = wanted.request.denoise(grid.t_max * z, t, label)
            return z, walk(teacher, partial(torch.clone, z), label), model

        z, back, once = _by_batch(round_trip, wanted, y, wanted.labels(len(images)))
        return z, {
            "round trip of the teacher, root mean square": float(difference(back, y).mean()),
            "round trip through the model, root mean square": float(difference(once, y).mean()),
        }


def _by_batch(
    function: Callable[..., tuple[Tensor, ...]], wanted: EditRequest, *inputs: Tensor | None
) -> list[Tensor]:
    """Apply a function to batches of tensors on the device, and return its outputs whole, on the CPU."""
    count = max(len(each) for each in inputs if each is not None)
    outputs = []
    for first in range(0, count, wanted.batch_size):
        part = slice(first, first + wanted.batch_size)
        with torch.inference_mode():
            values = function(
                *(x if x is None else x[part].to(wanted.request.device) for x in inputs)
            )
        outputs.append([value.cpu() for value in values])
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]


def edit(config: DictConfig, output: Path) -> None:
    """Write grid.png, edited.npz and edit.yaml, and with `images` one PNG a result, into the folder `output`."""
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
    model = load_for_editing(config.checkpoint, config.weights, config.role, device)
    fill_process(config, config.task, model, shell_line)
    shape, process, teacher = model.shape, config.process, None
    if config.teacher is not None:
        teacher = load_for_editing(config.teacher, config.weights, "teacher", device)
        require(
            teacher.shape == shape,
            f"a teacher of images of shape {shape}",
            teacher.shape,
            "choose the teacher of this model",
        )
    task: Callable[[EditRequest], Edited] = instantiate(config.task, _convert_="all")
    images = None
    if config.input is not None:
        images = read_images(config.input, *shape[:2], config.background)
    labels = plain(config.labels)
    edited = task(
        EditRequest(
            request=Request(
                denoise=model, card=model.card, labels=labels, seed=config.seed, device=device
            ),
            grid=KarrasGrid(t_min=process.t_min, t_max=process.t_max, rho=process.rho),
            batch_size=config.batch_size,
            outputs=config.outputs,
            start=config.start,
            images=images,
            teacher=teacher,
        )
    )
    write(edited, output, single=config.images)
    OmegaConf.save(config, output / "edit.yaml", resolve=True)
    for name, value in edited.findings.items():
        print(f"{name}: {value:.3g}")
    count = edited.results.shape[0] * edited.results.shape[1]
    print(f"{count} images of {model.path} ({model.weights}): {output / 'grid.png'}")


def load_for_editing(path: str, weights: str, role: Role | None, device: torch.device) -> Model:
    """Load a model of the variance-exploding process onto its device."""
    model = load(path, weights=weights, role=role)
    require(
        not model.card.is_trigflow,
        "a model of the variance-exploding process",
        f"{path}, one of TrigFlow",
        "choose another checkpoint",
    )
    model.denoiser.to(device)
    return model


def write(edited: Edited, output: Path, *, single: bool) -> None:
    """Write a sheet to look at, arrays, a GIF of animations, and one PNG a result if `single`."""
    output.mkdir(parents=True, exist_ok=True)
    results = edited.results
    panels = [(caption, plots.grid(images, 1)) for caption, images in edited.panels]
    panels.append((edited.caption, plots.grid(results.flatten(0, 1), results.shape[1])))
    plots.side_by_side(panels).save(output / "grid.png")
    pixels = results.movedim(2, -1).numpy()
    with written_whole(output / "edited.npz") as file:
        np.savez(file, allow_pickle=False, arr_0=pixels)
    if edited.moving:
        there_and_back = torch.cat([results, results.flip(1)[:, 1:-1]], 1)
        plots.animation(there_and_back, output / "grid.gif")
    if single:
        folder = output / "images"
        folder.mkdir()
        for row, column in np.ndindex(*pixels.shape[:2]):
            image = Image.fromarray(pixels[row, column].squeeze())
            image.save(folder / f"{row:05d}_{column:03d}.png")
