"""Options that the commands share: device, precision, the model that draws, its process and samplers, unfinished work."""

import json
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from consistency.checkpoints.load import load
from consistency.errors import UserError, require
from consistency.flow_samplers import UNDER_FLOW
from consistency.inference.autoencoder import autoencoder_of
from consistency.inference.card import EXPLODING, FLOW, TRIGFLOW
from consistency.inference.generate import Request
from consistency.inference.model import Model
from consistency.runtime.devices import (
    chosen_device,
    compile_in_place,
    in_precision,
    share_threads,
)
from consistency.runtime.files import ROOT, fingerprint, require_fresh
from consistency.samplers import NEED_DENOISER, UNDER_TRIGFLOW, Sampler, onestep
from consistency.tensors import Denoise


def request_of(
    options: Mapping[str, Any], model: Model | None, rank: int = 0, processes: int = 1
) -> Request:
    """Put a model on the device of one of several processes, and return a request with the labels and seed of the options.

    model: None loads it.
    """
    device = chosen_device(options["device"])
    if model is None:
        named = {name: options.get(name) for name in ("role", "autoencoder")}
        model = load(options["checkpoint"], weights=options["weights"], **named)
    if processes > 1:
        share_threads(device, processes)
        device = device if device.type == "cpu" else torch.device(device.type, rank)
    model.denoiser.to(device)
    if model.card.latents is not None:
        autoencoder_of(
            model.card.latents, device
        )  # refused before the work, if it is missing or another
    if options.get("compile"):
        compile_in_place(model.denoiser.network, options["compile"])
    denoise: Denoise = model
    if (precision := options.get("precision", "32-true")) != "32-true":
        denoise = in_precision(model, precision, device)
    labels, seed = options.get("labels"), options["seed"]
    return Request(denoise=denoise, card=model.card, labels=labels, seed=seed, device=device)


def fill_process(config: DictConfig, sampler: DictConfig, model: Model) -> None:
    """Replace null in `process` by the model's time range and points, searched ones too if the sampler takes them.

    Latents are not clipped.
    """
    for name, value in vars(model.card.process).items():
        if config.process[name] is None:
            config.process[name] = value
    node: Any = OmegaConf.to_container(sampler, resolve=False)
    if "clip" in node and model.card.latents is not None:
        sampler.clip = False
    if node.get("times") == "${process.searched}" and config.process.searched is None:
        config.process.searched = searched_times(model, config.checkpoint)


def searched_path(path: Path) -> Path:
    """Return the path of the time points that were found for a checkpoint."""
    return path.with_name(f"{path.name}.searched.json")


def searched_times(model: Model, checkpoint: str) -> list[float]:
    """Read the time points found for these weights. Refuse those of other weights, and anything but numbers."""
    path, weights = searched_path(model.path), model.weights
    line = [sys.executable, str(ROOT / "src" / "search.py"), f"checkpoint={checkpoint}"]
    line += [] if weights == "ema" else [f"weights={weights}"]
    remedy = f"choose sampler=multistep, or run\n      {shlex.join(line)}"
    require(path.is_file(), f"time points that a search found, in {path}", "no such file", remedy)
    try:
        content: Any = json.loads(path.read_text())
        times = [float(t) for t in content["times"]]
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        expected, remedy = f"time points in {path}", f"delete it, and {remedy}"
        raise UserError(expected, str(error)[:80], remedy) from error
    digest, named = content.get("checkpoint"), content.get("weights")
    same, other = digest == fingerprint(model.path), "weights that it does not name"
    if digest:
        other = f"weights={str(named)[:80]}" if same else "weights of another training step or file"
    expected = f"time points found for weights={weights} of {model.path} as it is now"
    require(same and named == weights, expected, f"{path}, found for {other}", remedy)
    return times


SUITED = {
    TRIGFLOW: (UNDER_TRIGFLOW, "trigflow_onestep"),
    FLOW: (UNDER_FLOW, "onestep or flow_jumps"),
}
"""Samplers of the other noise processes than the variance-exploding one, and those to choose."""


def require_suited(sampler: Sampler, model: Model, *, force: bool) -> None:
    """Refuse a sampler for another kind of model, unless `force`, and wrong time points."""
    function = sampler.func if isinstance(sampler, partial) else sampler
    process, consistent = model.card.noise_process, model.card.role == "consistency"
    wrong = consistent and function in NEED_DENOISER
    expected = "a sampler for consistency functions: onestep or multistep"
    got = "one that follows the PF-ODE of a denoiser, with a consistency checkpoint"
    suited, named = SUITED.get(process, ((), "onestep"))
    remedy = f"choose sampler={named}, or add force=true"
    require(force or not wrong, expected, got, remedy)
    of = next((name for name, (samplers, _) in SUITED.items() if function in samplers), EXPLODING)
    fits = function in suited if suited else of == EXPLODING or function is onestep
    require(force or fits, f"a sampler for {process}", f"one for {of}", remedy)
    sampler(lambda x, t, label=None, r=None: 0 * x, lambda: torch.zeros(1, 1, 1, 1), None)


def record_of(file: Path, settings: dict[str, Any], work: str) -> dict[str, Any]:
    """Return the record of the work in a folder; empty in a fresh one. Refuse other content and other settings."""
    if not file.is_file():
        require_fresh(file.parent)
        return {}
    record: dict[str, Any] = json.loads(file.read_text())
    before = record.get("settings", record)
    other = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
    expected = f"the settings with which the {work} in output={file.parent} began"
    remedy = "choose another output=, or the same settings to go on"
    require(not other, expected, f"others: {', '.join(other)}", remedy)
    return record
