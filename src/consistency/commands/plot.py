"""The command `plot`: curves of runs beside each other, and published figures beside theirs."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import DictConfig

from consistency.commands.resume import CONFIG
from consistency.errors import require
from consistency.evaluation.results import FILE, Result, read_results
from consistency.inference.figures import Panel, Points, draw
from consistency.inference.plots import read_metrics
from consistency.runtime.files import ROOT, path_of, require_fresh

METRICS = "metrics.csv"
QUALITY = re.compile(r"(?:quality/)?(fid|frechet_\w+)/(.+)")
"""Names of the Fréchet distance in metrics.csv: the metric, and sampler/weights."""

FID = "fid"

NUMBER, NOTE = r"(\d+(?:\.\d+)?)", r"(?: \([^)]*\))?"
PUBLISHED = {
    rf"FID {NUMBER}{NOTE} in one step": lambda match: 1,
    rf"{NUMBER}{NOTE} in two": lambda match: 2,
    rf"FID {NUMBER} in (\d+) steps of Heun": lambda match: 2 * int(match[2]) - 1,
    rf"FID {NUMBER} in (\d+) evaluations": lambda match: int(match[2]),
    rf"FID {NUMBER} \(NFE (\d+)": lambda match: int(match[2]),
}
"""Forms of a published figure in the head of a recipe or an experiment -> its network evaluations."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is drawn of one folder.

    curves: steps, as counts, and values by metric; batch: images of an optimizer step.
    quality: points (step, value) by metric and sampler/weights; results: the newest of each sampler and weights.
    """

    name: str
    curves: Mapping[str, Points]
    batch: int | None
    quality: Mapping[tuple[str, str], Points]
    results: tuple[Result, ...]
    published: str | None

    def hours(self, points: Points) -> Points:
        """Return points over the hours of training instead of steps; none if the run has not measured them."""
        older = [(k, seconds / 3600) for k, seconds in self.curves.get("training_seconds", ())]
        hours = self.curves.get("speed/hours") or older
        if not hours:
            return []
        steps, known = zip(*[(0.0, 0.0), *hours], strict=True)
        return [(float(np.interp(k, steps, known)), value) for k, value in points]


def plot(config: DictConfig, output: Path) -> None:
    """Draw loss, schedules, quality and cost of the runs into the folder `output`."""
    remedy = "python src/plot.py runs/<a> runs/<b>"
    require(bool(config.runs), "run folders to draw", "none", remedy)
    require_fresh(output)
    folders = [path_of(run).resolve() for run in config.runs]
    runs = read_runs(folders)
    output.mkdir(parents=True, exist_ok=True)
    figures = {
        "loss": (loss_panels(runs), 2),
        "schedules": (schedule_panels(runs), 2),
        "quality": (quality_panels(runs), 3),
        "evaluations": (cost_panels(runs), 1),
    }
    for name, (panels, columns) in figures.items():
        if not panels:
            print(f"{name:<12}nothing of it in {'these runs' if len(runs) > 1 else 'this run'}")
            continue
        files = draw(panels, output / name, min(columns, len(panels)))
        print(f"{name:<12}{' '.join(map(str, files))}")


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read the folders; those of evaluations belong to the run whose checkpoints they measured, if it is among them."""
    runs: dict[Path, list[Path]] = {}
    evaluations, wanted = [], f"run folders with {METRICS}, or those of evaluate.py with {FILE}"
    for folder in folders:
        require(folder.is_dir(), wanted, f"no folder at {folder}", "check the path")
        if (folder / METRICS).is_file() and (folder / CONFIG).is_file():
            runs.setdefault(folder, [])
        elif (folder / FILE).is_file():
            evaluations.append(folder)
        else:  # as the jobs of a sweep that failed
            print(f"left out    {folder}: nothing has been logged or measured there")
    require(bool(runs or evaluations), wanted, "folders without either", "check the paths")
    for folder in evaluations:
        places = (Path(place).resolve() for place in read_results(folder / FILE).checkpoints)
        measured = {place.parents[1] for place in places} & set(runs)
        for run in measured or {folder}:
            runs.setdefault(run, []).append(folder)
    names = [folder.name for folder in runs]
    return [
        _read(
            folder,
            folder.name if names.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}",
            own,
        )
        for folder, own in runs.items()
    ]


def _read(folder: Path, name: str, evaluations: Iterable[Path]) -> Run:
    config: Any = {}
    metrics: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        config = yaml.safe_load((folder / CONFIG).read_text())
        metrics = read_metrics(folder / METRICS)
    curves = {
        metric: [(step + 1, value) for step, value in zip(*columns, strict=True)]
        for metric, columns in metrics.items()
    }
    quality = {
        (match[1], match[2]): dict(points)
        for metric, points in curves.items()
        if (match := QUALITY.fullmatch(metric))
    }
    results: dict[tuple[str, str, str], Result] = {}
    own = [folder] if (folder / FILE).is_file() and folder not in evaluations else []
    for place in (*own, *evaluations):
        for row in read_results(place / FILE).rows:  # snapshots in the order of their steps
            metric = next(iter(row.metrics))
            results[metric, row.sampler, row.weights] = row
            if row.step is not None:
                points = quality.setdefault((metric, f"{row.sampler}/{row.weights}"), {})
                points[row.step] = row.metrics[metric]
    return Run(
        name=name,
        curves=curves,
        batch=(config.get("data") or {}).get("batch_size"),
        quality={key: sorted(points.items()) for key, points in quality.items()},
        results=tuple(results.values()),
        published=(config.get("mode") or {}).get("published"),
    )


def loss_panels(runs: list[Run]) -> list[Panel]:
    """Return a panel for each quarter of a batch by noise level."""
    levels = ("lowest", "second", "third", "highest")
    titles = {
        f"train/loss_noise_quartile_{number}": f"loss, {level} quarter of the noise levels"
        for number, level in enumerate(levels, start=1)
    }
    return _panels(runs, titles)


def schedule_panels(runs: list[Run]) -> list[Panel]:
    """Return the panels of N(k) and mu(k), of the runs that have them."""
    return _panels(
        runs,
        {"schedule/N": "number of time points N(k)", "schedule/mu": "decay of the target μ(k)"},
    )


def _panels(runs: list[Run], titles: Mapping[str, str]) -> list[Panel]:
    found = {
        title: {run.name: run.curves[name] for run in runs if name in run.curves}
        for name, title in titles.items()
    }
    return [
        Panel(title=t, x="optimizer step k", lines=lines) for t, lines in found.items() if lines
    ]


def quality_panels(runs: list[Run]) -> list[Panel]:
    """Return three panels a metric: over optimizer steps, images and hours."""
    panels = []
    for metric in dict.fromkeys(metric for run in runs for metric, _ in run.quality):
        by_step, by_image, by_hour = dict[str, Points](), dict[str, Points](), dict[str, Points]()
        for run in runs:
            for (measured, title), points in run.quality.items():
                if measured == metric:
                    label = f"{run.name}, {title.replace('/', ', ')}"
                    by_step[label] = points
                    if run.batch is not None:
                        by_image[label] = [(k * run.batch, value) for k, value in points]
                    if timed := run.hours(points):
                        by_hour[label] = timed
        axes = {"optimizer step k": by_step, "training images": by_image, "hours": by_hour}
        panels += [Panel(title=metric, x=x, lines=lines) for x, lines in axes.items() if lines]
    return panels


def cost_panels(runs: list[Run]) -> list[Panel]:
    """Return a panel a metric over the network evaluations of a sample; published FIDs stand beside those of the runs."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run in runs:
        for row in run.results:
            if row.nfe is not None:
                metric, label = next(iter(row.metrics)), f"{run.name}, {row.weights}"
                points = found.setdefault(metric, {}).setdefault(label, [])
                points.append((row.nfe, row.metrics[metric]))
    panel = partial(Panel, x="network evaluations of a sample (NFE)", x_log=True)
    panels = []
    for metric, lines in found.items():
        ids = {run.published for run in runs if run.published} if metric == FID else set()
        known = {
            f"published: {name}": points for name in sorted(ids) if (points := published(name))
        }
        panels.append(panel(title=metric, lines=lines, published=known))
    return panels


def published(run: str) -> list[tuple[float, float]]:
    """Return network evaluations and FID of a published run, from the head of the file with its settings."""
    for file in _settings():
        text = file.read_text()
        if re.search(rf"\bpublished: {re.escape(run)}\b", text):
            head = re.search(r"^#.*Published: (.*?)(?:;| Source|$)", text, re.MULTILINE)
            said = head[1] if head else ""
            found = ((form, re.search(pattern, said)) for pattern, form in PUBLISHED.items())
            return sorted((float(form(m)), float(m[1])) for form, m in found if m)
    return []


def _settings() -> Iterator[Path]:
    yield from sorted((ROOT / "conf" / "recipe").glob("*.yaml"))
    yield from sorted((ROOT / "experiments").rglob("*.yaml"))
