"""Power-function averages of a run, its snapshots, and averages of other widths from them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import TINY, Run
from consistency import compose, train
from consistency.averaging import power_decay
from consistency.checkpoints.load import load, load_sets
from consistency.errors import UserError
from consistency.training.callbacks.ema import EvaluationEMA

WIDTHS = [
    "mode.average=power",
    "callbacks.snapshots.every_n_train_steps=4",
    "callbacks.samples=null",
    "optimizer.lr=0.01",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:

    folder = tmp_path_factory.mktemp("posthoc") / "run"
    train(compose([*TINY, *WIDTHS, "trainer.max_steps=20", f"output={folder}"]))
    return folder


def weights(path: Path, name: str) -> Tensor:
    network = load(path, weights=name).denoiser.network
    return torch.cat([p.flatten() for p in network.parameters()]).double()


def test_a_run_leaves_a_snapshot_of_two_widths_at_every_interval(run: Path) -> None:
    files = sorted((run / "snapshots").iterdir())
    assert [file.name for file in files] == [f"{k:08d}.safetensors" for k in (4, 8, 12, 16, 20)]
    assert files[0].stat().st_mode == (run / "config.yaml").stat().st_mode
    kinds = {name.partition("/")[0] for name in load_file(files[0])}
    assert kinds == {"power:0.05", "power:0.1"}


def test_a_stored_width_is_the_average_in_the_checkpoint(run: Path) -> None:
    for width in ("0.05", "0.1"):
        rebuilt, stored = weights(run, f"posthoc:{width}"), weights(run, f"power:{width}")
        assert torch.allclose(rebuilt, stored, rtol=0, atol=1e-7)


def test_another_width_is_the_average_that_the_run_would_have_stored(
    run: Path, tmp_path: Path
) -> None:
    """The same run with that width stored: the bits of training do not depend on the averages."""

    other = [*WIDTHS, "parts.average.power.widths=[0.07]", "callbacks.snapshots=null"]
    train(compose([*TINY, *other, "trainer.max_steps=20", f"output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run" / "snapshots").exists()
    expected = weights(tmp_path / "run", "ema")
    nearest = (weights(run, "power:0.05") - expected).norm()
    assert (weights(run, "posthoc:0.07") - expected).norm() < 0.1 * nearest
    assert power_decay(1, 0.07) == 0.0


def test_several_widths_are_opened_at_once(run: Path) -> None:
    names = ["posthoc:0.06", "posthoc:0.08", "online"]
    assert [model.weights for model in load_sets(run, names)] == names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("posthoc:wide", "relative width"),
        ("posthoc:0.5", "at most 0.289"),
        ("posthoc:", "relative width"),
    ],
)
def test_what_is_no_width_is_refused(run: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(run, weights=name)


def test_a_checkpoint_without_power_averages_says_how_to_get_them(tmp_path: Path) -> None:
    decays = ["mode.average=constant", "parts.average.constant.decays=[0.5]"]
    train(compose([*TINY, *decays, "trainer.max_steps=2", f"output={tmp_path / 'run'}"]))
    with pytest.raises(UserError, match=r"mode.average=power"):
        load(tmp_path / "run", weights="posthoc:0.1")


def test_without_snapshots_another_width_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for file in (run / "checkpoints").glob("last.ckpt*"):
        (tmp_path / "checkpoints" / file.name).write_bytes(file.read_bytes())
    assert len(weights(tmp_path, "posthoc:0.1"))
    with pytest.raises(UserError, match="snapshots"):
        load(tmp_path, weights="posthoc:0.07")


def test_a_damaged_snapshot_is_named(run: Path, tmp_path: Path) -> None:
    for folder in ("checkpoints", "snapshots"):
        (tmp_path / folder).mkdir()
        for file in (run / folder).iterdir():
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "snapshots" / "00000008.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=file.name):
        load(tmp_path, weights="posthoc:0.07")


def test_a_run_that_is_resumed_has_the_same_averages_and_snapshots(
    run: Path, tmp_path: Path
) -> None:

    part = [*TINY, *WIDTHS, f"output={tmp_path / 'run'}", "mode.total_steps=20"]
    train(compose([*part, "trainer.max_steps=10"]))
    train(compose([f"resume={tmp_path / 'run'}", "trainer.max_steps=20"]))
    for file in sorted((run / "snapshots").iterdir()):
        assert file.read_bytes() == (tmp_path / "run" / "snapshots" / file.name).read_bytes()
    assert torch.equal(weights(run, "ema"), weights(tmp_path / "run", "ema"))


def test_an_average_wider_than_the_run_can_bear_is_one_line(verb: Run) -> None:
    steps = ["trainer.max_steps=4", "callbacks.samples=null"]
    outcome = verb("train", *TINY, *steps, "parts.average.power.decays=[0.9,0.0]")
    lines = [line for line in outcome.out.splitlines() if "more than a quarter" in line]
    assert len(lines) == 1
    assert "0.9 (10 steps)" in lines[0]
    assert "0.0 (" not in lines[0]


def test_evaluation_finds_the_best_width_and_draws_the_curve(
    verb: Run, run: Path, tmp_path: Path
) -> None:
    given = ["data=digits", "num_samples=40", "samplers=[onestep]", "logger=none", "device=cpu"]
    metrics = ["evaluation.extractor=classifier", f"output={tmp_path / 'measured'}"]
    widths = "weights=posthoc:[0.05,0.07,0.1]"
    outcome = verb("evaluate", f"checkpoint={run}", widths, *given, *metrics)
    assert outcome.status == 0, outcome.err
    results = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["results"]
    values = {result["weights"]: result["frechet_classifier"] for result in results}
    assert list(values) == ["posthoc:0.05", "posthoc:0.07", "posthoc:0.1"]
    best = min(values, key=lambda name: values[name])
    assert f"Best of onestep: weights={best}," in outcome.out
    assert (tmp_path / "measured" / "widths.png").is_file()


def test_a_half_life_is_one_of_images_and_at_most_a_share_of_the_run() -> None:
    ema = EvaluationEMA(half_lives=[4000], ramp_up=0.05)
    ema.batch = 8
    decays = [ema.decays_at(k)["half_life:4000"] for k in (0, 1_000, 10_000, 20_000)]
    assert decays == pytest.approx([0.0, 0.5 ** (1 / 50), 0.5 ** (1 / 500), 0.5 ** (1 / 500)])


@pytest.mark.slow
def test_an_average_by_half_life_samples(verb: Run, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'run'}"
    outcome = verb("train", *TINY, "trainer.max_steps=3", "mode.average=half_life", output)
    assert outcome.status == 0, outcome.err
    named, first = (load(tmp_path / "run", weights=w) for w in ("ema:half_life:500000", "ema"))
    for mine, other in zip(named.denoiser.parameters(), first.denoiser.parameters(), strict=True):
        assert torch.equal(mine, other)
