"""The command that measures speed: of the data, and of the training that they must keep up with."""

import json
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from consistency.command import require_fresh
from consistency.data.module import DataModule
from consistency.errors import require
from consistency.training.arguments import require_taken
from consistency.training.run import (
    build_callbacks,
    build_data,
    build_module,
    build_trainer,
    quiet,
)

PARTS = ("data", "train")
BATCH_ON_CPU = 8
ENDLESS = 10**12


class Row(NamedTuple):
    """What was measured, in images a second."""

    name: str
    speed: float


def benchmark(config: DictConfig, output: Path) -> None:
    """Measures what config.part says, prints one table and writes it into `output`/benchmark.json."""
    quiet()
    require_fresh(output)
    require(config.part in PARTS, f"part among {', '.join(PARTS)}", config.part, "choose one")
    require(config.seconds > 0, "seconds > 0", config.seconds, "give the time of a row")
    require(config.train_steps >= 1, "train_steps >= 1", config.train_steps, "give a number")
    require_taken(config.trainer)
    config = measured(config)
    data = build_data(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = data_rows(data, device, config.seconds) if config.part == "data" else []
    batch = config.train_batch or (BATCH_ON_CPU if device == "cpu" else config.data.batch_size)
    choices: Any = HydraConfig.get().runtime.choices
    speed = training_speed(config, batch, config.train_steps)
    name = f"training mode={choices.mode} model={choices.model}, batches of {batch}"
    rows.append(Row(name, speed))
    kind = "random images in memory" if config.images else "images"
    shape = f"{data.channels}x{data.image_size}x{data.image_size}"
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    title = (
        f"data={choices.data}, {len(data.train_source)} {kind} of {shape}, on a {machine}, "
        f"{torch.get_num_threads()} threads"
    )
    text = table(title, rows)
    output.mkdir(parents=True, exist_ok=True)
    found = {"title": title, "images_per_second": {row.name: row.speed for row in rows}}
    (output / "benchmark.json").write_text(json.dumps(found, indent=2))
    print(f"\n{text}\nWritten: {output / 'benchmark.json'}")


def measured(config: DictConfig) -> DictConfig:
    """The configuration without what a measurement does not want: held-out images; with images=, without files."""
    config = deepcopy(config)
    config.data.held_out = None
    if config.images is not None:
        require(config.images >= 1, "images >= 1, or null", config.images, "give a number")
        config.data.source = {
            "_target_": "consistency.data.held.noise",
            "count": max(config.images, config.data.batch_size),
            "channels": config.data.channels,
            "image_size": config.data.image_size,
            "num_classes": config.data.num_classes,
        }
        config.data.num_workers = 0
    return config


def data_rows(data: DataModule, device: str, seconds: float) -> list[Row]:
    """The source image by image, its loader, and the loader with scaling and flips on the device."""
    source = data.train_source
    order = data.batches(split=data.split(1), total=ENDLESS)
    loader = f"loader, batches of {data.batch_size}, {data.num_workers} workers"
    draw = torch.Generator(device).manual_seed(0)

    def one_by_one() -> Iterable[int]:
        for indices in order:
            for index in indices:
                source[index]
                yield 1

    def loaded() -> Iterable[int]:
        for images, _ in data.loader(order, pin_memory=device == "cuda"):
            yield len(images)

    def scaled() -> Iterable[int]:
        for images, _ in data.loader(order, pin_memory=device == "cuda"):
            yield len(data.augmented(images.to(device, non_blocking=True), draw))

    return [
        Row("source, image by image", rate(one_by_one, seconds)),
        Row(loader, rate(loaded, seconds)),
        Row("the same, in [-1, 1] on the device", rate(scaled, seconds)),
    ]


def rate(counts: Callable[[], Iterable[int]], seconds: float) -> float:
    """Sum of the counts that come in about `seconds`, a second; the first, which opens files, is not timed."""
    coming = iter(counts())
    for _ in islice(coming, 1):
        pass
    _wait()
    start, total, passed = time.perf_counter(), 0, 0.0
    for count in coming:
        total += count
        passed = time.perf_counter() - start
        if passed >= seconds:
            break
    _wait()
    return total / (time.perf_counter() - start)


class Clock(Callback):
    """The seconds from the second batch to the last."""

    def __init__(self) -> None:
        self.start, self.seconds = 0.0, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            _wait()
            self.start = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        _wait()
        self.seconds = time.perf_counter() - self.start


def training_speed(config: DictConfig, batch: int, steps: int) -> float:
    """Images a second of `steps` optimizer steps of `batch` images with the configured mode, on one device."""
    short = deepcopy(config)
    short.data.batch_size, short.data.device_batch_size = batch, None
    short.callbacks = {}
    short.trainer.max_steps, short.trainer.devices = steps + 1, 1
    data = build_data(short)
    module = build_module(short, data)
    clock = Clock()
    trainer = build_trainer(short, [*build_callbacks(short), clock], [], data)
    trainer.fit(module, datamodule=data)
    return steps * batch / clock.seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, rows: list[Row]) -> str:
    """The rows as text; the last, the training, is what the others are compared with."""
    width = max(len(row.name) for row in rows) + 2
    lines = [title, f"{'':<{width}}{'images/s':>12}{'x training':>12}"]
    for row in rows:
        compared = row.speed / rows[-1].speed
        lines.append(f"{row.name:<{width}}{figure(row.speed):>12}{figure(compared):>12}")
    return "\n".join(lines)


def figure(value: float) -> str:
    """Three digits and the thousands apart: 0.0123, 1.23, 1,230,000."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
