"""The command `search`: searches the time points of multi-step sampling, one after the other."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from consistency.checkpoints import ours
from consistency.checkpoints.load import find, load
from consistency.commands.cli import require_fresh
from consistency.commands.overrides import shell_line
from consistency.commands.time_search import Minimum, ternary_search
from consistency.data.source import Source
from consistency.errors import require
from consistency.evaluation.metrics import Measure, Settings
from consistency.inference.generate import Draw, drawing, in_batches
from consistency.inference.options import ModelOptions, require_same_settings, searched_path
from consistency.runtime.allowlist import require_trusted
from consistency.runtime.devices import chosen_device, require_devices
from consistency.runtime.files import fingerprint, write_text
from consistency.samplers import multistep

SIGNS = {"frechet": 1, "kernel": 1, "class_score": -1, "precision": -1, "recall": -1}
"""The metrics, each with the sign under which the smallest value is the best."""


def search(config: DictConfig, output: Path) -> float:
    """Search config.points time points below t_max for a checkpoint of a run, each with the ones before it in place.

    Writes every measured value to measured.json and curve.png in `output`, and the result beside the checkpoint for
    sampler=searched. A stopped search goes on. Returns the metric at the time points.
    """
    require(config.metric in SIGNS, f"metric among {', '.join(SIGNS)}", config.metric, "choose one")
    require(
        config.num_scales >= config.points + 2,
        f"a grid of num_scales >= points + 2 = {config.points + 2}",
        config.num_scales,
        "give more scales or search fewer points",
    )
    require_devices(chosen_device(config.device), config.devices)
    path = find(config.checkpoint)
    model = load(path, weights=config.weights, role="consistency")
    options = ModelOptions(
        checkpoint=str(path), weights=config.weights, device=config.device, seed=config.seed
    )
    log = SearchLog(output, settings_of(config, path), SIGNS[config.metric])
    measure = measure_of(config, path)
    count = measure.count(config.num_samples)
    grid = model.card.process.grid.points(config.num_scales).tolist()
    prepare = partial(options.prepare, model if config.devices == 1 else None)
    with drawing(prepare, config.devices) as draw:
        log.value = partial(measured, measure, draw, config, count, model.card.process)
        times = search_points(log, grid, config.points)
        best = log.sign * log.measure(times)
    result = {
        "times": times,
        "metric": measure.extractor.named(config.metric),
        "protocol": measure.protocol(count),
        "value": best,
        "weights": config.weights,
        "checkpoint": log.settings["checkpoint"],
        "num_scales": config.num_scales,
        "seed": config.seed,
        "unimodal": log.unimodal,
    }
    write_text(searched_path(path), json.dumps(result, indent=2) + "\n")
    print(f"Result:  {searched_path(path)}\nCurve:   {log.picture}")
    print(f"Sample:  {shell_line('sample', f'checkpoint={config.checkpoint}', 'sampler=searched')}")
    return best


def search_points(log: "SearchLog", grid: list[float], points: int) -> list[float]:
    """Search so many points of the grid after the first, greedily; each lies after the one before it."""
    times, first = grid[:1], 1
    before = log.measure(times)
    for number in range(1, points + 1):
        last = len(grid) - 2 - (points - number)
        found = ternary_search(lambda index: log.measure([*times, grid[index]]), first, last)
        times.append(grid[found.index])
        log.report(number, times[-1], found, before)
        first, before = found.index + 1, found.values[found.index]
    return times


def measured(
    measure: Measure,
    draw: Draw,
    config: DictConfig,
    count: int,
    process: Any,
    times: Sequence[float],
) -> float:
    """Return the metric of samples that are evaluated at the time points."""
    sampler = partial(
        multistep, times=list(times), clip=True, t_min=process.t_min, t_max=process.t_max
    )
    samples = draw(sampler, in_batches(range(count), config.batch_size))
    found, name = measure(samples, count, config.metric), measure.extractor.named(config.metric)
    require(
        name in found,
        f"an extractor and a reference that give {name}",
        f"evaluation.extractor={config.evaluation.extractor}, without classes or without features of the reference",
        "choose metric=frechet",
    )
    return found[name]


def settings_of(config: DictConfig, path: Path) -> dict[str, Any]:
    """Return all that a measured value depends on."""
    names = ("weights", "metric", "seed", "num_scales", "num_samples")
    evaluation = OmegaConf.to_container(config.evaluation, resolve=True)
    settings = {name: config[name] for name in names}
    return settings | {"evaluation": evaluation, "checkpoint": fingerprint(path)}


def measure_of(config: DictConfig, path: Path) -> Measure:
    """Return the measure against the data of the run that wrote the checkpoint."""
    run = ours.read(path).get("config", {}) if path.is_file() else {}
    data: dict[str, Any] = run.get("data") or {}
    require(
        bool(data.get("source")),
        f"a checkpoint of a run, at {path}",
        "one that says nothing of its data",
        "search for a checkpoint that src/train.py wrote",
    )
    require_trusted(run, path)
    held_out = data.get("held_out")
    settings = Settings(**config.evaluation, batch_size=config.batch_size)
    return settings.prepare(
        chosen_device(config.device),
        train=lambda: _local(data["source"]),
        held_out=None if not held_out else lambda: _local(held_out),
        num_workers=0,
    )


def _local(node: dict[str, Any]) -> Source:
    """Build a source of the run from files of this machine: a checkpoint from elsewhere downloads nothing."""
    return instantiate({**node, **({"download": False} if "download" in node else {})})


class SearchLog:
    """The measured values of a search: in measured.json, in curve.png and on the screen.

    value: time points -> the metric.
    """

    value: Callable[[Sequence[float]], float]

    def __init__(self, folder: Path, settings: dict[str, Any], sign: int) -> None:
        self.file, self.picture = folder / "measured.json", folder / "curve.png"
        self.settings, self.sign, self.unimodal = settings, sign, True
        self.values: dict[str, float] = {}
        if not self.file.is_file():
            require_fresh(folder)
            return
        before = json.loads(self.file.read_text())
        require_same_settings(before["settings"], settings, "search", folder)
        self.values = before["values"]
        print(f"{folder} has {len(self.values)} measured values: going on")

    def measure(self, times: Sequence[float]) -> float:
        """Return the value at the time points, with the sign under which the smallest is the best. Measures it once."""
        name = " ".join(f"{t:.9g}" for t in times)
        if name not in self.values:
            self.values[name] = self.value(times)
            shown = ", ".join(f"{t:.4g}" for t in times)
            print(f"t = {shown}: {self.settings['metric']} {self.values[name]:.4f}", flush=True)
            content = {"settings": self.settings, "values": self.values}
            write_text(self.file, json.dumps(content))
            self._draw_curve()
        signed = self.sign * self.values[name]
        return signed if math.isfinite(signed) else math.inf

    def report(self, number: int, time: float, found: Minimum, before: float) -> None:
        """Print a point, and warn if it does not help or the values have several minima."""
        best = found.values[found.index]
        print(f"point {number}: t = {time:.5g}, {self.settings['metric']} {self.sign * best:.4f}")
        if best >= before:
            print(f"  no better than without this point ({self.sign * before:.4f})")
        if not found.unimodal:
            self.unimodal = False
            print(
                f"  the {len(found.values)} values do not fall to one minimum and rise after it: there may be a better "
                "point. More samples make them smoother; curve.png shows them"
            )

    def _draw_curve(self) -> None:
        """Draw value over last time point, one line for each list of time points before it."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for name, value in self.values.items():
            *before, last = name.split()
            curves.setdefault(" ".join(before), []).append((float(last), value))
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for prefix, points in curves.items():
            shown = ", ".join(f"{float(t):.4g}" for t in prefix.split())
            label = f"after t = {shown}" if shown else "one step"
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
        axes.set(xscale="log", xlabel="time point t", ylabel=self.settings["metric"])
        axes.legend()
        figure.savefig(self.picture, dpi=110)
