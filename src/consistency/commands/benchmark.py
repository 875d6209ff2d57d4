"""The command `benchmark`: the speed of the training step, of the data and of sampling."""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from consistency.checkpoints.load import load
from consistency.denoiser import Denoiser
from consistency.errors import require
from consistency.evaluation.sampling_speed import counted, draw
from consistency.evaluation.timing import RATE, Window, machine, table
from consistency.inference import options
from consistency.inference.model import Model
from consistency.runtime.devices import PRECISIONS, compile_in_place
from consistency.runtime.files import require_fresh, write_text
from consistency.runtime.redaction import masked
from consistency.training import build
from consistency.training.speed import ENDLESS, Measurement, fit

OF_SAMPLING = {"checkpoint": None, "device": "auto", "precision": "32-true"}
"""Options of part=sample alone, with their defaults."""


def benchmark(config: DictConfig, output: Path) -> None:
    """Measure the speed of config.part, print a table, and write it into `output`/benchmark.json."""
    build.quiet()
    require_fresh(output)
    parts = {"train": of_training, "data": of_data, "sample": of_sampling}
    require(config.part in parts, f"part among {', '.join(parts)}", config.part, "choose one")
    for name in ("seconds", "windows", "train_batch", "images"):
        value = config[name]
        require(value is None or value > 0, f"{name} > 0", value, "give a positive number")
    others = [n for n, v in OF_SAMPLING.items() if config.part != "sample" and config[n] != v]
    expected, remedy = f"part=sample with {', '.join(others)}", "say trainer.* for the training"
    require(not others, expected, f"part={config.part}", remedy)
    build.require_taken(config.trainer)
    baseline = instantiate(config.baseline) if config.baseline else None
    fits = baseline is None or baseline.func.part == config.part
    expected = "baseline=plain for part=train, baseline=diffusers for part=sample, or none"
    require(fits, expected, f"part={config.part}", "choose another baseline= or part=")
    half, wanted = config.baseline.get("precision", "32-true"), ", ".join(PRECISIONS)
    require(half in PRECISIONS, f"baseline.precision among {wanted}", half, "choose one")
    figures = parts[config.part](measured(config), config.data.batch_size, baseline)
    choices: Any = HydraConfig.get().runtime.choices
    names = ["data", "model", "mode", "baseline", *(["sampler"] if config.part == "sample" else [])]
    title = " ".join([f"part={config.part}", *(f"{n}={choices.get(n)}" for n in names)])
    content = {"title": title, **figures, "settings": masked(OmegaConf.to_container(config))}
    write_text(output / "benchmark.json", json.dumps(content, indent=2))
    print(f"\n{table(title, figures)}\nWritten: {output / 'benchmark.json'}")


def measured(config: DictConfig) -> DictConfig:
    """Return the configuration with the batch of train_batch=, for images= with random ones, and without held-out ones."""
    config = deepcopy(build.expanded(config))
    data = config.data
    data.held_out = None
    if config.train_batch is not None:
        data.batch_size, data.device_batch_size = config.train_batch, None
    if config.images is not None:
        data.source = {name: data[name] for name in ("channels", "image_size", "num_classes")} | {
            "_target_": "consistency.data.memory.noise",
            "count": max(config.images, data.batch_size),
        }
        data.num_workers = 0
    return config


def of_training(config: DictConfig, batch: int, baseline: Any) -> dict[str, Any]:
    """Measure the training step; `batch` is that of the experiment."""
    measurement = Measurement(windows=config.windows, seconds=config.seconds, baseline=baseline)
    fit(config, measurement)
    device, steps = measurement.stopwatch.device, config.mode.total_steps
    figures = measurement.speed.figures(device, config.trainer.precision, config.seconds)
    hours = steps * batch / figures[RATE]["median"] / 3600
    return figures | {
        f"hours of {steps:,} steps of {batch} images": hours,
        "a step with the clocks of its parts, ms": measurement.parts,
        "machine": machine(device),
    }


def of_sampling(config: DictConfig, _: int, baseline: Any) -> dict[str, Any]:
    """Measure batches of samples of a checkpoint, or of the configured network with random weights."""
    if config.checkpoint is None:
        build.require_fit(config)
        network = instantiate(config.model.network, _convert_="all")
        denoiser = Denoiser(network, instantiate(config.mode.sampling_preconditioning))
        denoiser.eval().requires_grad_(False)
        model = Model(denoiser, build.describe(config), Path("-"), "random", "ours")
    else:
        model = load(config.checkpoint, weights=config.weights)
        config.process = asdict(model.card.process)
    sampler = instantiate(config.sampler, _convert_="all")
    options.require_suited(sampler, model, force=False)
    settings = {name: config[name] for name in ("device", "precision", "seed")}
    request, batch = options.request_of(settings, model), config.batch_size
    speed, evaluations = counted(request, sampler, batch)
    if baseline is not None and find_spec("diffusers") is None:
        print("No baseline: the package diffusers is missing.")
        baseline = None
    other = baseline and partial(baseline, model, batch, evaluations)
    compile_in_place(model.denoiser.network, config.compile)
    draw(request, sampler, batch)
    for _ in speed.measured(config.windows, config.seconds, model.device, other):
        draw(request, sampler, batch)
    figures = speed.figures(model.device, config.precision, config.seconds)
    return figures | {"evaluations an image": evaluations, "machine": machine(model.device)}


def of_data(config: DictConfig, batch: int, _: Any) -> dict[str, Any]:
    """Measure the source image by image, its loader, and the loader with scaling and flips on the device, beside the training."""
    data = build.build_data(config)
    training = of_training(config, batch, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    order = data.batches(split=data.split(1), total=ENDLESS)
    flips = torch.Generator(device).manual_seed(0)
    loader = partial(data.loader, order, pin_memory=device.type == "cuda")

    def one_by_one() -> Iterator[int]:
        for index in chain.from_iterable(order):
            data.train_source[index]
            yield 1

    def scaled() -> Iterator[int]:
        for images, _ in loader():
            yield len(data.augmented(images.to(device, non_blocking=True), flips))

    rows = {
        "source, image by image": one_by_one(),
        f"loader, {data.num_workers} workers": (len(images) for images, _ in loader()),
        "loader, in [-1, 1] on the device": scaled(),
    }
    rates = {name: rate(counts, config.seconds, device) for name, counts in rows.items()}
    times = {f"{n}, x training": v / training[RATE]["median"] for n, v in rates.items()}
    return {"data, images a second": rates | times, **training}


def rate(counts: Iterator[int], seconds: float, device: torch.device) -> float:
    """Return the sum of the counts that come in about `seconds`, a second; the first, which opens files, is not timed."""
    next(counts)
    window, total = Window(seconds, device), 0
    while window.open():
        total += next(counts)
    return total / window.seconds
