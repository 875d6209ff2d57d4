"""The command `search`: searches the time points of multi-step sampling, one after the other."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from consistency.checkpoints import ours
from consistency.checkpoints.load import find, load
from consistency.commands.overrides import shell_line
from consistency.data.source import Source
from consistency.errors import require
from consistency.evaluation.metrics import Measure, measure_against
from consistency.evaluation.results import SIGNS
from consistency.inference import options
from consistency.inference.generate import drawing, fitting_batch, in_batches
from consistency.inference.plots import draw_lines
from consistency.runtime.allowlist import require_trusted
from consistency.runtime.devices import chosen_device
from consistency.runtime.files import fingerprint, write_text
from consistency.samplers import multistep


def search(config: DictConfig, output: Path) -> float:
    """Search config.points time points below t_max for a checkpoint of a run, each with the ones before it in place.

    Writes every measured value to measured.json and curve.png in `output`, and the result beside the checkpoint for
    sampler=searched. A stopped search goes on. Returns the metric at the time points.
    """
    require(config.metric in SIGNS, f"metric among {', '.join(SIGNS)}", config.metric, "choose one")
    fewest, finer = config.points + 2, "give more scales or search fewer points"
    grid = f"a grid of num_scales >= points + 2 = {fewest}"
    require(config.num_scales >= fewest, grid, config.num_scales, finer)
    device = chosen_device(config.device, config.devices)
    path, place = find(config.checkpoint), config.autoencoder
    model = load(path, "consistency", weights=config.weights, autoencoder=place)
    model.card.require_variance_exploding("time points of multi-step sampling")
    config.batch_size = config.batch_size or fitting_batch(model.card.shape, device)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    names = ("weights", "metric", "seed", "num_scales", "num_samples", "evaluation")
    settings = {name: plain[name] for name in names} | {"checkpoint": fingerprint(path)}
    log = Log(output, settings)
    measure, process, devices = measure_of(config, path), model.card.process, config.devices
    count, metric = measure.count(config.num_samples), measure.extractor.named(config.metric)
    prepare = partial(options.request_of, plain, model if devices == 1 else None)
    with drawing(prepare, devices) as draw:

        def value(times: Sequence[float]) -> float:
            t_min, t_max, clip = process.t_min, process.t_max, model.card.clips
            sampler = partial(multistep, times=times, t_min=t_min, t_max=t_max, clip=clip)
            samples = draw(sampler, in_batches(range(count), config.batch_size))
            values = measure(samples, count, config.metric)
            got = f"evaluation.extractor={config.evaluation.extractor}, without classes or features"
            expected = f"an extractor and a reference that give {metric}"
            require(metric in values, expected, got, "choose metric=frechet")
            return values[metric]

        log.value = value
        times = log.search(process.grid.points(config.num_scales).tolist(), config.points)
    best = log.sign * log.measure(times)
    result = {
        "times": times,
        "metric": metric,
        "protocol": measure.protocol(count, model.card),
        "value": best,
        **{name: settings[name] for name in ("weights", "checkpoint", "num_scales", "seed")},
        "unimodal": log.unimodal,
    }
    write_text(options.searched_path(path), json.dumps(result, indent=2) + "\n")
    print(f"Result:  {options.searched_path(path)}\nCurve:   {log.picture}")
    print(f"Sample:  {shell_line('sample', f'checkpoint={config.checkpoint}', 'sampler=searched')}")
    return best


def measure_of(config: DictConfig, path: Path) -> Measure:
    """Return the measure against the data of the run that wrote the checkpoint; it downloads nothing."""
    run = ours.read(path).get("config", {}) if path.is_file() else {}
    data: dict[str, Any] = run.get("data") or {}
    got, remedy = "one that says nothing of its data", "take a checkpoint that src/train.py wrote"
    require(bool(data.get("source")), f"a checkpoint of a run, at {path}", got, remedy)
    require_trusted(run, path)

    def local(name: str) -> Source:
        node = data[name]
        return instantiate({**node, **({"download": False} if "download" in node else {})})

    return measure_against(
        partial(local, "source"),
        partial(local, "held_out") if data.get("held_out") else None,
        chosen_device(config.device),
        **config.evaluation,
        batch_size=config.batch_size,
        num_workers=0,
    )


def is_unimodal(values: Mapping[int, float]) -> bool:
    """Return whether values, by index, fall strictly to one minimum and rise strictly from it, as ternary search assumes."""
    steps = list(pairwise(values[index] for index in sorted(values)))
    rises = [a < b for a, b in steps]
    return rises == sorted(rises) and all(a != b for a, b in steps)


def ternary_search(measure: Callable[[int], float], first: int, last: int) -> dict[int, float]:
    """Minimise `measure` over the indices first ... last, both included [Song et al. 2023, arXiv:2303.01469,
    Section 3: "ternary search"]. Return the measured values by index.

    Two inner points cut the range in thirds, and the third beyond the larger value is dropped: about
    2 log_{3/2}(last - first) values are measured, each once. The minimum is exact if `measure` falls strictly to it and
    rises strictly from it.
    """
    indices = f"{first} to {last}"
    require(first <= last, "a range of at least one index", indices, "search a finer grid")
    values: dict[int, float] = {}

    def value(index: int) -> float:
        if index not in values:
            values[index] = measure(index)
        return values[index]

    low, high = first, last
    while high - low > 2:
        third = (high - low) // 3
        left, right = low + third, high - third
        if value(left) < value(right):
            high = right - 1
        elif value(left) > value(right):
            low = left + 1
        else:
            low, high = left, right
    for index in range(low, high + 1):
        value(index)
    return dict(sorted(values.items()))


class Log:
    """The measured values of a search: in measured.json, in curve.png and on the screen. It goes on with earlier ones."""

    value: Callable[[Sequence[float]], float]  # time points -> the metric

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.file, self.picture = folder / "measured.json", folder / "curve.png"
        self.settings, self.metric, self.unimodal = settings, settings["metric"], True
        self.sign = SIGNS[self.metric]
        self.values: dict[str, float] = {}
        if record := options.record_of(self.file, settings, "search"):
            self.values = record["values"]
            print(f"{folder} has {len(self.values)} measured values: going on")

    def search(self, grid: list[float], points: int) -> list[float]:
        """Search so many points of the grid after the first, greedily; each lies after the one before it."""
        times, first = grid[:1], 1
        before = self.measure(times)
        for number in range(1, points + 1):
            last = len(grid) - 2 - (points - number)
            values = ternary_search(lambda i: self.measure([*times, grid[i]]), first, last)
            index = min(values, key=values.__getitem__)
            times.append(grid[index])
            best = values[index]
            print(f"point {number}: t = {grid[index]:.5g}, {self.metric} {self.sign * best:.4f}")
            if best >= before:
                print(f"  no better than without this point ({self.sign * before:.4f})")
            if not is_unimodal(values):
                self.unimodal = False
                print(f"  the {len(values)} values have several minima: a better point may exist.")
                print("  More samples make them smoother; curve.png shows them")
            first, before = index + 1, best
        return times

    def measure(self, times: Sequence[float]) -> float:
        """Return the value at the time points, with the sign under which the smallest is the best. Measures it once."""
        name = " ".join(f"{t:.9g}" for t in times)
        if name not in self.values:
            self.values[name] = self.value(times)
            shown = ", ".join(f"{t:.4g}" for t in times)
            print(f"t = {shown}: {self.metric} {self.values[name]:.4f}", flush=True)
            write_text(self.file, json.dumps({"settings": self.settings, "values": self.values}))
            self._draw_curve()
        signed = self.sign * self.values[name]
        return signed if math.isfinite(signed) else math.inf

    def _draw_curve(self) -> None:
        """Draw value over last time point, one line for each list of time points before it."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for name, value in self.values.items():
            before, _, last = name.rpartition(" ")
            shown = ", ".join(f"{float(t):.4g}" for t in before.split())
            label = f"after t = {shown}" if shown else "one step"
            curves.setdefault(label, []).append((float(last), value))
        draw_lines(curves, self.picture, "time point t", self.metric)
