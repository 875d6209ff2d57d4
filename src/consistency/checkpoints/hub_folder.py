"""The folder of a model for the Hugging Face Hub: weights, settings, pipeline of diffusers, samples, and the model card.

| file | content |
|---|---|
| model.safetensors | the weights with our card in their metadata, as `ours` |
| config.json | our card |
| model_index.json, scheduler, unet | `ConsistencyModelPipeline`, if diffusers can express the model; of a teacher unet alone |
| samples.png | samples of fixed noise |
| README.md | the Hub's card: metadata, use, recipe, metrics with their protocol, licences |
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from consistency.checkpoints.diffusers import is_pipeline, write_diffusers
from consistency.checkpoints.hub import library
from consistency.checkpoints.ours import SEALED, write_sealed
from consistency.checkpoints.pretrained import LICENCES, PROGRAMS
from consistency.errors import UserError, require
from consistency.evaluation.results import Result, Results
from consistency.inference import plots
from consistency.inference.model import Model
from consistency.runtime.files import write_text

FORMAT = "hub"
CARD, SETTINGS, SAMPLES = "README.md", "config.json", "samples.png"
COUNT, COLUMNS = 16, 4
TASK = "unconditional-image-generation"
TEACHER_STEPS = 18

PAPER = "[Song et al. 2023](https://arxiv.org/abs/2303.01469)"
ROLES = {"consistency": "consistency model", "teacher": "denoiser"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model card states beside the model itself.

    repository: its name on the Hub, <user>/<name>.
    license: of the weights, as the Hub spells it; None if nobody has stated one.
    recipe: settings of the training by name; origins: published files that it began with.
    results: None without a measurement.
    """

    repository: str
    license: str | None = None
    recipe: Mapping[str, str] = field(default_factory=dict)
    origins: Sequence[str] = ()
    results: Results | None = None


def write_hub(folder: Path, model: Model, facts: Facts) -> str:
    """Write the folder; return why it has no pipeline, or an empty text."""
    hub = library("to=hub")
    weights, card = model.denoiser.network.state_dict(), model.card
    unet = folder if card.role == "consistency" else folder / "unet"
    try:
        write_diffusers(unet, card, weights)
        missing = ""
    except UserError as error:
        missing = str(error.got)
    write_sealed(folder / SEALED, card, weights)
    write_text(folder / SETTINGS, json.dumps(card.saved(), indent=2, sort_keys=True) + "\n")
    caption = draw_samples(model, folder / SAMPLES)
    data = metadata(hub, model, facts, is_pipeline(folder))
    text = f"---\n{data.to_yaml()}\n---\n\n{body(model, facts, caption, is_pipeline(folder))}"
    _require_valid(hub, text, data)
    write_text(folder / CARD, text)
    return missing


def _require_valid(hub: Any, text: str, data: Any) -> None:
    """Have the library read the card; refuse metadata that do not come back as they were written."""
    try:
        read = hub.ModelCard(text).data.to_dict()
    except ValueError as error:
        remedy = "this is a mistake of the program: please report it"
        raise UserError("a valid model card", str(error)[:300], remedy) from error
    require(read == data.to_dict(), "metadata that come back", read, "check license= and push=")


def draw_samples(model: Model, picture: Path) -> str:
    """Draw samples from the same noise, in one and two steps for a consistency model; return the caption."""
    steps = (1, 2) if model.card.role == "consistency" else (TEACHER_STEPS,)
    with torch.no_grad():
        panels = [
            (f"{n} step{'s' if n > 1 else ''}", plots.grid(model.sample(COUNT, steps=n), COLUMNS))
            for n in steps
        ]
    plots.side_by_side(panels).save(picture)
    named = " and ".join(map(str, steps))
    return f"Samples in {named} step{'s' if steps[-1] > 1 else ''}, seed 0, not selected"


def metadata(hub: Any, model: Model, facts: Facts, pipeline: bool) -> Any:
    """Return the metadata of the card: licence, library, tags and results."""
    name = facts.repository.rpartition("/")[2]
    results = [
        hub.EvalResult(
            task_type=TASK,
            dataset_type=facts.recipe.get("data", "unknown").lower(),
            dataset_name=facts.recipe.get("data", "unknown"),
            metric_type=metric,
            metric_name=f"{metric}, {row.sampler}, weights {row.weights}",
            metric_value=value,
        )
        for row in measured(facts.results, model.weights)
        for metric, value in row.metrics.items()
        if "_std" not in metric
    ]
    return hub.ModelCardData(
        license=facts.license,
        library_name="diffusers" if pipeline else "consistency",
        pipeline_tag=TASK,
        tags=["consistency-models", "image-generation", str(model.card.role)],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def measured(results: Results | None, weights: str) -> list[Result]:
    """Return the results of these weights; those of all if these have none."""
    rows = list(results.rows) if results is not None else []
    return [row for row in rows if row.weights == weights] or rows


def body(model: Model, facts: Facts, caption: str, pipeline: bool) -> str:
    """Return the text of the card."""
    card = model.card
    channels, height, width = card.image_shape
    parameters = sum(p.numel() for p in model.denoiser.network.parameters())
    classes = f"{card.num_classes} classes" if card.num_classes else "no classes"
    kind = f"A {ROLES[str(card.role)]} ({PAPER}) of images of {channels}x{height}x{width} (channels, height, width), "
    kind += f"{classes}, {parameters:,} parameters (weights `{model.weights}`)."
    network = str(card.network["_target_"]).rpartition(".")[2]
    recipe = {"network": network, **facts.recipe}
    sections = {
        "Use": _use(model, facts.repository, pipeline),
        "Recipe": table(("setting", "value"), recipe.items()),
        "Evaluation": _evaluation(facts.results, model.weights),
        "Licences": _licences(facts),
    }
    parts = [
        f"# {facts.repository.rpartition('/')[2]}",
        kind,
        f"![{caption}]({SAMPLES})",
        f"{caption}.",
    ]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items()]
    return "\n\n".join(parts) + "\n"


def _use(model: Model, repository: str, pipeline: bool) -> str:
    steps = 2 if model.card.role == "consistency" else TEACHER_STEPS
    lines = ["import consistency", "", f'model = consistency.load("hf:{repository}")']
    lines += [f"images = model.sample(16, steps={steps}, seed=0)  # uint8 (n, c, h, w)"]
    text = "\n".join(["```python", *lines, "```"])
    if pipeline:
        theirs = ["from diffusers import ConsistencyModelPipeline", ""]
        theirs += [f'pipeline = ConsistencyModelPipeline.from_pretrained("{repository}")']
        theirs += ["image = pipeline(num_inference_steps=1).images[0]"]
        text += "\n\nWith diffusers:\n\n" + "\n".join(["```python", *theirs, "```"])
    return text


def _evaluation(results: Results | None, weights: str) -> str:
    if results is None:
        return "Not measured."
    rows = measured(results, weights)
    metrics = list(rows[0].metrics) if rows else []
    values = [
        [row.sampler, row.weights, "–" if row.nfe is None else f"{row.nfe:g}"]
        + [f"{row.metrics[metric]:.5g}" if metric in row.metrics else "–" for metric in metrics]
        for row in rows
    ]
    protocol = [
        f"- {name}: {json.dumps(value) if isinstance(value, dict | list) else value}"
        for name, value in results.protocol.items()
    ]
    head = ("sampler", "weights", "NFE", *metrics)
    note = "Protocol (numbers compare only if all of it is the same):"
    return "\n".join([table(head, values), "", note, "", *protocol])


def _licences(facts: Facts) -> str:
    stated = facts.license or "not stated"
    lines = [f"- Weights: {stated}."]
    lines += [f"- They began with `{name}`: {licence_of(name)}." for name in facts.origins]
    lines += [
        "- The training images have licences of their own, which may limit the use of the weights."
    ]
    return "\n".join([*lines, "- The program that wrote this folder: mit."])


def licence_of(name: str) -> str:
    """Return the licence of a published file, or of a model on the Hub the place where it stands."""
    program = next((p for p in PROGRAMS if name.startswith(p)), None)
    return "see its page on the Hub" if program is None else LICENCES[program]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])
