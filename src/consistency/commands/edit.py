"""The command `edit`, and its two kinds of task: zero-shot edits and interpolation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import Float, UInt8
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor

from consistency import editing
from consistency.checkpoints.load import load
from consistency.commands.cli import require_fresh
from consistency.commands.overrides import shell_line
from consistency.data.crop import halving
from consistency.data.decode import read_picture, to_picture
from consistency.data.listing import read_images
from consistency.errors import UserError, require
from consistency.grids import KarrasGrid
from consistency.inference import plots
from consistency.inference.card import Role
from consistency.inference.generate import Request, edits
from consistency.inference.model import Model
from consistency.inference.options import fill_process
from consistency.pixels import to_uint8, to_unit
from consistency.randomness import SampleNoise, generator
from consistency.runtime.devices import chosen_device
from consistency.runtime.files import path_of, written_whole
from consistency.samplers import heun, indexed_times
from consistency.tensors import Data, Label


@dataclass(frozen=True, kw_only=True)
class MaskFile:
    """The white pixels of a picture are free; it is cut and resized as the images are."""

    path: str

    def __call__(self, height: int, width: int, draw: Generator) -> Float[Tensor, "h w"]:
        black = (0, 0, 0)  # what is transparent has not been painted
        picture = read_picture(path_of(self.path), "L", black).point(lambda v: 255 * (v >= 128))
        if picture.size != (width, height):
            picture = halving(picture, height)
        omega = torch.from_numpy(np.array(picture) >= 128).float()
        white = f"a mask with white pixels, which are drawn anew, at {self.path}"
        remedy = "paint the part white that shall change"
        require(bool(omega.any()), white, "one that is black throughout", remedy)
        return omega


@dataclass(frozen=True, kw_only=True)
class EditRequest(Request):
    """A model and images to edit.

    outputs: results for every image.
    start: where the loop begins; None leaves it to the task.
    teacher: a denoiser that inverts images.
    """

    grid: KarrasGrid
    batch_size: int
    outputs: int
    start: editing.Start | None
    images: UInt8[Tensor, "n c h w"] | None
    teacher: Model | None


@dataclass(frozen=True, kw_only=True)
class Edited:
    """The outcome of a task: a row of results for every input.

    panels: captions and pictures, shown before the results under `caption`.
    findings: numbers to print, by name.
    moving: whether a row of results is an animation.
    """

    results: UInt8[Tensor, "n m c h w"]
    panels: Sequence[tuple[str, Tensor]] = ()
    caption: str = "after"
    findings: dict[str, float] = field(default_factory=dict)
    moving: bool = False


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Algorithm 4 with a pair of transform and mask.

    times: points of evaluation; None for those at `indices` of the grid.
    indices: of the grid with `num_scales` points; None for all.
    """

    pairing: editing.Pairing
    times: Sequence[float] | None
    indices: Sequence[int] | None
    num_scales: int
    start: editing.Start
    clip: bool

    def __call__(self, request: EditRequest) -> Edited:
        if request.images is None:
            remedy = "add input=<file or folder>"
            raise UserError("an image or a folder of images to edit", "none", remedy)
        y, count, grid, times = to_unit(request.images), request.outputs, request.grid, self.times
        task = self.pairing(request.card.shape, generator(request.seed, "edit"))
        if times is None and self.indices is not None:
            times = indexed_times(self.indices, self.num_scales, grid)
        loop = partial(
            editing.edit,
            task=task,
            times=editing.grid_times(grid, self.num_scales) if times is None else times,
            t_min=grid.t_min,
            start=request.start or self.start,
            clip=self.clip,
        )
        x_0 = edits(request, loop, y, outputs=count, batch_size=request.batch_size)
        edited = partial(Edited, results=to_uint8(x_0).unflatten(0, (len(y), count)))
        each, a = y.repeat_interleave(count, 0), task.transform
        known = (task.omega == 0).expand_as(a(each))
        panels = [("input", request.images)]
        if not known.any():
            return edited(panels=panels)
        if isinstance(a, editing.Pixels):
            panels.append(("free", to_uint8(2 * task.omega.expand_as(y) - 1)))
        panels.append(("known", to_uint8(task.reference(y))))
        change = (a(x_0) - a(each)).abs()[known].max()
        return edited(panels=panels, findings={"largest change of the known part": float(change)})


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Frames between two images, over the sphere of noise.

    Images are turned into noise by the PF-ODE of the teacher on a grid with `steps` points; frames go from each image to
    the next. Without images the noises are random.
    """

    frames: int
    steps: int
    clip: bool

    def __call__(self, request: EditRequest) -> Edited:
        start = "start=null: an interpolation begins at noise of its own"
        require(request.start is None, start, request.start, "leave it out")
        card, seed, images = request.card, request.seed, request.images
        findings: dict[str, float] = {}
        panels: list[tuple[str, Tensor]] = []
        if images is None:
            z = SampleNoise(seed, range(2 * request.outputs), card.shape)()
            z_0, z_1 = z[::2], z[1::2]
            label_0 = label_1 = card.edit_labels(request.labels, seed, len(z_0), 1)
        else:
            label = card.edit_labels(request.labels, seed, len(images), 1)
            z, findings = self.inverted(request, images, label)
            z_0, z_1 = z[:-1], z[1:]
            label_0, label_1 = (None, None) if label is None else (label[:-1], label[1:])
            panels = [("from", images[:-1]), ("to", images[1:])]

        def frames(*ends: Tensor | None) -> tuple[Tensor]:
            shown = editing.interpolate(
                request.denoise,
                *ends,  # type: ignore[arg-type]
                frames=self.frames,
                t_max=request.grid.t_max,
                clip=self.clip,
            )
            return (shown.transpose(0, 1),)

        (shown,) = _by_batch(frames, request, z_0, z_1, label_0, label_1)
        return Edited(
            results=to_uint8(shown.flatten(0, 1)).unflatten(0, shown.shape[:2]),
            panels=panels,
            caption="between",
            findings=findings,
            moving=True,
        )

    def inverted(
        self, request: EditRequest, images: UInt8[Tensor, "n c h w"], label: Label
    ) -> tuple[Data, dict[str, float]]:
        """Return the noise of every image, and how far from it teacher and model end that start at this noise."""
        teacher, grid, y, count = request.teacher, request.grid, to_unit(images), len(images)
        if teacher is None:
            raise UserError(
                "a denoiser whose PF-ODE turns the images into noise",
                "teacher=null",
                "add teacher=<run or file of mode=edm>, or leave input= out to interpolate random noise",
            )
        remedy = "give input= a folder with two or more"
        require(count >= 2, "at least two images to interpolate", count, remedy)
        walk = partial(heun, grid=grid, steps=self.steps, clip=False)

        def round_trip(x: Data, label: Label) -> tuple[Data, Data, Data]:
            z = editing.invert(teacher, x, label, grid=grid, steps=self.steps)
            t = z.new_full((len(z),), grid.t_max)
            model = request.denoise(grid.t_max * z, t, label)
            return z, walk(teacher, partial(torch.clone, z), label), model

        z, back, once = _by_batch(round_trip, request, y, label)
        return z, {
            f"round trip {name}, root mean square": float(editing.difference(x, y).mean())
            for name, x in (("of the teacher", back), ("through the model", once))
        }


def _by_batch(
    function: Callable[..., tuple[Tensor, ...]], request: EditRequest, *inputs: Tensor | None
) -> list[Tensor]:
    """Apply a function to batches of tensors on the device, and return its outputs whole, on the CPU."""
    outputs = []
    for first in range(0, max(len(x) for x in inputs if x is not None), request.batch_size):
        part = slice(first, first + request.batch_size)
        with torch.inference_mode():
            values = function(*(x if x is None else x[part].to(request.device) for x in inputs))
        outputs.append([value.cpu() for value in values])
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]


def edit(config: DictConfig, output: Path) -> None:
    """Write grid.png, edited.npz and edit.yaml, and with `images` one PNG a result, into the folder `output`."""
    starts = ("reference", "noise", "input", None)
    require(config.start in starts, "start=reference or start=noise", config.start, "choose one")
    masked, remedy = "mask" in config.task.get("pairing", {}), "choose task=inpaint, or no mask"
    require(masked or not config.mask, "no mask for a task without one", "mask=", remedy)
    require_fresh(output)
    device = chosen_device(config.device)
    model = load_for_editing(config.checkpoint, config.weights, config.role, device)
    fill_process(config, config.task, model, shell_line)
    shape, process, teacher = model.shape, config.process, None
    if config.teacher is not None:
        teacher = load_for_editing(config.teacher, config.weights, "teacher", device)
        wanted = f"a teacher of images of shape {shape}"
        require(teacher.shape == shape, wanted, teacher.shape, "choose the teacher of this model")
    task: Callable[[EditRequest], Edited] = instantiate(config.task, _convert_="all")
    images = None
    if config.input is not None:
        images = read_images(config.input, *shape[:2], config.background)
    request = EditRequest(
        denoise=model,
        card=model.card,
        labels=config.labels,
        seed=config.seed,
        device=device,
        grid=KarrasGrid(t_min=process.t_min, t_max=process.t_max, rho=process.rho),
        batch_size=config.batch_size,
        outputs=config.outputs,
        start=config.start,
        images=images,
        teacher=teacher,
    )
    edited = task(request)
    write(edited, output, single=config.images)
    OmegaConf.save(config, output / "edit.yaml", resolve=True)
    for name, value in edited.findings.items():
        print(f"{name}: {value:.3g}")
    count = edited.results.shape[0] * edited.results.shape[1]
    print(f"{count} images of {model.path} ({model.weights}): {output / 'grid.png'}")


def load_for_editing(path: str, weights: str, role: Role | None, device: torch.device) -> Model:
    """Load a model of the variance-exploding process onto its device."""
    model, got = load(path, weights=weights, role=role), f"{path}, one of TrigFlow"
    wanted = "a model of the variance-exploding process"
    require(not model.card.is_trigflow, wanted, got, "choose another checkpoint")
    model.denoiser.to(device)
    return model


def write(edited: Edited, output: Path, *, single: bool) -> None:
    """Write a sheet to look at, arrays, a GIF of animations, and one PNG a result if `single`."""
    output.mkdir(parents=True, exist_ok=True)
    results = edited.results
    panels = [(caption, plots.grid(images, 1)) for caption, images in edited.panels]
    panels.append((edited.caption, plots.grid(results.flatten(0, 1), results.shape[1])))
    plots.side_by_side(panels).save(output / "grid.png")
    with written_whole(output / "edited.npz") as file:
        np.savez(file, allow_pickle=False, arr_0=results.movedim(2, -1).numpy())
    if edited.moving:
        there_and_back = torch.cat([results, results.flip(1)[:, 1:-1]], 1)
        plots.animation(there_and_back, output / "grid.gif")
    if single:
        (output / "images").mkdir()
        for row, column in np.ndindex(*results.shape[:2]):
            file_name = f"{row:05d}_{column:03d}.png"
            to_picture(results[row, column]).save(output / "images" / file_name)
