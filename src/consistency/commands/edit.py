"""The command `edit`, and its two kinds of task: zero-shot edits and interpolation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import Float, UInt8
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor
from torchvision.transforms.functional import to_pil_image

from consistency import editing
from consistency.checkpoints.load import load
from consistency.data.crop import halving
from consistency.data.decode import read_picture
from consistency.data.listing import read_images
from consistency.errors import UserError, require
from consistency.grids import KarrasGrid
from consistency.inference import plots
from consistency.inference.card import EXPLODING
from consistency.inference.generate import Request, by_batch, edits
from consistency.inference.model import Model
from consistency.inference.options import fill_process, request_of
from consistency.pixels import to_uint8, to_unit
from consistency.randomness import SampleNoise, generator
from consistency.runtime.devices import chosen_device
from consistency.runtime.files import path_of, require_fresh, written_whole
from consistency.samplers import at, heun, indexed_times
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
    """A model, images to edit, a denoiser that inverts images, and the options of the command."""

    grid: KarrasGrid
    images: UInt8[Tensor, "n c h w"] | None
    teacher: Model | None
    options: DictConfig


Edited: TypeAlias = tuple[UInt8[Tensor, "n m c h w"], list[tuple[str, Tensor]]]
"""A row of results for every input, and captions and pictures to show before them."""


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
    moving: ClassVar[bool] = False

    def __call__(self, request: EditRequest) -> Edited:
        if request.images is None:
            raise UserError("images to edit", "none", "add input=<file or folder>")
        y, count, times = to_unit(request.images), request.options.outputs, self.times
        grid, start = request.grid, request.options.start or self.start
        if times is None and self.indices is not None:
            times = indexed_times(self.indices, self.num_scales, grid)
        times = editing.grid_times(grid, self.num_scales) if times is None else times
        request.card.require_start(start)
        task = self.pairing(request.card.image_shape, generator(request.seed, "edit"))
        loop = partial(
            editing.edit,
            task=task,
            times=times,
            t_min=grid.t_min,
            start=start,
            clip=self.clip,
            space=request.space,
        )
        x_0 = edits(request, loop, y, outputs=count, batch_size=request.options.batch_size)
        each, a = y.repeat_interleave(count, 0), task.transform
        known = (task.omega == 0).expand_as(a(each))
        panels = [("input", request.images)]
        if known.any():
            if isinstance(a, editing.Pixels):
                panels.append(("free", to_uint8(2 * task.omega.expand_as(y) - 1)))
            panels.append(("known", to_uint8(task.reference(y))))
            change = (a(x_0) - a(each)).abs()[known].max()
            print(f"largest change of the known part: {change:.3g}")
        return to_uint8(x_0).unflatten(0, (len(y), count)), panels


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Frames between two images, over the sphere of noise.

    Images are turned into noise by the PF-ODE of the teacher on a grid with `steps` points; frames go from each image to
    the next. Without images the noises are random.
    """

    frames: int
    steps: int
    clip: bool
    moving: ClassVar[bool] = True

    def __call__(self, request: EditRequest) -> Edited:
        options, images, card = request.options, request.images, request.card
        start = "start=null: an interpolation begins at noise of its own"
        require(options.start is None, start, options.start, "leave it out")
        numbers = range(options.outputs if images is None else len(images))
        label = card.labels(request.labels, request.seed, numbers)
        panels: list[tuple[str, Tensor]] = []
        if images is None:
            z = SampleNoise(request.seed, range(2 * options.outputs), card.shape)()
            ends = [z[::2], z[1::2], label, label]
        else:
            z = self.inverted(request, images, label)
            panels = [("from", images[:-1]), ("to", images[1:])]
            ends = [z[:-1], z[1:], *((None, None) if label is None else (label[:-1], label[1:]))]
        t_max, frames = request.grid.t_max, self.frames
        draw = partial(
            editing.interpolate, request.denoise, frames=frames, t_max=t_max, clip=self.clip
        )
        size = options.batch_size
        (shown,) = by_batch(lambda *x: (draw(*x).transpose(0, 1),), request, size, *ends)
        return request.decode(shown.flatten(0, 1)).unflatten(0, shown.shape[:2]), panels

    def inverted(
        self, request: EditRequest, images: UInt8[Tensor, "n c h w"], label: Label
    ) -> Data:
        """Return the noise of every image; print how far from the images teacher and model end that start at the noise."""
        teacher, grid, y = request.teacher, request.grid, to_unit(images)
        if teacher is None:
            expected = "a denoiser whose PF-ODE turns the images into noise"
            remedy = "add teacher=<run or file of mode=edm>, or leave out input= for random noise"
            raise UserError(expected, "teacher=null", remedy)
        remedy = "give input= a folder with two or more"
        require(len(y) >= 2, "at least two images to interpolate", len(y), remedy)

        def round_trip(images: Data, label: Label) -> tuple[Data, Data, Data, Data]:
            x = request.space.encoded(images)
            z = editing.invert(teacher, x, label, grid=grid, steps=self.steps)
            back = heun(teacher, lambda: z, label, grid=grid, steps=self.steps, clip=False)
            return z, x, back, request.denoise(grid.t_max * z, at(grid.t_max, z), label)

        z, y, back, once = by_batch(round_trip, request, request.options.batch_size, y, label)
        for name, x in (("of the teacher", back), ("through the model", once)):
            error = editing.difference(x, y).mean()
            print(f"round trip {name}, root mean square: {error:.3g}")
        return z


def edit(config: DictConfig, output: Path) -> None:
    """Write grid.png, edited.npz and edit.yaml, and with `images` one PNG a result, into the folder `output`."""
    starts = ("reference", "noise", "input", None)
    require(config.start in starts, "start=reference or start=noise", config.start, "choose one")
    masked, remedy = "mask" in config.task.get("pairing", {}), "choose task=inpaint, or no mask"
    require(masked or not config.mask, "no mask for a task without one", "mask=", remedy)
    require_fresh(output)
    weights, place, teacher = config.weights, config.autoencoder, None
    model = load(config.checkpoint, config.role, weights=weights, autoencoder=place)
    if config.teacher is not None:
        teacher = load(config.teacher, "teacher", weights=weights, autoencoder=place)
        teacher.denoiser.to(chosen_device(config.device))
    wanted = f"a model of {EXPLODING} and of shape {model.shape}, of the same latents if of any"
    remedy = "choose another checkpoint, or the teacher of this model"
    for each in filter(None, (model, teacher)):
        process = each.card.noise_process
        got = f"{each.path}, of {process} and shape {each.shape}"
        same = each.card.shape == model.card.shape and each.card.latents == model.card.latents
        require(process == EXPLODING and same, wanted, got, remedy)
    fill_process(config, config.task, model)
    task: ZeroShot | Interpolation = instantiate(config.task, _convert_="all")
    path, (channels, side, _) = config.input, model.shape
    images = None if path is None else read_images(path, channels, side, config.background)
    grid = KarrasGrid(**{name: config.process[name] for name in ("t_min", "t_max", "rho")})
    request = vars(request_of(config, model))
    edited = task(EditRequest(**request, grid=grid, images=images, teacher=teacher, options=config))
    write(edited, output, moving=task.moving, single=config.images)
    OmegaConf.save(config, output / "edit.yaml", resolve=True)
    rows, columns = edited[0].shape[:2]
    print(f"{rows * columns} images of {model.path} ({model.weights}): {output / 'grid.png'}")


def write(edited: Edited, output: Path, *, moving: bool, single: bool) -> None:
    """Write a sheet to look at, arrays, a GIF if rows of results are animations, and one PNG a result if `single`."""
    output.mkdir(parents=True, exist_ok=True)
    results, panels = edited
    shown = [(caption, plots.grid(images, 1)) for caption, images in panels]
    sheet = plots.grid(results.flatten(0, 1), results.shape[1])
    shown.append(("between" if moving else "after", sheet))
    plots.side_by_side(shown).save(output / "grid.png")
    with written_whole(output / "edited.npz") as file:
        np.savez(file, allow_pickle=False, arr_0=results.movedim(2, -1).numpy())
    if moving:
        there_and_back = torch.cat([results, results.flip(1)[:, 1:-1]], 1)
        plots.animation(there_and_back, output / "grid.gif")
    if single:
        (output / "images").mkdir()
        for row, column in np.ndindex(*results.shape[:2]):
            file_name = f"{row:05d}_{column:03d}.png"
            to_pil_image(results[row, column]).save(output / "images" / file_name)
