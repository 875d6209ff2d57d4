"""The command `compare`: modes on one data set at equal training time."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from consistency.checkpoints.load import load
from consistency.errors import require
from consistency.inference import plots
from consistency.runtime.files import ROOT, require_fresh

FRECHET, PRECISION, RECALL = "frechet_classifier", "precision_classifier", "recall_classifier"
STRIP, COLUMNS = 30, 15


def compare(config: DictConfig, output: Path) -> None:
    """Train teacher and modes; write comparison.md, comparison.json and comparison.png into the folder `output`."""
    require(config.seconds > 0, "seconds > 0", config.seconds, "give the training time of a mode")
    require_fresh(output)
    output.mkdir(parents=True, exist_ok=True)
    teachers = teachers_of(config)
    teacher = _train_for(config, config.teacher_mode, output)
    folders, runs = {config.teacher_mode: teacher["folder"]}, []
    for mode in config.modes:
        runs.append(_train_for(config, mode, output, f"teacher={folders[teachers[mode]]}"))
        folders[mode] = runs[-1]["folder"]
    runs.append(teacher)
    table = markdown(runs, teacher_mode=config.teacher_mode)
    (output / "comparison.md").write_text(table)
    (output / "comparison.json").write_text(json.dumps(runs, indent=2))
    picture(runs, config.seed).save(output / "comparison.png")
    print(f"\n{table}\nPicture: {output / 'comparison.png'}\nTable:   {output / 'comparison.md'}")


def teachers_of(config: DictConfig) -> dict[str, str]:
    """Return the mode of every mode's teacher; refuse one that is not trained before its student."""
    before, teachers = [config.teacher_mode], {}
    for mode in config.modes:
        teacher = config.teachers.get(mode.split()[0], config.teacher_mode)
        teachers[mode] = teacher
        expected = f"the teacher of {mode} among the modes before it: {', '.join(before)}"
        remedy = f"say modes=[{teacher},{mode}], or leave {mode} out"
        require(teacher in before, expected, f"{teacher}, by teachers.{mode}", remedy)
        before.append(mode)
    return teachers


def options_of(mode: str) -> tuple[list[str], str]:
    """Return the options of an element of `modes` and its folder's name: "ect model=dit_digits" is ect_dit_digits."""
    name, *more = mode.split()
    words = [name, *(option.rpartition("=")[2] for option in more)]
    return [f"mode={name}", *more], re.sub(r"\W", "_", "_".join(words))


def _train_for(config: DictConfig, mode: str, output: Path, *extra: str) -> dict[str, Any]:
    """Train `mode` for config.seconds, at the speed that a short trial measures; return folder, results and times."""
    own, name = options_of(mode)
    base = [f"data={config.data}", f"seed={config.seed}", "logger=csv", *own]
    base += [*extra, *config.overrides]
    trial, folder = output / "speed" / name, output / name
    length = [f"trainer.max_steps={config.calibration_steps}", "trainer.log_every_n_steps=10"]
    none = [f"callbacks.{name}=null" for name in ("evaluation", "samples", "checkpoint.monitor")]
    print(f"{mode}: measuring its speed in {config.calibration_steps} steps ...", flush=True)
    _train([*base, *length, *none, f"output={trial}"], quiet=True)
    # The median, so that another program's load for a moment does not shorten the run.
    metrics = plots.read_metrics(trial / "metrics.csv")
    speed = statistics.median(metrics["speed/images_per_second"][1])
    batch = OmegaConf.load(trial / "config.yaml").data.batch_size
    steps = max(1, round(config.seconds * speed / batch))
    print(f"{mode}: {steps} steps for {config.seconds:.0f} s", flush=True)
    _train([*base, f"trainer.max_steps={steps}", f"output={folder}"], quiet=False)
    seconds = 3600 * plots.read_metrics(folder / "metrics.csv")["speed/hours"][1][-1]
    return {
        "mode": mode,
        "folder": str(folder),
        "results": json.loads((folder / "evaluation.json").read_text())["results"],
        "steps": steps,
        "seconds": seconds,
        "images_per_second": steps * batch / seconds,
    }


def _train(arguments: list[str], *, quiet: bool) -> None:
    program = [sys.executable, str(ROOT / "src" / "train.py"), *arguments]
    done = subprocess.run(program, capture_output=quiet, text=True, check=False)
    got = f"train.py {' '.join(arguments)}\n{done.stdout or ''}{done.stderr or ''}".strip()
    succeeded, expected = done.returncode == 0, "every run of the comparison to succeed"
    require(succeeded, expected, got, "mend the reason above")


def markdown(runs: list[dict[str, Any]], *, teacher_mode: str) -> str:
    """Return the table: training images, every mode and sampler, noise."""
    ends = {name: runs[0]["results"][name] for name in ("train_images", "noise")}
    rows = [("train images", ends["train_images"], "– | –")]
    for run in runs:
        role = " (teacher)" if run["mode"] == teacher_mode else ""
        time = f"{run['seconds']:.0f} | {run['images_per_second']:.0f}"
        for sampler, quality in run["results"].items():
            if sampler not in ends:
                name = sampler.split("/")[0].replace("_", " ")
                rows.append((f"`{run['mode']}`{role}, {name}", quality, time))
    lines = [
        "| | Fréchet | x train | precision | recall | training s | images/s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, quality, time in [*rows, ("noise", ends["noise"], "– | –")]:
        frechet = f"{quality[FRECHET]:.2f} | {quality[FRECHET] / rows[0][1][FRECHET]:.2f}"
        others = f"{quality[PRECISION]:.3f} | {quality[RECALL]:.3f}"
        lines.append(f"| {name} | {frechet} | {others} | {time} |")
    return "\n".join([*lines, ""])


def picture(runs: list[dict[str, Any]], seed: int) -> Image.Image:
    """Draw samples of every run and sampler from the same noise and classes, one strip each."""
    strips = []
    for run in runs:
        model, config = load(run["folder"]), OmegaConf.load(f"{run['folder']}/config.yaml")
        labels = list(range(model.card.num_classes or 0)) or None
        for name, node in config.mode.samplers.items():
            sampler = instantiate(node, _convert_="all")
            images = model.sample(STRIP, sampler=sampler, labels=labels, seed=seed)
            caption = f"{run['mode']}, {name.replace('_', ' ')}"
            strips.append((caption, plots.grid(images, COLUMNS)))
    return plots.below_each_other(strips)
