"""The command `demo`: serves a page that draws samples of a checkpoint and edits uploaded images."""

import base64
import io
import ipaddress
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, UInt8
from omegaconf import DictConfig
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from consistency.checkpoints.load import load
from consistency.data import decode
from consistency.data.crop import fit
from consistency.editing import Pairing, colorize, inpaint, superres
from consistency.errors import UserError, require
from consistency.inference import plots
from consistency.inference.model import Model
from consistency.runtime.devices import chosen_device

SIDE = 320  # pixels at which a single image is shown
Shown: TypeAlias = tuple[PILImage.Image, str]  # a picture and a line on its time

# Settings of a picture: without the default button that sends it to a public place.
SHOWN = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
TALL = {"height": SIDE + 100}
UPLOADED = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
# Files painter.<suffix> beside this one, by gradio's name for their content; its value without an image.
PAINTER = {"html_template": "html", "css_template": "css", "js_on_load": "js"}
BLANK = {"image": "", "free": ""}


def library() -> ModuleType:
    """Import gradio, with its analytics off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        remedy = "install the extra `demo`: pip install -e '.[demo]'"
        raise UserError("gradio, which draws the page", "it is not installed", remedy) from error
    return gradio


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
    library()
    # Gradio opens uploads before we do; Pillow refuses more than twice as many pixels.
    PILImage.MAX_IMAGE_PIXELS = decode.MOST_PIXELS // 2
    place = config.autoencoder
    model = load(config.checkpoint, weights=config.weights, role=config.role, autoencoder=place)
    model.denoiser.to(chosen_device(config.device))
    if not local:
        print(f"host={config.host}: whoever reaches this machine may use the page", file=sys.stderr)
    try:
        with TemporaryDirectory() as uploads:
            os.environ["GRADIO_TEMP_DIR"] = uploads
            page(model, Path(uploads), config.background).launch(
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


class Actions:
    """The actions of the buttons.

    uploads: folder of the uploaded files; no other file is opened.
    background: colour that transparent images are put on.
    """

    def __init__(self, model: Model, uploads: Path, background: str | None = None) -> None:
        self.model, self.uploads = model, uploads.resolve()
        self.background = decode.colour_of(background)
        names = model.card.class_names or [str(n) for n in range(model.card.num_classes or 0)]
        self.labels: dict[str, int | None] = {"any": None}
        self.labels.update((name, index) for index, name in enumerate(names))

    def timed(self, draw: Callable[..., Tensor], seed: float, label: str) -> Shown:
        """Return the images as one picture of a visible size, and the time of an image."""
        start = time.perf_counter()
        images = draw(seed=int(seed), labels=self.labels[label]).reshape(-1, *self.model.shape)
        each = (time.perf_counter() - start) / len(images)
        picture = plots.grid(images, plots.columns_for(len(images)))
        factor = max(1, SIDE // picture.width)
        large = ImageOps.scale(picture, factor, PILImage.Resampling.NEAREST)
        return large, f"{1000 * each:.1f} ms an image, {len(images)} images"

    def sample(self, count: float, steps: float, seed: float, label: str) -> Shown:
        """Draw samples."""
        return self.timed(partial(self.model.sample, int(count), steps=int(steps)), seed, label)

    def read(self, photo: str | None) -> UInt8[Tensor, "c h w"]:
        """Read an uploaded file as the model's input."""
        require(photo is not None, "an image to edit", "none", "choose one")
        file, (channels, height, _) = Path(str(photo)).resolve(), self.model.shape
        # Gradio accepts requests for other files, which the page itself does not send.
        inside = file.is_relative_to(self.uploads)
        require(inside, "an uploaded image", "another file", "upload it")
        picture = decode.read_picture(file, decode.MODES[channels], self.background)
        return decode.to_tensor(fit(picture, height))

    def choose(self, photo: str | None) -> dict[str, str]:
        """Show an uploaded file in the painter."""
        if photo is None:
            return BLANK
        file = io.BytesIO()
        to_pil_image(self.read(photo)).save(file, "PNG")
        content = base64.b64encode(file.getvalue()).decode()
        return {**BLANK, "image": f"data:image/png;base64,{content}"}

    def edit(
        self,
        task: str,
        photo: str | None,
        painted: object,
        patch: float,
        outputs: float,
        seed: float,
        label: str,
    ) -> Shown:
        """Edit an uploaded image; inpainting draws the painted part anew."""
        image, (_, height, width) = self.read(photo)[None], self.model.shape
        free = mask_of(painted, (height, width))
        drawn, remedy = task != "inpaint" or bool(free.any()), "paint over the part with the brush"
        require(drawn, "a part to draw anew", "nothing painted on the image", remedy)
        pairings: dict[str, Pairing] = {
            "inpaint": partial(inpaint, mask=lambda height, width, draw: free),
            "colorize": colorize,
            "superres": partial(superres, patch=int(patch)),
        }
        edit = partial(self.model.edit, image, pairings[task], outputs=int(outputs))
        return self.timed(edit, seed, label)


def page(model: Model, uploads: Path, background: str | None = None) -> Any:
    """Build the page as gradio's Blocks."""
    gr, actions = library(), Actions(model, uploads, background)
    channels, height, _ = model.shape
    tasks = ["inpaint", *(["colorize"] if channels == 3 else []), "superres"]
    sides = [n for n in range(2, height + 1) if height % n == 0]
    beside, name = Path(__file__).with_name, "/".join(model.path.parts[-3:])
    painting: Any = {key: beside(f"painter.{end}").read_text() for key, end in PAINTER.items()}
    with gr.Blocks(title="Consistency model") as blocks:
        about = f"`{name}`, {model.card.role}, weights {model.weights}"
        gr.Markdown(f"## Consistency model\n{about}")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
            label = gr.Dropdown([*actions.labels], value="any", label="Class", elem_id="class")
        with gr.Tab("Sample"):
            with gr.Row():
                count = gr.Slider(1, 64, 16, step=1, label="Images")
                steps = gr.Slider(1, 40, 1, step=1, label="Steps")
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
            samples = gr.Image(label="Samples", elem_id="samples", **SHOWN)
            seconds = gr.Textbox(label="Time", elem_id="sample_time", interactive=False)
            _connect(draw.click, actions.sample, [count, steps, seed, label], [samples, seconds])
        with gr.Tab("Edit"):
            with gr.Row():
                task = gr.Radio(tasks, value="inpaint", label="Task", elem_id="task", scale=3)
                patch = gr.Dropdown(sides, value=sides[0], label="Patch (superres)", scale=2)
                outputs = gr.Slider(1, 16, 4, step=1, label="Results", scale=2)
            with gr.Row():
                photo = gr.Image(label="Image", elem_id="photo", **UPLOADED, **TALL)
                painting |= {"label": "Paint what to inpaint", "show_label": True}
                painter = gr.HTML(BLANK, elem_id="painter", container=True, **painting)
                edited = gr.Image(label="Results", elem_id="edited", **SHOWN, **TALL)
            change = gr.Button("Edit", variant="primary", elem_id="edit")
            seconds = gr.Textbox(label="Time", elem_id="edit_time", interactive=False)
            inputs = [task, photo, painter, patch, outputs, seed, label]
            _connect(photo.change, actions.choose, photo, painter)
            _connect(change.click, actions.edit, inputs, [edited, seconds])
    return blocks


def _connect(event: Any, action: Callable[..., Any], inputs: Any, outputs: Any) -> None:
    """Call the action at an event of the page, and show its `UserError` there."""

    def run(*values: Any) -> Any:
        try:
            return action(*values)
        except UserError as error:
            raise library().Error(str(error), print_exception=False) from error

    event(run, inputs, outputs, api_name=action.__name__)
