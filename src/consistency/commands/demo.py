"""The command `demo`: serves a page that draws samples of checkpoints and edits uploaded images."""

import base64
import io
import ipaddress
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, UInt8
from omegaconf import DictConfig, OmegaConf
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from consistency.checkpoints.load import load
from consistency.checkpoints.ours import CHECKPOINTS, LAST
from consistency.commands import page
from consistency.data import decode
from consistency.data.crop import fit
from consistency.editing import Pairing, colorize, inpaint, regenerate, superres
from consistency.errors import UserError, require
from consistency.inference import plots
from consistency.inference.generate import Request, trajectory
from consistency.inference.model import Model
from consistency.runtime.devices import chosen_device
from consistency.runtime.files import ROOT, path_of
from consistency.samplers import Sampler
from consistency.tensors import Data, Label, Time

SIDE = 320  # pixels at which a single image is shown
STRIP = 4  # samples whose estimates are shown step by step
STROKE = list(OmegaConf.load(ROOT / "conf" / "task" / "stroke.yaml").times)
ARC = OmegaConf.load(ROOT / "conf" / "task" / "interpolate.yaml")
BLANK = {"image": "", "free": ""}
"""The painter's value without an image."""


def demo(config: DictConfig, output: Path) -> None:
    """Serve the page until Ctrl-C; by default on this machine alone."""
    require(0 <= config.port < 65536, "a port from 0 to 65535", config.port, "leave it at 7860")
    require(config.upload_megabytes > 0, "upload_megabytes > 0", config.upload_megabytes, "set it")
    try:
        local = ipaddress.ip_address(config.host).is_loopback
    except ValueError as error:
        remedy = "leave it at 127.0.0.1, or say host=0.0.0.0 to let other machines in"
        raise UserError("an address of this machine", f"host={error}", remedy) from error
    decode.colour_of(config.background)
    page.library()
    # Gradio opens uploads before we do; Pillow refuses more than twice as many pixels.
    PILImage.MAX_IMAGE_PIXELS = decode.MOST_PIXELS // 2
    device = chosen_device(config.device)

    def read(checkpoint: Path) -> Model:
        role: Any = "teacher" if checkpoint in teachers.values() else config.role
        model = load(checkpoint, role, weights=config.weights, autoencoder=config.autoencoder)
        model.denoiser.to(device)
        return model

    teachers = {} if config.teacher is None else checkpoints_at(config.teacher)
    checkpoints = checkpoints_at(config.checkpoint) | teachers
    if not local:
        print(f"host={config.host}: whoever reaches this machine may use the page", file=sys.stderr)
    try:
        with TemporaryDirectory() as uploads:
            os.environ["GRADIO_TEMP_DIR"] = uploads
            actions = Actions(checkpoints, read, Path(uploads), config.background)
            page.blocks(actions).launch(
                server_name=config.host,
                server_port=config.port or None,
                max_file_size=f"{config.upload_megabytes}mb",
                inbrowser=config.browser,
                share=False,
                show_error=True,
                footer_links=[],
            )
    except OSError as error:
        raise UserError("a free port", error, "choose another one with port=<number>") from error


def mask_of(painted: object, size: tuple[int, int]) -> Float[Tensor, "h w"]:
    """Return 1 for painted pixels; painted: the painter's value, from a browser; size: (height, width)."""
    free, (height, width) = painted.get("free") if isinstance(painted, dict) else None, size
    if not (isinstance(free, str) and len(free) in (0, height * width) and not free.strip("01")):
        expected = f"a mask of {height}x{width} digits 0 and 1"
        raise UserError(expected, "another", "load the page anew")
    return torch.tensor([float(digit) for digit in free or "0" * height * width]).view(size)


def checkpoints_at(place: str) -> dict[str, Path]:
    """Return the checkpoints at a place by the names to choose them by: the runs below a folder, the newest first, or one.

    place: a folder of runs or of sweeps, or what `consistency.load` takes.
    """
    folder, last = path_of(place), f"{CHECKPOINTS}/{LAST}"
    found = [*folder.glob(f"*/{last}"), *folder.glob(f"*/*/{last}")]
    if (folder / CHECKPOINTS).is_dir() or not found:
        return {"/".join(folder.parts[-3:]): Path(place)}
    runs = [file.parents[1] for file in sorted(found, key=lambda file: -file.stat().st_mtime)]
    return {run.relative_to(folder).as_posix(): run for run in runs}


def times_of(sampler: Sampler) -> list[float]:
    """Return the times at which a sampler asks a model, from one sample of a model of zeros."""
    times: list[float] = []

    def zeros(x_t: Data, t: Time, label: Label = None, **end: Time) -> Data:
        times.append(float(t[0]))
        return 0 * x_t

    sampler(zeros, lambda: torch.zeros(1, 1, 1, 1), None)
    return times


class Actions:
    """The actions of the page; each takes the name of a checkpoint first.

    checkpoints: paths by name; no other is read. read: opens one; the last two that were chosen stay in memory.
    uploads: folder of the uploaded files; no other file is opened.
    background: colour that transparent images are put on.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Path],
        read: Callable[[Path], Model],
        uploads: Path,
        background: str | None = None,
    ) -> None:
        self.checkpoints, self.uploads = dict(checkpoints), uploads.resolve()
        self._read = lru_cache(maxsize=2)(read)
        self.background = decode.colour_of(background)
        self.model(next(iter(self.checkpoints)))  # an unreadable one is refused before the page

    def model(self, name: str) -> Model:
        """Return the model of a checkpoint by its name on the page."""
        known = name in self.checkpoints
        require(known, "a checkpoint of the list", "another", "load the page anew")
        return self._read(self.checkpoints[name])

    def labels(self, name: str) -> dict[str, int | None]:
        """Return the classes by name."""
        card = self.model(name).card
        names = card.class_names or [str(n) for n in range(card.num_classes or 0)]
        return {"any": None, **{text: index for index, text in enumerate(names)}}

    def timed(
        self, name: str, draw: Callable[..., Tensor], seed: float | None, label: str
    ) -> tuple[PILImage.Image, str]:
        """Return the images as one picture of a visible size, and a line on the time of an image."""
        model, start = self.model(name), time.perf_counter()
        images = draw(seed=page.whole(seed), labels=self.labels(name)[label]).reshape(
            -1, *model.shape
        )
        each = (time.perf_counter() - start) / len(images)
        picture = plots.grid(images, plots.columns_for(len(images)))
        return enlarged(picture), f"{1000 * each:.1f} ms an image, {len(images)} images"

    def times(self, name: str, steps: float) -> str:
        """Return the time points of so many steps as a line."""
        return ", ".join(f"{t:.3g}" for t in times_of(self.model(name).card.sampler(int(steps))))

    def sample(
        self, name: str, count: float, steps: float, seed: float | None, label: str
    ) -> tuple[PILImage.Image, PILImage.Image, str]:
        """Draw samples; return them, the estimates of the first ones at every step, and the time."""
        model = self.model(name)
        draw = partial(model.sample, int(count), steps=int(steps))
        shown, line = self.timed(name, draw, seed, label)
        labels = self.labels(name)[label]
        request = Request(
            denoise=model,
            card=model.card,
            labels=labels,
            seed=page.whole(seed),
            device=model.device,
        )
        estimates = trajectory(request, model.card.sampler(int(steps)), min(STRIP, int(count)))
        step = -(-len(estimates) // plots.MOST_COLUMNS)
        panels = [(f"t={t:.3g}", plots.grid(images, STRIP)) for t, images in estimates]
        return shown, enlarged(plots.below_each_other(panels[::-step][::-1])), line

    def read(self, name: str, photo: str | None) -> UInt8[Tensor, "c h w"]:
        """Read an uploaded file as the model's input."""
        require(photo is not None, "an image to edit", "none", "choose one")
        file, (channels, height, _) = Path(str(photo)).resolve(), self.model(name).shape
        # Gradio accepts requests for other files, which the page itself does not send.
        inside = file.is_relative_to(self.uploads)
        require(inside, "an uploaded image", "another file", "upload it")
        picture = decode.read_picture(file, decode.MODES[channels], self.background)
        return decode.to_tensor(fit(picture, height))

    def choose(self, name: str, photo: str | None) -> dict[str, str]:
        """Show an uploaded file in the painter."""
        if photo is None:
            return BLANK
        file = io.BytesIO()
        to_pil_image(self.read(name, photo)).save(file, "PNG")
        content = base64.b64encode(file.getvalue()).decode()
        return {**BLANK, "image": f"data:image/png;base64,{content}"}

    def tasks(self, name: str) -> list[str]:
        """Return the tasks that a model can do."""
        colour = ["colorize"] if self.model(name).shape[0] == 3 else []
        return ["inpaint", *colour, "superres", "stroke", "denoise", "interpolate"]

    def edit(
        self,
        name: str,
        task: str,
        photo: str | None,
        painted: object,
        patch: float,
        level: float,
        outputs: float,
        seed: float | None,
        label: str,
        second: str | None = None,
        teacher: str | None = None,
    ) -> tuple[PILImage.Image, str]:
        """Edit an uploaded image; inpainting draws the painted part anew, and `level` is the noise to remove.

        second, teacher: the other image of an interpolation, and the checkpoint that turns both into noise.
        """
        if task == "interpolate":
            return self.interpolate(name, photo, second, teacher, seed, label)
        model, image = self.model(name), self.read(name, photo)[None]
        free = mask_of(painted, (model.shape[1], model.shape[2]))
        drawn, remedy = task != "inpaint" or bool(free.any()), "paint over the part with the brush"
        require(drawn, "a part to draw anew", "nothing painted on the image", remedy)
        pairings: dict[str, Pairing] = {
            "inpaint": partial(inpaint, mask=lambda height, width, draw: free),
            "colorize": colorize,
            "superres": partial(superres, patch=int(patch)),
            "stroke": regenerate,
            "denoise": regenerate,
        }
        require(task in pairings, f"a task among {', '.join(pairings)}", task, "choose one")
        loops: dict[str, Any] = {
            "stroke": {"times": STROKE},
            "denoise": {"times": [float(level)], "start": "input"},
        }
        options = {"outputs": int(outputs), **loops.get(task, {})}
        return self.timed(name, partial(model.edit, image, pairings[task], **options), seed, label)

    def interpolate(
        self,
        name: str,
        photo: str | None,
        second: str | None,
        teacher: str | None,
        seed: float | None,
        label: str,
    ) -> tuple[PILImage.Image, str]:
        """Draw the frames from an uploaded image to another, row by row; without images between drawn noises."""
        ends: list[Any] = [None, None]
        if photo is not None or second is not None:
            images = torch.stack([self.read(name, end) for end in (photo, second)])
            ends = [images, None if teacher is None else self.model(teacher)]
        draw = partial(self.model(name).interpolate, *ends, frames=ARC.frames, steps=ARC.steps)
        return self.timed(name, draw, seed, label)


def enlarged(picture: PILImage.Image) -> PILImage.Image:
    """Return a picture of a visible size, enlarged by a whole factor."""
    factor = max(1, round(SIDE / picture.width))
    return ImageOps.scale(picture, factor, PILImage.Resampling.NEAREST)
