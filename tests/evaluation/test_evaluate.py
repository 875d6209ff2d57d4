"""`src/evaluate.py`: exact counts, the same numbers on any number of processes, and torch-fidelity's own numbers."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_images

from conftest import REPORT, Run
from consistency.checkpoints import ours
from consistency.checkpoints.load import load
from consistency.commands import evaluate
from consistency.evaluation.metrics import Clock, Measure
from consistency.inference.generate import Numbered
from inception import write_random_inception

CLASSIFIER = ["evaluation.extractor=classifier", "logger=csv", "device=cpu"]
MEASURES = ("fid", "inception_score", "inception_score_std", "kid", "kid_std", "precision", "recall")  # fmt: skip


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "evaluation.json").read_text())


def test_every_sampler_and_every_set_of_weights_is_measured(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    outcome = verb(
        "evaluate",
        f"checkpoint={trained['ct']}",
        "num_samples=30",
        "batch_size=16",
        f"evaluation.cache={tmp_path / 'cache'}",
        f"output={output}",
        *CLASSIFIER,
    )
    assert outcome.status == 0, outcome.err
    report = results(output)
    pairs = {(r["sampler"], r["weights"]): r["nfe"] for r in report["results"]}
    content = torch.load(trained["ct"] / "checkpoints" / "last.ckpt", weights_only=True)
    averages = content["callbacks"]["EvaluationEMA"]["averages"]  # power:<width>
    assert pairs == {
        (sampler, weights): nfe
        for sampler, nfe in (("onestep", 1), ("twostep", 2))
        for weights in ("online", "target", *averages)
    }
    measures = {f"{m}_classifier" for m in ("frechet", "kernel", "class_score", "precision", "recall")}  # fmt: skip
    for result in report["results"]:
        assert measures <= set(result)
    protocol = report["protocol"]
    assert protocol["samples"] == 30
    assert protocol["reference"]["images"] == 898
    assert re.fullmatch("[0-9a-f]{64}", protocol["weights_sha256"])
    assert {"extractor", "resize", "quantisation"} <= set(protocol)
    table = (output / "evaluation.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + len(pairs)
    assert table in outcome.out
    row = (output / "metrics.csv").read_text().splitlines()[0]
    assert f"quality/frechet_classifier/twostep/{next(iter(averages))}" in row


class Brightness(Measure):
    """The mean of samples in the place of a measure, which takes seconds to set up."""

    def __init__(self) -> None:
        self.clock = Clock()

    def protocol(self, count: int, card: object) -> dict[str, int]:
        return {"samples": count}

    def __call__(self, samples: Iterable[Numbered], count: int) -> dict[str, float]:
        return {
            "frechet_classifier": torch.cat([images for _, images in samples]).float().mean().item()
        }


def test_loggers_get_the_options_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    logger = SimpleNamespace(log_hyperparams=logged.append)
    monkeypatch.setattr(evaluate, "build_loggers", lambda config: [logger])
    data = {"path": "s3://me:hidden@bucket/set"}
    options = {"seed": 0, "precision": "32-true", "num_samples": 1, "data": data}
    evaluate.Report(OmegaConf.create(options), Brightness(), tmp_path / "out")
    assert logged[0]["options"]["data"] == {"path": "s3://***@bucket/set"}


def test_all_snapshots_of_a_run_are_measured(
    verb: Run, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One result a kept checkpoint in the order of the steps, with its step, its hash, a table and a curve."""
    run, output = tmp_path / "run", tmp_path / "out"
    monkeypatch.setattr(evaluate, "measure_of", lambda *_: Brightness())
    for step in (20_000, 10_000):
        file = ours.kept_path(run / "checkpoints", step)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trained["ect"] / "checkpoints" / "last.ckpt", file)
    outcome = verb(
        "evaluate",
        f"checkpoint={run}",
        *("snapshots=all", "weights=ema", "samplers=[onestep]", "num_samples=16"),
        f"output={output}",
        *CLASSIFIER,
    )
    assert outcome.status == 0, outcome.err
    report = results(output)
    assert [result["step"] for result in report["results"]] == [10_000, 20_000]
    same = [result["frechet_classifier"] for result in report["results"]]
    assert same[0] == same[1]  # the same weights
    names = [Path(path).name for path in report["snapshots"]]
    assert names == ["step_0010000.ckpt", "step_0020000.ckpt"]
    assert "checkpoint" not in report
    assert "| 20000 | onestep | ema | 1 |" in (output / "evaluation.md").read_text()
    assert (output / "snapshots.png").stat().st_size > 0
    assert "Best of onestep, ema: step_0010000.ckpt" in outcome.out
    with (output / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["10000", "20000"]


def test_the_numbers_are_those_of_exactly_these_samples(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    """What sample.py draws and evaluate.py measures by itself are the same images."""
    cache = f"evaluation.cache={tmp_path / 'cache'}"
    drawn = ["num_samples=37", "batch_size=8", f"checkpoint={trained['ect']}", "seed=5"]
    own = ["weights=ema", "samplers=[twostep]", f"output={tmp_path / 'own'}"]
    assert verb("evaluate", *drawn, *own, cache, *CLASSIFIER).status == 0
    assert (
        verb(
            "sample", *drawn, "sampler=multistep", "images=true", f"output={tmp_path / 's'}"
        ).status
        == 0
    )
    for given in ("samples.npz", "images"):
        output = tmp_path / given.replace(".", "_")
        outcome = verb(
            "evaluate",
            f"samples={tmp_path / 's' / given}",
            "num_samples=37",
            "batch_size=8",
            f"output={output}",
            cache,
            *CLASSIFIER,
        )
        assert outcome.status == 0, outcome.err
        expected, found = results(tmp_path / "own")["results"][0], results(output)["results"][0]
        for name, value in expected.items():
            if name.endswith("classifier"):
                assert found[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.slow
def test_two_processes_measure_what_one_does(
    verb: Run,
    process: Run,
    trained: dict[str, Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The same images to 1e-6, drawn ones to 1e-4; 101 samples are an uneven share for two."""
    draw = np.random.RandomState(0)
    np.savez(tmp_path / "images.npz", arr_0=draw.randint(256, size=(101, 8, 8, 1), dtype=np.uint8))
    for what, given, tolerance in (
        ("same images", [f"samples={tmp_path / 'images.npz'}"], 1e-6),
        ("drawn images", [f"checkpoint={trained['ect']}", "weights=ema"], 1e-4),
    ):
        found = []
        for devices, run in ((1, verb), (2, process)):
            output = tmp_path / f"{what.split()[0]}_{devices}"
            outcome = run(
                "evaluate",
                *given,
                "num_samples=101",
                "batch_size=16",
                f"devices={devices}",
                f"evaluation.cache={tmp_path / f'cache_{devices}'}",
                f"output={output}",
                *CLASSIFIER,
            )
            assert outcome.status == 0, outcome.err
            found.append(results(output))
        one, two = found
        assert one["protocol"] == two["protocol"]
        assert len(one["results"]) == len(two["results"])
        worst = 0.0
        for mine, other in zip(one["results"], two["results"], strict=True):
            for name, value in mine.items():
                if name.endswith("classifier"):
                    assert other[name] == pytest.approx(value, rel=tolerance), name
            a, b = (r["frechet_classifier"] for r in (mine, other))
            worst = max(worst, abs(a / b - 1))
        record_property(REPORT, f"1 and 2 processes, {what}: FID differs by {worst:.1e} at most")


def photographs(folder: Path, which: int, count: int, size: int = 32) -> Path:
    """Squares cut from one of scikit-learn's two photographs, as PNG."""
    folder.mkdir()
    whole, draw = load_sample_images().images[which], np.random.RandomState(which)
    for number in range(count):
        top, left = (draw.randint(side - size) for side in whole.shape[:2])
        cut = whole[top : top + size, left : left + size]
        Image.fromarray(cut).save(folder / f"{number:03d}.png")
    return folder


@pytest.mark.slow
def test_the_numbers_are_torch_fidelitys(
    verb: Run, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Two folders of photographs and one file of Inception's weights, given to torch-fidelity's command and to ours."""
    samples, reference = (photographs(tmp_path / n, i, 24) for i, n in enumerate(("a", "b")))
    weights = write_random_inception(tmp_path / "inception.pth")
    output = tmp_path / "out"
    outcome = verb(
        "evaluate",
        f"samples={samples}",
        "data=folder",
        f"data.path={reference}",
        "data.num_workers=0",
        "num_samples=24",
        f"evaluation.extractor={weights}",
        f"evaluation.cache={tmp_path / 'cache'}",
        "logger=csv",
        "device=cpu",
        f"output={output}",
    )
    assert outcome.status == 0, outcome.err
    found = results(output)["results"][0]
    done = subprocess.run(
        [sys.executable, "-c", "from torch_fidelity.fidelity import main; main()",
         "--cpu", "--feature-extractor", "inception-v3-compat", "--isc", "--fid", "--kid", "--prc", "--json", "--silent", "--kid-subset-size", "24",
         "--input1", str(samples), "--input2", str(reference), "--no-cache",
         "--feature-extractor-weights-path", str(weights), "--save-cpu-ram"],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    theirs = json.loads(done.stdout)
    names = {
        "fid": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    assert set(names) == set(MEASURES)
    for mine, other in names.items():
        assert found[mine] == pytest.approx(theirs[other], rel=1e-4, abs=1e-9), mine
    worst = max(abs(found[m] - theirs[o]) / abs(theirs[o] or 1) for m, o in names.items())
    assert theirs["frechet_inception_distance"] > 0.1
    record_property(
        REPORT,
        f"torch-fidelity's command and ours: {worst:.1e} at most, relative, of {len(names)} numbers",
    )


@pytest.mark.slow
def test_without_inceptions_weights_the_command_goes_on(
    verb: Run, trained: dict[str, Path], tmp_path: Path, offline: None
) -> None:
    outcome = verb(
        "evaluate",
        f"checkpoint={trained['ect']}",
        "weights=online",
        "samplers=[onestep]",
        "num_samples=16",
        f"evaluation.cache={tmp_path / 'cache'}",
        "logger=csv",
        f"output={tmp_path / 'out'}",
    )
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("No FID") == 1
    assert "frechet_classifier" in results(tmp_path / "out")["results"][0]


def test_statistics_are_exported_and_used_again(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    given = ["num_samples=16", "weights=online", "samplers=[onestep]", f"checkpoint={trained['ect']}", *CLASSIFIER]  # fmt: skip
    file = tmp_path / "digits.npz"
    first = verb("evaluate", *given, f"export={file}", f"evaluation.cache={tmp_path / 'cache'}", f"output={tmp_path / 'a'}")  # fmt: skip
    assert first.status == 0, first.err
    second = verb("evaluate", *given, f"evaluation.reference={file}", f"output={tmp_path / 'b'}")
    assert second.status == 0, second.err
    a, b = (results(tmp_path / n) for n in "ab")
    assert a["protocol"] == b["protocol"]
    assert a["results"][0]["frechet_classifier"] == b["results"][0]["frechet_classifier"]


MISTAKES = {
    "nothing to measure": ([], "checkpoint="),
    "both": (["checkpoint=/nowhere", "samples=/nowhere"], "both"),
    "missing checkpoint": (["checkpoint=/nowhere"], "/nowhere"),
    "weights of samples": (["samples=/nowhere", "weights=ema"], "checkpoint= with weights"),
    "missing samples": (["samples=/nowhere"], "/nowhere"),
    "too few samples": (["samples={images}", "num_samples=31"], "num_samples=30"),
    "samples of another shape": (["samples={folder}", "num_samples=12"], "shape"),
    "no samples": (["samples={images}", "num_samples=0"], "num_samples"),
    "fewer than can be measured": (["samples={images}", "num_samples=5"], "at least 10"),
    "data of another shape": (["checkpoint={run}", "num_samples=16", "data=folder", "data.path={folder}", "data.num_workers=0"], "shape"),
    "unknown weights": (["checkpoint={run}", "num_samples=16", "weights=ema:0.5"], "weights among"),
    "unknown sampler": (["checkpoint={run}", "samplers=[threestep]"], "samplers/threestep"),
    "sampler of a teacher": (["checkpoint={run}", "num_samples=16", "samplers=[heun]"], "force=true"),
    "unknown extractor": (["samples={images}", "num_samples=16", "evaluation.extractor=vgg"], "vgg"),
    "missing reference": (["samples={images}", "num_samples=16", "evaluation.reference=/nowhere"], "/nowhere"),
    "misspelt option": (["samples={images}", "evaluation.extracter=x"], "extracter"),
    "no snapshots": (["checkpoint={run}", "snapshots=all"], "callbacks.checkpoint.keep_every"),
    "one snapshot": (["checkpoint={run}", "snapshots=2"], "snapshots=all"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(
    name: str, verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    pixels = np.zeros((30, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    arguments, hint = MISTAKES[name]
    photographs(tmp_path / "folder", 0, 12)
    places = {
        "images": tmp_path / "images.npz",
        "run": trained["ect"],
        "folder": tmp_path / "folder",
    }
    given = [argument.format(**places) for argument in arguments]
    output = tmp_path / "out"
    outcome = verb("evaluate", *CLASSIFIER, f"evaluation.cache={tmp_path / 'cache'}", f"output={output}", *given)  # fmt: skip
    assert outcome.status == 2, outcome.out
    assert hint in outcome.err, outcome.err
    assert "Traceback" not in outcome.err
    assert not (output / "evaluation.json").exists()


@pytest.mark.slow
def test_samples_of_a_teacher_are_measured_with_its_own_sampler(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    outcome = verb(
        "evaluate",
        f"checkpoint={trained['edm']}",
        "samplers=[heun]",
        "samplers.heun.steps=3",
        "weights=ema",
        "num_samples=12",
        f"evaluation.cache={tmp_path / 'cache'}",
        f"output={tmp_path / 'out'}",
        *CLASSIFIER,
    )
    assert outcome.status == 0, outcome.err
    assert results(tmp_path / "out")["results"][0]["nfe"] == 5
    assert load(trained["edm"]).card.role == "teacher"
    assert torch.isfinite(
        torch.tensor(results(tmp_path / "out")["results"][0]["frechet_classifier"])
    )
