"""The command that searches the time points of multi-step sampling, one after the other."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate
from jaxtyping import UInt8
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from consistency import checkpoint
from consistency.command import require_fresh
from consistency.commands.overrides import shell_line
from consistency.data.source import Source
from consistency.errors import require
from consistency.evaluation.measuring import Measure, Numbered, Settings
from consistency.formats import ours
from consistency.generation import generate
from consistency.inference.model import Model
from consistency.runtime import files, signals
from consistency.runtime.allowlist import require_trusted
from consistency.samplers import multistep
from consistency.sampling import chosen_device, searched_path
from consistency.timepoints import Found, ternary_search

SIGNS = {"frechet": 1, "kernel": 1, "class_score": -1, "precision": -1, "recall": -1}
"""The metrics, and with which sign the smallest value is the best."""


def search(config: DictConfig, output: Path) -> float:
    """Finds config.points time points below t_max for a checkpoint of a run, each with the ones before it in place.

    Keeps every measured value in `output`/measured.json, from which a stopped search goes on, draws
    `output`/curve.png anew after each, and leaves the result beside the checkpoint, where sampler=searched finds it.
    Returns the value of the metric at the points found.
    """
    require(config.metric in SIGNS, f"metric among {', '.join(SIGNS)}", config.metric, "choose one")
    require(
        config.num_scales >= config.points + 2,
        f"a grid of num_scales >= points + 2 = {config.points + 2}",
        config.num_scales,
        "give more scales or search fewer points",
    )
    path = checkpoint.find(config.checkpoint)
    loaded = checkpoint.load(path, weights=config.weights, role="consistency")
    log = Log(output, settings_of(config, path), SIGNS[config.metric])
    measure = measure_of(config, path)
    metric = measure.extractor.named(config.metric)
    count = measure.count(config.num_samples)
    times = loaded.card.process.grid.points(config.num_scales).tolist()
    with artists(config) as pool:

        def measured(chosen: Sequence[float]) -> float:
            found = measure(drawn(config, pool, chosen, count), count, config.metric)
            require(
                metric in found,
                f"an extractor and a reference that give {config.metric}",
                f"evaluation.extractor={config.evaluation.extractor}, which has no classes or no features kept",
                "choose metric=frechet",
            )
            return found[metric]

        chosen = [times[0]]
        first, before = 1, log.measure(chosen, measured)
        for number in range(1, config.points + 1):

            def value(index: int) -> float:
                return log.measure([*chosen, times[index]], measured)  # noqa: B023

            left = config.points - number
            found = ternary_search(value, first, config.num_scales - 2 - left)
            chosen, first = [*chosen, times[found.index]], found.index + 1
            log.tell(number, chosen[-1], found, before)
            before = found.values[found.index]
    result = {
        "times": chosen,
        "metric": metric,
        "protocol": measure.protocol(count),
        "value": log.sign * log.measure(chosen, measured),
        "weights": config.weights,
        "num_scales": config.num_scales,
        "seed": config.seed,
        "unimodal": log.unimodal,
    }
    place = searched_path(path)
    place.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Result:  {place}\nCurve:   {log.picture}")
    print(f"Sample:  {shell_line('sample', f'checkpoint={config.checkpoint}', 'sampler=searched')}")
    return float(result["value"])


def settings_of(config: DictConfig, path: Path) -> dict[str, Any]:
    """All that a measured value depends on."""
    names = ("weights", "metric", "seed", "num_scales", "num_samples")
    evaluation = OmegaConf.to_container(config.evaluation, resolve=True)
    return {name: config[name] for name in names} | {
        "evaluation": evaluation,
        "checkpoint": files.fingerprint(path),
    }


def measure_of(config: DictConfig, path: Path) -> Measure:
    """What samples are measured with, against the data of the run that a checkpoint comes from."""
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
    """A source of the run, from what is on this machine: a checkpoint from elsewhere has nothing fetched."""
    return instantiate({**node, **({"download": False} if "download" in node else {})})


# ------------------------------------------------------------------------ drawing, on several devices


class Artist:
    """Draws shares of the samples. Every process has one of its own, with its own copy of the model."""

    here: ClassVar["Artist"]

    def __init__(self, text: str, number: int, processes: int) -> None:
        self.config: Any = OmegaConf.create(text)
        device = chosen_device(self.config.device)
        if processes > 1 and device.type == "cpu":
            torch.set_num_threads(1)
        elif processes > 1:
            device = torch.device(device.type, number % torch.accelerator.device_count())
        self.device = device
        self.loaded: Model = checkpoint.load(self.config.checkpoint, weights=self.config.weights)
        self.loaded.denoiser.to(device)

    @classmethod
    def start(cls, text: str, numbers: Any, processes: int) -> None:
        """Makes the artist of this process; `numbers` hands each its number."""
        cls.here = cls(text, numbers.get(), processes)

    @classmethod
    def work(cls, times: list[float], indices: range) -> UInt8[Tensor, "n c h w"]:
        """Has this process's artist draw."""
        return cls.here.draw(times, indices)

    def draw(self, times: list[float], indices: range) -> UInt8[Tensor, "n c h w"]:
        """The samples number `indices`, evaluated at the times."""
        config, card = self.config, self.loaded.card

        def sampler(denoise: Any, noise: Any, label: Any = None) -> Tensor:
            return multistep(
                denoise,
                noise,
                label,
                times=times,
                clip=True,
                t_min=card.process.t_min,
                t_max=card.process.t_max,
            )

        batches = generate(
            self.loaded,
            sampler,
            indices=indices,
            labels=card.labels(None, config.seed, indices),
            shape=self.loaded.shape,
            seed=config.seed,
            batch_size=config.batch_size,
            device=self.device,
        )
        return torch.cat(list(batches)).cpu()


def artists(config: DictConfig) -> Any:
    """The processes that draw, config.devices of them; with one device this process draws."""
    text = OmegaConf.to_yaml(config, resolve=True)
    if config.devices == 1:
        Artist.here = Artist(text, 0, 1)
        return nullcontext()
    context = get_context("spawn")
    with signals.blocked():
        numbers = context.Manager().Queue()
    for number in range(config.devices):
        numbers.put(number)
    arguments = (text, numbers, config.devices)
    return ProcessPoolExecutor(config.devices, context, Artist.start, arguments)


def drawn(config: DictConfig, pool: Any, times: Sequence[float], count: int) -> Iterator[Numbered]:
    """All samples, in shares: the noise of each depends on the seed and its number alone."""
    shares = [range(first, count, config.devices) for first in range(config.devices)]
    if pool is None:
        found = [Artist.work(list(times), share) for share in shares]
    else:
        with signals.blocked():
            jobs = [pool.submit(Artist.work, list(times), share) for share in shares]
        found = [job.result() for job in jobs]
    size = config.batch_size
    for share, images in zip(shares, found, strict=True):
        for first, part in zip(range(0, len(share), size), images.split(size), strict=True):
            yield share[first : first + size], part


# ------------------------------------------------------------------------ what was measured


class Log:
    """Every value that was measured, in a file, on paper and on the screen."""

    def __init__(self, folder: Path, settings: dict[str, Any], sign: int) -> None:
        self.file, self.picture = folder / "measured.json", folder / "curve.png"
        self.settings, self.sign, self.unimodal = settings, sign, True
        self.values: dict[str, float] = {}
        if not self.file.is_file():
            require_fresh(folder)
            folder.mkdir(parents=True, exist_ok=True)
            return
        before = json.loads(self.file.read_text())
        require(
            before["settings"] == settings,
            f"the settings with which the search in output={folder} was begun",
            ", ".join(sorted(k for k in settings if before["settings"].get(k) != settings[k])),
            "choose another output=, or the same settings to go on",
        )
        self.values = before["values"]
        print(f"{folder} has {len(self.values)} measured values: going on")

    def measure(
        self, times: Sequence[float], measured: Callable[[Sequence[float]], float]
    ) -> float:
        """The value at the times with the sign that makes the smallest the best; measured once, then remembered."""
        name = " ".join(f"{t:.9g}" for t in times)
        if name not in self.values:
            self.values[name] = measured(times)
            shown = ", ".join(f"{t:.4g}" for t in times)
            print(f"t = {shown}: {self.settings['metric']} {self.values[name]:.4f}", flush=True)
            self._write()
        value = self.sign * self.values[name]
        return value if math.isfinite(value) else math.inf

    def _write(self) -> None:
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"settings": self.settings, "values": self.values}))
        unfinished.replace(self.file)
        self._draw()

    def tell(self, number: int, time: float, found: Found, before: float) -> None:
        """Says what a search has found, whether it helps, and whether it may be trusted."""
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

    def _draw(self) -> None:
        """The curve of every point: the last time of each measured list against its value, one line for each prefix."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for name, value in self.values.items():
            *before, last = name.split()
            curves.setdefault(" ".join(before), []).append((float(last), value))
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for place, points in curves.items():
            reached = ", ".join(f"{float(t):.4g}" for t in place.split())
            label = f"after t = {reached}" if reached else "one step"
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
        axes.set(xscale="log", xlabel="time point t", ylabel=self.settings["metric"])
        axes.legend()
        figure.savefig(self.picture, dpi=110)
