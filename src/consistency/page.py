"""The command that serves a page for trying a checkpoint: samples, and edits of an image that a person gives."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from omegaconf import DictConfig
from PIL import Image as PILImage
from torch import Generator, Tensor

from consistency import pictures
from consistency.checkpoint import Loaded, load
from consistency.data.given import MOST_PIXELS, fitted
from consistency.editing import Pairing, colorize, inpaint, superres
from consistency.errors import UserError, require
from consistency.sampling import chosen_device

LOOPBACK = "127.0.0.1"
MOST_IMAGES = 64
SIDE = 320
"""Pixels at which a single image is shown."""


def library() -> ModuleType:
    """Gradio, asked to report nothing to anybody."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            "expected gradio, which draws the page\n  got: it is not installed\n"
            "  do: install the extra `demo`: pip install -e '.[demo]'"
        ) from error
    return gradio


def demo(config: DictConfig, output: Path) -> None:
    """Serves the page on this machine alone, until it is interrupted."""
    require(0 <= config.port < 65536, "a port from 0 to 65535", config.port, "leave it at 7860")
    require(config.upload_megabytes > 0, "upload_megabytes > 0", config.upload_megabytes, "set it")
    gradio = library()
    # Pillow refuses images of more than twice as many pixels, before they are decoded.
    PILImage.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
    model = load(config.checkpoint, weights=config.weights, role=config.role)
    model.denoiser.to(chosen_device(config.device))
    try:
        page(gradio, model).launch(
            server_name=LOOPBACK,
            server_port=config.port or None,
            max_file_size=f"{config.upload_megabytes}mb",
            inbrowser=config.browser,
            share=False,
            show_error=True,
        )
    except OSError as error:
        raise UserError(
            f"expected a free port\n  got: {error}\n  do: choose another one with port=<number>"
        ) from error


@dataclass(frozen=True)
class Drawn:
    """The mask that a person has drawn: the free pixels, height x width."""

    free: Float[Tensor, "h w"]

    def __call__(self, height: int, width: int, draw: Generator) -> Float[Tensor, "h w"]:
        return self.free


def enlarged(images: UInt8[Tensor, "n c h w"]) -> PILImage.Image:
    """The images as one picture that a person can see."""
    picture = pictures.grid(images, pictures.columns_for(len(images)))
    factor = max(1, SIDE // picture.width)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, PILImage.Resampling.NEAREST)


def mask_of(layers: list[PILImage.Image], size: tuple[int, int]) -> Float[Tensor, "h w"]:
    """1 where a stroke covers a quarter of a pixel of the model's image or more; size: its (height, width)."""
    free = torch.zeros(size)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        small = np.asarray(alpha.resize((size[1], size[0]), PILImage.Resampling.BOX))
        free = torch.maximum(free, torch.from_numpy(small >= 64).float())
    return free


class Actions:
    """What the buttons do."""

    def __init__(self, model: Loaded) -> None:
        self.model = model

    def timed(self, draw: Callable[[], UInt8[Tensor, "n c h w"]]) -> tuple[PILImage.Image, str]:
        """The picture of what is drawn, and how long an image took."""
        start = time.perf_counter()
        images = draw()
        each = (time.perf_counter() - start) / len(images)
        return enlarged(images), f"{1000 * each:.1f} ms an image, {len(images)} images"

    def sample(
        self, count: float, steps: float, seed: float, label: str
    ) -> tuple[PILImage.Image, str]:
        """Draws so many images."""
        draw = partial(self.model.sample, int(count), steps=int(steps), seed=int(seed))
        return self.timed(lambda: draw(labels=self.label_of(label)))

    def edit(
        self,
        task: str,
        drawing: Mapping[str, Any] | None,
        patch: float,
        outputs: float,
        seed: float,
        label: str,
    ) -> tuple[PILImage.Image, str]:
        """Edits the image in the editor; the strokes on it are what is drawn anew when inpainting."""
        background = (drawing or {}).get("background")
        require(background is not None, "an image in the editor", "none", "drop one there")
        assert drawing is not None and background is not None
        channels, height, width = self.model.shape
        image = fitted(background, channels, height)[None]
        free = mask_of(drawing["layers"], (height, width))
        require(
            task != "inpaint" or bool(free.any()),
            "a part to draw anew",
            "no stroke on the image",
            "draw over the part with the brush",
        )
        pairings: dict[str, Pairing] = {
            "inpaint": partial(inpaint, mask=Drawn(free)),
            "colorize": colorize,
            "superres": partial(superres, patch=int(patch)),
        }
        edit = partial(self.model.edit, image, pairings[task], outputs=int(outputs))
        return self.timed(lambda: edit(seed=int(seed), labels=self.label_of(label))[0])

    @property
    def labels(self) -> list[str]:
        """The classes by name, and none in particular."""
        count = self.model.card["num_classes"] or 0
        names = self.model.card.get("class_names") or [str(n) for n in range(count)]
        return ["any", *names]

    def label_of(self, label: str) -> int | None:
        """The index of a class by its name."""
        return None if label == "any" else self.labels.index(label) - 1


def page(gradio: ModuleType, model: Loaded) -> Any:
    """The page: gradio's Blocks, not served yet."""
    actions = Actions(model)
    channels, height, _ = model.shape

    def told(act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            try:
                return act(*given)
            except UserError as error:
                raise gradio.Error(str(error)) from error

        return run

    with gradio.Blocks(title="Consistency model") as blocks:
        gradio.Markdown(f"## {model.path}\n{model.card['role']}, weights {model.weights}")
        with gradio.Row():
            seed = gradio.Number(0, label="Seed", precision=0, elem_id="seed")
            label = gradio.Dropdown(actions.labels, value="any", label="Class", elem_id="class")
        with gradio.Tab("Sample"):
            with gradio.Row():
                count = gradio.Slider(1, MOST_IMAGES, 16, step=1, label="Images")
                steps = gradio.Slider(1, 40, 1, step=1, label="Steps")
            draw = gradio.Button("Draw", variant="primary", elem_id="draw")
            samples = gradio.Image(label="Samples", elem_id="samples", interactive=False)
            sample_time = gradio.Textbox(label="Time", elem_id="sample_time", interactive=False)
        with gradio.Tab("Edit"):
            tasks = ["inpaint", *(["colorize"] if channels == 3 else []), "superres"]
            with gradio.Row():
                task = gradio.Radio(tasks, value="inpaint", label="Task", elem_id="task")
                sides = [n for n in range(2, height + 1) if height % n == 0]
                patch = gradio.Dropdown(sides, value=sides[0], label="Patch (superres)")
                outputs = gradio.Slider(1, 16, 4, step=1, label="Results")
            editor = gradio.ImageEditor(
                type="pil",
                label="Image: drop one here; the brush marks what to inpaint",
                elem_id="editor",
                brush=gradio.Brush(default_size=24, colors=["#ff0000"], color_mode="fixed"),
                transforms=(),
            )
            change = gradio.Button("Edit", variant="primary", elem_id="edit")
            edited = gradio.Image(label="Results", elem_id="edited", interactive=False)
            edit_time = gradio.Textbox(label="Time", elem_id="edit_time", interactive=False)
        draw.click(told(actions.sample), [count, steps, seed, label], [samples, sample_time])
        change.click(
            told(actions.edit), [task, editor, patch, outputs, seed, label], [edited, edit_time]
        )
    return blocks
