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
from consistency.evaluation.sampling_speed import count, draw, measure
from consistency.evaluation.timing import Window, machine
from consistency.inference import options
from consistency.inference.model import Model
from consistency.runtime.files import require_fresh, write_text
from consistency.training import build
from consistency.training.speed import ENDLESS, Measurement, fit

Figures = dict[str, Any]


def benchmark(config: DictConfig, output: Path) -> None:
    """Measure the speed of config.part, print a table, and write it into `output`/benchmark.json."""
    build.quiet()
    require_fresh(output)
    parts = {"train": of_training, "data": of_data, "sample": of_sampling}
    require(config.part in parts, f"part among {', '.join(parts)}", config.part, "choose one")
    for name in ("seconds", "windows"):
        require(config[name] > 0, f"{name} > 0", config[name], "give a positive number")
    build.require_taken(config.trainer)
    baseline = instantiate(config.baseline) if config.baseline else None
    fits = baseline is None or baseline.func.part == config.part
    expected = "baseline=plain for part=train, baseline=diffusers for part=sample, or none"
    require(fits, expected, f"part={config.part}", "choose another baseline= or part=")
    batch = config.data.batch_size
    figures = parts[config.part](measured(config), batch, baseline)
    choices: Any = HydraConfig.get().runtime.choices
    names = ("data", "model", "mode", "sampler", "baseline")
    title = " ".join([f"part={config.part}", *(f"{n}={choices.get(n)}" for n in names)])
    settings = OmegaConf.to_container(config)
    content = {"title": title, **figures, "settings": settings}
    write_text(output / "benchmark.json", json.dumps(content, indent=2))
    print(f"\n{table(title, figures)}\nWritten: {output / 'benchmark.json'}")


def measured(config: DictConfig) -> DictConfig:
    """Return the configuration without held-out images, with the batch of train_batch=, and without files if images= is given."""
    config = deepcopy(config)
    data = config.data
    data.held_out = None
    if config.train_batch is not None:
        require(
            config.train_batch >= 1,
            "train_batch >= 1, or null",
            config.train_batch,
            "give a number",
        )
        data.batch_size, data.device_batch_size = config.train_batch, None
    if config.images is not None:
        require(config.images >= 1, "images >= 1, or null", config.images, "give a number")
        data.source = {name: data[name] for name in ("channels", "image_size", "num_classes")} | {
            "_target_": "consistency.data.memory.noise",
            "count": max(config.images, data.batch_size),
        }
        data.num_workers = 0
    return config


def of_training(config: DictConfig, batch: int, baseline: Any) -> Figures:
    """Measure the training step; `batch` is that of the experiment."""
    measurement = Measurement(windows=config.windows, seconds=config.seconds, baseline=baseline)
    fit(config, measurement)
    figures = measurement.speed.figures(measurement.stopwatch.device, config.trainer.precision)
    steps, parts = config.mode.total_steps, measurement.parts
    hours = steps * batch / figures["images_per_second"]["median"] / 3600
    return figures | {
        "experiment": {"steps": steps, "batch": batch, "hours": hours},
        "step_ms": {part: 1e3 * seconds for part, seconds in parts.items()},
        "machine": machine(measurement.stopwatch.device),
    }


def of_sampling(config: DictConfig, _: int, baseline: Any) -> Figures:
    """Measure batches of samples of a checkpoint, or of the configured network with random weights."""
    torch.manual_seed(config.seed)
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
    request = options.request_of(settings, model)
    device = model.device
    speed, evaluations = count(request, sampler, config.batch_size)
    if baseline is not None and find_spec("diffusers") is None:
        print("no baseline: the package diffusers is missing")
        baseline = None
    other = baseline and baseline(model, config.batch_size, evaluations)
    if config.compile:
        model.denoiser.network.compile()
    ours = partial(draw, request, sampler, config.batch_size)
    windows, seconds = config.windows, config.seconds
    measure(speed, ours, other, windows=windows, seconds=seconds, device=device)
    figures = speed.figures(device, config.precision)
    return figures | {"evaluations": evaluations, "machine": machine(device)}


def of_data(config: DictConfig, batch: int, _: Any) -> Figures:
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
        "the same, in [-1, 1] on the device": scaled(),
    }
    data_rates = {name: rate(counts, config.seconds, device) for name, counts in rows.items()}
    return {"data_images_per_second": data_rates, **training}


def rate(counts: Iterator[int], seconds: float, device: torch.device) -> float:
    """Return the sum of the counts that come in about `seconds`, a second; the first, which opens files, is not timed."""
    next(counts)
    window, total = Window(seconds, device), 0
    while window.open():
        total += next(counts)
    return total / window.seconds


LABELS = {
    "images_per_second": "images a second",
    "baseline_images_per_second": "  the baseline",
    "ratio": "  ratio to the baseline",
    "evaluations": "network evaluations an image",
    "batch": "images a batch",
    "peak_memory_mib": "peak memory, MiB",
    "gflop_per_image": "operations an image, GFLOP",
    "gflop_per_second": "achieved, GFLOP/s",
    "share_of_peak": "  share of the machine's peak",
}


def table(title: str, figures: Figures) -> str:
    """Return the figures as text, in columns of figure and comment."""
    rows = []
    training = figures["images_per_second"]["median"]
    for name, value in figures.get("data_images_per_second", {}).items():
        rows.append((name, figure(value), f"{figure(value / training)} x the training"))
    for name, label in LABELS.items():
        value = figures.get(name)
        if isinstance(value, dict):
            ends = f"{figure(value['min'])} .. {figure(value['max'])} in {len(value['windows'])} windows"
            rows.append((label, figure(value["median"]), ends))
        elif value is not None:
            rows.append((label, figure(value), ""))
    rows += [
        (f"  {name}, GFLOP/s", figure(v), "")
        for name, v in figures["peak_gflop_per_second"].items()
    ]
    if "experiment" in figures:
        steps, batch, hours = figures["experiment"].values()
        rows.append(("hours", figure(hours), f"{steps:,} steps of {batch} images"))
        total = sum(figures["step_ms"].values())
        rows.append(("a step, ms", figure(total), "with the clocks of its parts"))
        rows += [
            (f"  {name}", figure(ms), f"{ms / total:.1%}")
            for name, ms in figures["step_ms"].items()
            if ms
        ]
    described = ", ".join(f"{name} {value}" for name, value in figures["machine"].items())
    width = max(len(name) for name, *_ in rows)
    return "\n".join(
        [title, described, *(f"{n:<{width}}{v:>12}  {c}".rstrip() for n, v, c in rows)]
    )


def figure(value: float) -> str:
    """Three digits and the thousands apart: 0.0123, 1.23, 1,230,000."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
