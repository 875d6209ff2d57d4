"""The command `compare`: modes on one data set at equal training time."""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from consistency.checkpoints.load import load
from consistency.commands.cli import require_fresh
from consistency.errors import require
from consistency.inference import plots
from consistency.runtime.files import ROOT

FRECHET, PRECISION, RECALL = "frechet_classifier", "precision_classifier", "recall_classifier"
STRIP = 30
COLUMNS = 15


@dataclass(frozen=True)
class Trained:
    """A finished run: its results by sampler, its training seconds and speed."""

    mode: str
    folder: Path
    results: dict[str, dict[str, float]]
    steps: int
    seconds: float
    images_per_second: float


def compare(config: DictConfig, output: Path) -> None:
    """Train teacher and modes; write comparison.md, comparison.json and comparison.png into the folder `output`."""
    require(config.seconds > 0, "seconds > 0", config.seconds, "give the training time of a mode")
    require_fresh(output)
    output.mkdir(parents=True, exist_ok=True)
    teacher = _train_for(config, config.teacher_mode, output)
    runs = [_train_for(config, m, output, f"teacher={teacher.folder}") for m in config.modes]
    runs.append(teacher)
    table = markdown(runs, teacher_mode=config.teacher_mode)
    (output / "comparison.md").write_text(table)
    values = [{**vars(run), "folder": str(run.folder)} for run in runs]
    (output / "comparison.json").write_text(json.dumps(values, indent=2))
    picture(runs, config.seed).save(output / "comparison.png")
    print(f"\n{table}\nPicture: {output / 'comparison.png'}\nTable:   {output / 'comparison.md'}")


def _train_for(config: DictConfig, mode: str, output: Path, *extra: str) -> Trained:
    """Train `mode` for config.seconds, at the speed that a short trial measures."""
    base = [f"mode={mode}", f"data={config.data}", f"seed={config.seed}", "logger=csv"]
    base += [*extra, *config.overrides]
    trial, folder = output / "speed" / mode, output / mode
    length = [f"trainer.max_steps={config.calibration_steps}", "trainer.log_every_n_steps=10"]
    none = [f"callbacks.{name}=null" for name in ("evaluation", "samples", "checkpoint.monitor")]
    print(f"{mode}: measuring its speed in {config.calibration_steps} steps ...", flush=True)
    _train([*base, *length, *none, f"output={trial}"], quiet=True)
    # The median, so that another program's load for a moment does not shorten the run.
    metrics = plots.read_metrics(trial / "metrics.csv")
    speed = statistics.median(metrics["images_per_second"][1])
    batch = OmegaConf.load(trial / "config.yaml").data.batch_size
    steps = max(1, round(config.seconds * speed / batch))
    print(f"{mode}: {steps} steps for {config.seconds:.0f} s", flush=True)
    _train([*base, f"trainer.max_steps={steps}", f"output={folder}"], quiet=False)
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    seconds = plots.read_metrics(folder / "metrics.csv")["training_seconds"][1][-1]
    return Trained(mode, folder, results, steps, seconds, steps * batch / seconds)


def _train(arguments: list[str], *, quiet: bool) -> None:
    program = [sys.executable, str(ROOT / "src" / "train.py"), *arguments]
    output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    done = subprocess.run(program, text=True, check=False, **output)
    got = f"train.py {' '.join(arguments)}\n{done.stdout or ''}".strip()
    require(
        not done.returncode, "every run of the comparison to succeed", got, "mend the reason above"
    )


def markdown(runs: list[Trained], *, teacher_mode: str) -> str:
    """Return the table: training images, every mode and sampler, noise."""
    ends = {name: runs[0].results[name] for name in ("train_images", "noise")}
    rows = [("train images", ends["train_images"], "– | –")]
    for run in runs:
        role = " (teacher)" if run.mode == teacher_mode else ""
        time = f"{run.seconds:.0f} | {run.images_per_second:.0f}"
        for sampler, quality in run.results.items():
            if sampler not in ends:
                name = sampler.split("/")[0].replace("_", " ")
                rows.append((f"`{run.mode}`{role}, {name}", quality, time))
    lines = [
        "| | Fréchet | x train | precision | recall | training s | images/s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, quality, time in [*rows, ("noise", ends["noise"], "– | –")]:
        frechet = f"{quality[FRECHET]:.2f} | {quality[FRECHET] / rows[0][1][FRECHET]:.2f}"
        others = f"{quality[PRECISION]:.3f} | {quality[RECALL]:.3f}"
        lines.append(f"| {name} | {frechet} | {others} | {time} |")
    return "\n".join([*lines, ""])


def picture(runs: list[Trained], seed: int) -> Image.Image:
    """Draw samples of every run and sampler from the same noise and classes, one strip each."""
    strips = []
    for run in runs:
        model, config = load(run.folder), OmegaConf.load(run.folder / "config.yaml")
        labels = list(range(model.card.num_classes or 0)) or None
        for name, node in config.mode.samplers.items():
            sampler = instantiate(node, _convert_="all")
            images = model.sample(STRIP, sampler=sampler, labels=labels, seed=seed)
            caption = f"{run.mode}, {name.replace('_', ' ')}"
            strips.append((caption, plots.grid(images, COLUMNS)))
    return plots.below_each_other(strips)
