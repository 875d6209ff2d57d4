"""The page of the command `demo`, of gradio's components; what its buttons do is an object of `Actions`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from PIL import Image as PILImage

from consistency.errors import UserError
from consistency.inference.model import Model

MOST_STEPS = {"teacher": 40, "consistency": 8}
LEVEL = 0.5  # noise that is removed at first, as in conf/task/denoise.yaml

# Settings of a picture: without the default button that sends it to a public place.
SHOWN = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
TALL = {"height": 420}
HIDDEN = {"visible": False}
UPLOADED = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
# Files painter.<suffix> beside this one, by gradio's name for their content.
PAINTER = {"html_template": "html", "css_template": "css", "js_on_load": "js"}


class Actions(Protocol):
    """What the page can do; `consistency.commands.demo.Actions` has the meanings."""

    @property
    def checkpoints(self) -> Mapping[str, Path]: ...
    def model(self, name: str) -> Model: ...
    def labels(self, name: str) -> Mapping[str, int | None]: ...
    def tasks(self, name: str) -> list[str]: ...
    def times(self, name: str, steps: float) -> str: ...
    def sample(
        self, name: str, count: float, steps: float, seed: float | None, label: str
    ) -> tuple[PILImage.Image, PILImage.Image, str]: ...
    def choose(self, name: str, photo: str | None) -> dict[str, str]: ...
    @property
    def edit(self) -> Callable[..., tuple[PILImage.Image, str]]: ...


def library() -> ModuleType:
    """Import gradio, with its analytics off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        remedy = "install the extra `demo`: pip install -e '.[demo]'"
        raise UserError("gradio, which draws the page", "it is not installed", remedy) from error
    return gradio


def about(model: Model) -> str:
    """Return a line on a model."""
    channels, height, width = model.shape
    colours = "grey" if channels == 1 else "colour"
    return f"{model.card.role}, weights {model.weights}, {width}x{height} {colours}"


def blocks(actions: Actions) -> Any:
    """Build the page as gradio's Blocks; small screens show its rows as columns."""
    gr, names = library(), [*actions.checkpoints]
    with gr.Blocks(title="Consistency model") as page:
        gr.Markdown("## Consistency model")
        with gr.Row():
            name = gr.Dropdown(names, value=names[0], label="Checkpoint", elem_id="checkpoint")
            label = gr.Dropdown(
                [*actions.labels(names[0])], value="any", label="Class", elem_id="class"
            )
            seed = gr.Number(0, label="Seed", precision=0, step=1, elem_id="seed")
        line = gr.Markdown(about(actions.model(names[0])), elem_id="about")
        with gr.Tab("Sample"):
            steps, times = _sampling(gr, actions, name, seed, label)
        with gr.Tab("Edit"):
            tasks, patch, photo, painter = _editing(gr, actions, name, seed, label)

        def changed(chosen: str) -> list[Any]:
            """Offer what the chosen checkpoint can do."""
            model, sides = actions.model(chosen), patches(actions.model(chosen))
            return [
                about(model),
                gr.Dropdown([*actions.labels(chosen)], value="any"),
                gr.Slider(1, MOST_STEPS[model.card.role or "consistency"], value=1, step=1),
                actions.times(chosen, 1),
                gr.Radio(actions.tasks(chosen), value="inpaint"),
                gr.Dropdown(sides, value=sides[0]),
            ]

        change = connect(name.change, changed, name, [line, label, steps, times, tasks, patch])
        connect(change.then, actions.choose, [name, photo], painter)
    return page


def patches(model: Model) -> list[int]:
    """Return the sides of patches that divide the images of a model."""
    height = model.shape[1]
    return [side for side in range(2, height + 1) if height % side == 0]


def _sampling(gr: Any, actions: Actions, name: Any, seed: Any, label: Any) -> tuple[Any, Any]:
    """Build the tab of samples; return steps and time points, which depend on the checkpoint."""
    first = next(iter(actions.checkpoints))
    with gr.Row():
        count = gr.Slider(1, 64, 16, step=1, label="Images", elem_id="count")
        most = MOST_STEPS[actions.model(first).card.role or "consistency"]
        steps = gr.Slider(1, most, 1, step=1, label="Steps", elem_id="steps")
        times = gr.Textbox(
            actions.times(first, 1), label="Time points", elem_id="times", interactive=False
        )
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
        before = gr.Button("Previous seed", elem_id="previous_seed")
        after = gr.Button("Next seed", elem_id="next_seed")
    with gr.Row():
        with gr.Column():  # a label of gradio's would cover the picture
            gr.Markdown("Samples")
            samples = gr.Image(elem_id="samples", show_label=False, **SHOWN)
        with gr.Column():
            gr.Markdown("The first ones after each step")
            strip = gr.Image(elem_id="strip", show_label=False, **SHOWN)
    seconds = gr.Textbox(label="Time", elem_id="sample_time", interactive=False)
    given, shown = [name, count, steps, seed, label], [samples, strip, seconds]
    connect(steps.change, actions.times, [name, steps], times)
    for event in (draw.click, seed.submit):
        connect(event, actions.sample, given, shown)
    for button, stepped in ((before, previous_seed), (after, next_seed)):
        connect(connect(button.click, stepped, seed, seed).then, actions.sample, given, shown)
    return steps, times


def whole(seed: float | None) -> int:
    """Return the seed in its field, 0 for an empty one."""
    return int(seed or 0)


def previous_seed(seed: float | None) -> int:
    """Step back, not below 0."""
    return max(0, whole(seed) - 1)


def next_seed(seed: float | None) -> int:
    """Step on."""
    return whole(seed) + 1


def _editing(gr: Any, actions: Actions, name: Any, seed: Any, label: Any) -> tuple[Any, ...]:
    """Build the tab of edits; return task and patch, which depend on the checkpoint, image and painter."""
    first, beside = next(iter(actions.checkpoints)), Path(__file__).with_name
    sides = patches(actions.model(first))
    painting: Any = {key: beside(f"painter.{end}").read_text() for key, end in PAINTER.items()}
    painting |= {"label": "Paint what to inpaint", "show_label": True}
    with gr.Row():
        task = gr.Radio(actions.tasks(first), value="inpaint", label="Task", elem_id="task")
    with gr.Row():
        patch = gr.Dropdown(sides, value=sides[0], label="Patch (superres)", elem_id="patch")
        level = gr.Slider(0.05, 5, LEVEL, label="Noise in the image (denoise)", elem_id="level")
        outputs = gr.Slider(1, 16, 4, step=1, label="Results", elem_id="outputs")
        names = [*actions.checkpoints]
        teacher = gr.Dropdown(
            names, value=names[-1], label="Teacher (interpolate)", elem_id="teacher", **HIDDEN
        )
    with gr.Row():
        photo = gr.Image(label="Image", elem_id="photo", **UPLOADED, **TALL)
        blank = actions.choose(first, None)
        painter = gr.HTML(blank, elem_id="painter", container=True, **painting)
        second = gr.Image(
            label="Second image (interpolate)", elem_id="second", **UPLOADED, **TALL, **HIDDEN
        )
        edited = gr.Image(label="Results", elem_id="edited", **SHOWN, **TALL)
    change = gr.Button("Edit", variant="primary", elem_id="edit")
    seconds = gr.Textbox(label="Time", elem_id="edit_time", interactive=False)
    inputs = [name, task, photo, painter, patch, level, outputs, seed, label, second, teacher]

    def offered(chosen: str) -> list[Any]:
        """Show what interpolation alone needs."""
        shown = {"visible": chosen == "interpolate"}
        return [gr.Image(**shown), gr.Dropdown(**shown)]

    connect(photo.change, actions.choose, [name, photo], painter)
    connect(task.change, offered, task, [second, teacher])
    connect(change.click, actions.edit, inputs, [edited, seconds])
    return task, patch, photo, painter


def connect(event: Any, action: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """Call the action at an event of the page, and show its `UserError` there; return what `.then` may follow."""

    def run(*values: Any) -> Any:
        try:
            return action(*values)
        except UserError as error:
            raise library().Error(str(error), print_exception=False) from error

    return event(run, inputs, outputs, api_name=action.__name__)
