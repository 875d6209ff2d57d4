"""`python src/plot.py <runs...>`: curves of runs, and published figures beside theirs."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, Run
from consistency.commands import plot
from consistency.commands.overrides import named
from consistency.inference.figures import MOST_POINTS, thinned
from consistency.inference.plots import line_style

PROTOCOL = {"extractor": "inception"}


def write_run(folder: Path, metric: str = "fid", published: str = "ict_cifar10") -> Path:
    """A run of 100 steps of 8 images, measured twice, with one hour of training."""
    folder.mkdir()
    config = {"data": {"batch_size": 8}, "mode": {"published": published}}
    (folder / "config.yaml").write_text(json.dumps(config))
    quartiles = {f"train/loss_noise_quartile_{q}": f"{q}.5" for q in (1, 2, 3, 4)}
    rows: list[dict[str, Any]] = [{"step": 49, f"{metric}/one_step/ema": 8.0, **quartiles}]
    rows += [{"step": 99, f"{metric}/one_step/ema": 4.0, **quartiles}]
    rows[0] |= {"N": 11, "mu": 0.9, "training_seconds": 1800}
    rows[1] |= {"N": 21, "mu": 0.95, "training_seconds": 3600}
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    results = {"train_images": {metric: 1.0}, "one_step/ema": {metric: 4.0}}
    results["two_steps/ema"] = {metric: 3.0}
    content = {"protocol": PROTOCOL, "k": 100, "nfe": {"one_step": 1.0, "two_steps": 2.0}}
    (folder / "evaluation.json").write_text(json.dumps(content | {"results": results}))
    return folder


def write_snapshots(folder: Path, run: Path, metric: str = "fid") -> Path:
    """What evaluate.py leaves of snapshots=all."""
    folder.mkdir()
    rows = [
        {"step": k, "sampler": "onestep", "weights": "ema", "nfe": 1.0, metric: 400.0 / k, "seconds": {}}
        for k in (50, 100)
    ]  # fmt: skip
    paths = {str(run / "checkpoints" / f"step_{k:07d}.ckpt"): "0" for k in (50, 100)}
    content = {"protocol": PROTOCOL, "snapshots": paths, "results": rows}
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_runs_are_drawn_beside_each_other_and_published_figures_beside_theirs(
    verb: Run, tmp_path: Path
) -> None:
    a, b = write_run(tmp_path / "a=1"), write_run(tmp_path / "b b", published="ict_deep_cifar10")
    measured = write_snapshots(tmp_path / "measured", a)
    output = tmp_path / "out"
    outcome = verb("plot", str(a), str(b), str(measured), f"output={output}")
    assert outcome.status == 0, outcome.err
    names = {"loss", "schedules", "quality", "evaluations"}
    assert {f.name for f in output.iterdir()} == {f"{n}.{s}" for n in names for s in ("png", "svg")}
    said = {name: (output / f"{name}.svg").read_text() for name in names}
    for label in ("a=1", "b b"):
        assert f">{label}<" in said["loss"]
        assert f">{label}, one_step, ema<" in said["quality"]
        assert f">{label}, ema<" in said["evaluations"]
    assert ">a=1, onestep, ema<" in said["quality"]  # of the snapshots
    for axis in ("optimizer step k", "training images", "hours"):
        assert f">{axis}<" in said["quality"]
    assert ">published: ict_cifar10<" in said["evaluations"]
    assert ">published: ict_deep_cifar10<" in said["evaluations"]


def test_a_distance_that_is_no_fid_has_no_published_figures_beside_it(tmp_path: Path) -> None:
    runs = plot.read_runs([write_run(tmp_path / "run", "frechet_classifier")])
    (panel,) = plot.cost_panels(runs)
    assert panel.lines == {"run, ema": [(1.0, 4.0), (2.0, 3.0)]}
    assert not panel.published


def test_a_run_that_ended_before_its_first_row_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the diverged jobs of a sweep."""
    (tmp_path / "nothing").mkdir()
    runs = plot.read_runs([tmp_path / "nothing", write_run(tmp_path / "run")])
    assert [run.name for run in runs] == ["run"]
    assert f"left out    {tmp_path / 'nothing'}" in capsys.readouterr().out


def test_quality_is_over_steps_images_and_hours(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    runs = plot.read_runs([run, write_snapshots(tmp_path / "measured", run)])
    steps, images, hours = (panel.lines for panel in plot.quality_panels(runs))
    assert steps["run, one_step, ema"] == [(50, 8.0), (100, 4.0)]
    assert steps["run, onestep, ema"] == [(50, 8.0), (100, 4.0)]
    assert images["run, one_step, ema"] == [(400, 8.0), (800, 4.0)]
    assert hours["run, one_step, ema"] == [(0.5, 8.0), (1.0, 4.0)]


def test_the_heads_of_recipes_and_experiments_have_the_published_figures() -> None:
    """The figures of one and two steps are those of the table, wherever both have one."""
    compared = 0
    with (ROOT / "tests" / "commands" / "published_runs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            points = dict(plot.published(row["run_id"]))
            for steps, text in ((1, row["fid1"]), (2, row["fid2"])):
                if (steps in points) and (number := re.match(r"\d+\.\d+", text)):
                    assert points[steps] == float(number[0]), row["run_id"]
                    compared += 1
            if nfe := re.match(r"(\d+\.\d+) \(NFE (\d+)", row["fid1"]):
                assert points == {float(nfe[2]): float(nfe[1])}, row["run_id"]
                compared += 1
    assert compared >= 60
    assert plot.published("nothing of this name") == []


def test_lines_differ_without_colours() -> None:
    styles = [line_style(number) for number in range(36)]
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == 36


def test_many_points_become_the_means_of_neighbours() -> None:
    points = [(float(k), float(k % 2)) for k in range(10 * MOST_POINTS)][::-1]
    few = thinned(points)
    assert len(few) == MOST_POINTS
    assert [y for _, y in few] == [0.5] * MOST_POINTS
    assert thinned(few) == few


def test_paths_without_a_name_are_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert named("plot", ["a b", "output=x", "lr=1"]) == ["output=x", "runs=['a b','lr=1']"]
    assert named("plot", ["--cfg", "job", "-m"]) == ["--cfg", "job", "-m"]
    assert named("sample", ["a b"]) == ["a b"]


MISTAKES = {
    "no runs": ([], "run folders to draw"),
    "a folder that is neither": (["."], "folders without either"),
    "nothing there": (["nowhere"], "no folder at"),
    "a file": ([__file__], "no folder at"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(name: str, verb: Run, tmp_path: Path) -> None:
    given, hint = MISTAKES[name]
    outcome = verb("plot", *given, f"output={tmp_path / 'out'}")
    assert outcome.status == 2
    assert hint in outcome.err
    assert not (tmp_path / "out").exists()
