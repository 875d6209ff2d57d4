"""The command `dashboard`: a workspace for the runs of a W&B project, with a section for each section of their metrics."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import wandb
from omegaconf import DictConfig

from consistency.errors import UserError, require
from consistency.training.loggers import key_configured

AXES = {"steps": "trainer/global_step", "images": "speed/images_seen", "hours": "speed/hours"}

CURVES = {
    "quality": {
        "Fréchet distance": "^quality/(fid|frechet_).*",
        "Kernel distance and its deviation": "^quality/(kid|kernel_).*",
        "Precision": "^quality/precision.*",
        "Recall": "^quality/recall.*",
    },
    "train": {
        "Loss": "^train/loss$",
        "Loss by noise quartile": "^train/loss_noise_quartile_.*",
        "Gradient norm": "^train/gradient_norm$",
    },
    "schedule": {
        "Scales N(k)": "^schedule/N$",
        "Target decay mu(k)": "^schedule/mu$",
        "Learning rate": "^schedule/learning_rate$",
        "Warm-up r(k), alpha(k)": "^schedule/(r|alpha)$",
    },
    "speed": {
        "Images a second": "^speed/images_per_second$",
        "Hours of training": "^speed/hours$",
        "Seconds of an evaluation": "^speed/evaluation_seconds$",
    },
}
"""Curves by section and title: patterns of the names of metrics, which docs/wandb.md explains."""

GRIDS = ("samples/one_step", "samples/two_steps")
COLUMNS = ("mode", "data", "model", "experiment", "parameters")


def dashboard(config: DictConfig, output: Path) -> None:
    """Make the workspace in W&B and print its address."""
    expected, remedy = "the package wandb-workspaces for dashboard", "pip install wandb-workspaces"
    require(find_spec("wandb_workspaces") is not None, expected, "no such package", remedy)
    expected, remedy = f"axis among {', '.join(AXES)}", "choose one"
    require(config.axis in AXES, expected, config.axis, remedy)
    made = workspace(config)
    expected, remedy = "an API key of W&B, which has the workspaces", "wandb login"
    require(key_configured(), expected, "none", remedy)
    try:
        made.save()
    except (wandb.Error, OSError, ValueError) as error:
        expected = f"to make a workspace in {config.entity}/{config.project}"
        remedy = "check entity=, project= and the API key; the project exists once a run is in it"
        raise UserError(expected, error, remedy) from error
    print(f"Workspace: {made.url}")


def workspace(config: DictConfig) -> Any:
    """Return the workspace, which stands in no service yet."""
    import wandb_workspaces.reports.v2 as parts
    import wandb_workspaces.workspaces as workspaces

    axis = AXES[config.axis]
    sections = [
        workspaces.Section(
            name=section,
            panels=[
                parts.LinePlot(title=title, x=axis, metric_regex=pattern)
                for title, pattern in curves.items()
            ],
            is_open=True,
        )
        for section, curves in CURVES.items()
    ]
    grids = parts.MediaBrowser(title="Samples of fixed noise", media_keys=list(GRIDS))
    return workspaces.Workspace(
        entity=config.entity,
        project=config.project,
        name=config.name,
        sections=[workspaces.Section(name="samples", panels=[grids], is_open=True), *sections],
        settings=workspaces.WorkspaceSettings(x_axis=axis, group_by_prefix="first"),
        runset_settings=workspaces.RunsetSettings(
            pinned_columns=[f"config:{name}" for name in COLUMNS]
        ),
    )
