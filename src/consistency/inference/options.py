"""Options that the commands share: the model that draws, its process, and searched time points."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from consistency.checkpoints.load import load
from consistency.errors import UserError, require
from consistency.inference.card import Role
from consistency.inference.generate import Request
from consistency.inference.model import Model
from consistency.runtime.devices import chosen_device, in_precision, share_threads
from consistency.runtime.files import fingerprint
from consistency.samplers import NEED_DENOISER, UNDER_TRIGFLOW, Sampler

SEARCHED = "${process.searched}"
"""`times` of a sampler that evaluates at searched time points."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model to draw with: its checkpoint, its device, and the labels and seed of its samples."""

    checkpoint: str
    weights: str = "ema"
    role: Role | None = None
    device: str = "auto"
    precision: str = "32-true"
    compile: bool = False
    labels: object = None
    seed: int = 0

    def prepare(self, model: Model | None = None, rank: int = 0, processes: int = 1) -> Request:
        """Put the model on the device of one process; None loads it."""
        model = model or load(self.checkpoint, weights=self.weights, role=self.role)
        device = chosen_device(self.device)
        if processes > 1:
            share_threads(device, processes)
            device = device if device.type == "cpu" else torch.device(device.type, rank)
        model.denoiser.to(device)
        if self.compile:
            model.denoiser.network.compile()
        denoise, card = in_precision(model, self.precision, device), model.card
        return Request(
            denoise=denoise, card=card, labels=self.labels, seed=self.seed, device=device
        )


def fill_process(
    config: DictConfig, sampler: DictConfig, model: Model, shell_line: Callable[..., str]
) -> None:
    """Replace null in `process` by the time range and time points of the model.

    sampler: if it evaluates at searched time points, they are filled in too.
    shell_line: (command, options ...) -> the line to run, for the message.
    """
    for name, value in asdict(model.card.process).items():
        if config.process[name] is None:
            config.process[name] = list(value) if isinstance(value, tuple) else value
    node: Any = OmegaConf.to_container(sampler, resolve=False)
    if node.get("times") == SEARCHED and config.process.searched is None:
        weights = [] if model.weights == "ema" else [f"weights={model.weights}"]
        search = shell_line("search", f"checkpoint={config.checkpoint}", *weights)
        config.process.searched = searched_times(model, search)


def searched_path(path: Path) -> Path:
    """Return the path of the time points that were found for a checkpoint."""
    return path.with_name(f"{path.name}.searched.json")


def searched_times(model: Model, search: str) -> list[float]:
    """Read the time points found for these weights. Refuse those of other weights, and anything but numbers."""
    path, remedy = searched_path(model.path), f"choose sampler=multistep, or run\n      {search}"
    require(path.is_file(), f"time points that a search found, in {path}", "no such file", remedy)
    try:
        content: Any = json.loads(path.read_text())
    except ValueError:
        content = None
    times = content.get("times") if isinstance(content, dict) else None
    if not isinstance(times, list) or any(type(t) not in (int, float) for t in times):
        raise UserError(f"time points in {path}", str(times)[:80], f"delete it, and {remedy}")
    digest, weights = content.get("checkpoint"), content.get("weights")
    same = digest == fingerprint(model.path)
    other = f"weights={str(weights)[:80]}" if same else "weights of another training step or file"
    require(
        same and weights == model.weights,
        f"time points found for weights={model.weights} of {model.path} as it is now",
        f"{path}, found for {other if digest else 'weights that it does not name'}",
        remedy,
    )
    return [float(t) for t in times]


def require_suited(sampler: Sampler, model: Model, *, force: bool) -> None:
    """Refuse a sampler for another kind of model, unless `force`, and wrong time points."""
    function = sampler.func if isinstance(sampler, partial) else sampler
    trigflow = model.card.is_trigflow
    remedy = f"choose sampler={'trigflow_onestep' if trigflow else 'onestep'}, or add force=true"
    wrong = not force and model.card.role == "consistency" and function in NEED_DENOISER
    expected = "a sampler for consistency functions: onestep or multistep"
    got = "one that follows the PF-ODE of a denoiser, with a consistency checkpoint"
    require(not wrong, expected, got, remedy)
    wrong = not force and trigflow != (function in UNDER_TRIGFLOW)
    expected = f"a sampler {'for' if trigflow else 'for other networks than those of'} TrigFlow"
    got = "one for another noise process than the checkpoint's"
    require(not wrong, expected, got, remedy)
    sampler(lambda x, t, label=None: 0 * x, lambda: torch.zeros(1, 1, 1, 1), None)


def require_same_settings(
    before: dict[str, Any], now: dict[str, Any], work: str, folder: Path
) -> None:
    """Refuse to go on in a folder with other settings; work: the samples, or the search."""
    other = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    expected = f"the settings with which the {work} in output={folder} began"
    remedy = "choose another output=, or the same settings to go on"
    require(not other, expected, f"others: {', '.join(other)}", remedy)
