"""The command `benchmark`: images per second of the data pipeline and of training."""

import json
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig

from consistency.data.module import DataModule
from consistency.errors import require
from consistency.evaluation.metrics import Clock
from consistency.runtime.files import require_fresh, write_text
from consistency.training import build

PARTS = ("data", "train")
ENDLESS = 10**12


def benchmark(config: DictConfig, output: Path) -> None:
    """Measure the speed of config.part, print a table, and write it into `output`/benchmark.json."""
    build.quiet()
    require_fresh(output)
    require(config.part in PARTS, f"part among {', '.join(PARTS)}", config.part, "choose one")
    for name, right in (("seconds", config.seconds > 0), ("train_steps", config.train_steps >= 1)):
        require(right, f"{name} > 0", config[name], "give a positive number")
    build.require_taken(config.trainer)
    config = measured(config)
    data = build.build_data(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speeds = data_speeds(data, device, config.seconds) if config.part == "data" else {}
    batch = config.train_batch or (8 if device == "cpu" else config.data.batch_size)
    choices: Any = HydraConfig.get().runtime.choices
    name = f"training mode={choices.mode} model={choices.model}, batches of {batch}"
    speeds[name] = training_speed(config, batch, config.train_steps)
    kind = "random images in memory" if config.images else "images"
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    shape = f"{data.channels}x{data.image_size}x{data.image_size}"
    images, threads = f"{len(data.train_source)} {kind} of {shape}", torch.get_num_threads()
    title = f"data={choices.data}, {images}, on a {machine}, {threads} threads"
    file, content = output / "benchmark.json", {"title": title, "images_per_second": speeds}
    write_text(file, json.dumps(content, indent=2))
    print(f"\n{table(title, speeds)}\nWritten: {file}")


def measured(config: DictConfig) -> DictConfig:
    """Return the configuration without held-out images and, if images= is given, without files."""
    config = deepcopy(build.expanded(config))
    config.data.held_out = None
    if config.images is not None:
        require(config.images >= 1, "images >= 1, or null", config.images, "give a number")
        data = config.data
        data.source = {name: data[name] for name in ("channels", "image_size", "num_classes")} | {
            "_target_": "consistency.data.memory.noise",
            "count": max(config.images, data.batch_size),
        }
        data.num_workers = 0
    return config


def data_speeds(data: DataModule, device: str, seconds: float) -> dict[str, float]:
    """Measure the source image by image, its loader, and the loader with scaling and flips on the device."""
    order = data.batches(split=data.split(1), total=ENDLESS)
    draw = torch.Generator(device).manual_seed(0)
    loader = partial(data.loader, order, pin_memory=device == "cuda")

    def one_by_one() -> Iterable[int]:
        for index in chain.from_iterable(order):
            data.train_source[index]
            yield 1

    def scaled() -> Iterable[int]:
        for images, _ in loader():
            yield len(data.augmented(images.to(device, non_blocking=True), draw))

    loaded = f"loader, batches of {data.batch_size}, {data.num_workers} workers"
    return {
        "source, image by image": rate(one_by_one, seconds),
        loaded: rate(lambda: (len(images) for images, _ in loader()), seconds),
        "the same, in [-1, 1] on the device": rate(scaled, seconds),
    }


def rate(counts: Callable[[], Iterable[int]], seconds: float) -> float:
    """Return the sum of the counts that come in about `seconds`, a second; the first, which opens files, is not timed."""
    remaining = iter(counts())
    next(remaining, None)
    clock, total = Clock(), 0
    clock.read()
    until = time.perf_counter() + seconds
    for count in remaining:
        total += count
        if time.perf_counter() >= until:
            break
    return total / clock.read()["total"]


def training_speed(config: DictConfig, batch: int, steps: int) -> float:
    """Return the images a second of `steps` optimizer steps of `batch` images with the configured mode, on one device.

    The time is that from the second batch to the last.
    """
    short = deepcopy(config)
    short.data.batch_size, short.data.device_batch_size = batch, None
    short.callbacks = {}
    short.trainer.max_steps, short.trainer.devices = steps + 1, 1
    clock, seconds = Clock(), list[float]()
    timer = LambdaCallback(
        on_train_batch_start=lambda *step: clock.read() if step[-1] == 1 else None,
        on_train_end=lambda *_: seconds.append(clock.read()["total"]),
    )
    data = build.build_data(short)
    module = build.build_module(short, data)
    trainer = build.build_trainer(short, [*build.build_callbacks(short), timer], [], data)
    trainer.fit(module, datamodule=data)
    return steps * batch / seconds[0]


def table(title: str, speeds: dict[str, float]) -> str:
    """Return the images a second as text, each compared with the last one, the training."""
    width, training = max(map(len, speeds)) + 2, [*speeds.values()][-1]
    rows = {"": ("images/s", "x training")}
    rows |= {name: (figure(v), figure(v / training)) for name, v in speeds.items()}
    return "\n".join([title, *(f"{n:<{width}}{a:>12}{b:>12}" for n, (a, b) in rows.items())])


def figure(value: float) -> str:
    """Three digits and the thousands apart: 0.0123, 1.23, 1,230,000."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
