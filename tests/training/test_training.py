"""Training: the files of a run, its repeatability, averages, checkpoints and measures."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import NO_CURVES, TINY, Run
from consistency.checkpoints.load import load
from consistency.inference import plots


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(run: Path, name: str = "online") -> torch.Tensor:
    network = load(run, weights=name).denoiser.network
    return torch.cat([p.flatten() for p in network.parameters()])


def test_a_run_leaves_what_it_promises(trained: dict[str, Path]) -> None:
    run = trained["ct"]
    for file in ("config.yaml", "metrics.csv", "curves.png", "samples/latest.png"):
        assert (run / file).stat().st_size > 0, file
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["k"] == 2
    assert content["config"]["mode"]["role"] == "consistency"
    assert not any(name.startswith("objective") for name in content["state_dict"])
    assert (run / "checkpoints" / "last.ckpt.sha256").is_file()
    logged = rows(run)
    assert {
        "schedule/N",
        "schedule/mu",
        "train/loss",
        "schedule/learning_rate",
        "train/gradient_norm",
    } <= set(logged[0])
    assert {f"train/loss_noise_quartile_{q}" for q in (1, 2, 3, 4)} <= set(logged[0])
    assert {"speed/images_per_second", "speed/hours", "speed/images_seen"} <= set(logged[0])
    assert [float(row["schedule/N"]) for row in logged] == [2.0, float(content_scales(content))]


def content_scales(content: dict) -> int:
    from consistency.schedules import square_root

    node = content["config"]["mode"]["callbacks"]["scale_schedule"]["num_scales"]
    return square_root(1, s_0=node["s_0"], s_1=node["s_1"], total_steps=2)


def test_no_file_name_needs_quoting(trained: dict[str, Path]) -> None:
    for run in trained.values():
        for path in run.rglob("*"):
            assert not set("=, []") & set(path.name), path


def test_the_same_command_gives_the_same_bits(verb: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        arguments = [
            "model.network.dropout=0.3",
            "trainer.max_steps=3",
            f"output={tmp_path / name}",
        ]
        assert verb("train", *TINY, *arguments).status == 0
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert torch.equal(weights(tmp_path / "a", "ema"), weights(tmp_path / "b", "ema"))


@pytest.mark.slow
def test_another_seed_gives_another_network(verb: Run, tmp_path: Path) -> None:
    for seed in (0, 1):
        arguments = [f"seed={seed}", "trainer.max_steps=1", f"output={tmp_path / str(seed)}"]
        assert verb("train", *TINY, *arguments).status == 0
    assert not torch.equal(weights(tmp_path / "0"), weights(tmp_path / "1"))


@pytest.mark.slow
def test_accumulation_takes_the_same_number_of_optimizer_steps(verb: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["data.device_batch_size=2", "trainer.max_steps=3", f"output={run}"]
    assert verb("train", *TINY, *arguments).status == 0
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["k"] == 3
    assert content["global_step"] == 3


def test_averages_and_target_follow_their_formula(verb: Run, tmp_path: Path) -> None:
    """After one step from theta_0: average = d theta_0 + (1 - d) theta_1, for the target with d = mu(N(0))."""
    first, second = tmp_path / "first", tmp_path / "second"
    base = ["mode=ct", "seed=3", "mode.average=constant", "parts.average.constant.decays=[0.75]"]
    assert (
        verb(
            "train", *TINY, *base, "optimizer.lr=1e-12", "trainer.max_steps=1", f"output={first}"
        ).status
        == 0
    )
    assert (
        verb(
            "train", *TINY, *base, "optimizer.lr=1e-2", "trainer.max_steps=1", f"output={second}"
        ).status
        == 0
    )
    start, moved = weights(first), weights(second)
    assert not torch.allclose(start, moved, atol=1e-4)
    torch.testing.assert_close(
        weights(second, "ema"), 0.75 * start + 0.25 * moved, atol=1e-6, rtol=1e-5
    )
    mu = float(rows(second)[0]["schedule/mu"])
    torch.testing.assert_close(
        weights(second, "target"), mu * start + (1 - mu) * moved, atol=1e-6, rtol=1e-5
    )


def test_init_starts_from_the_given_weights(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [f"init={trained['edm']}", "init_weights=online", "optimizer.lr=1e-12"]
    assert verb("train", *TINY, *arguments, "trainer.max_steps=1", f"output={run}").status == 0
    torch.testing.assert_close(weights(run), weights(trained["edm"]), atol=1e-7, rtol=0)


def test_distillation_starts_from_its_teacher_and_leaves_it_alone(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    run, before = tmp_path / "run", weights(trained["edm"], "ema")
    arguments = ["mode=cd", f"teacher={trained['edm']}", "optimizer.lr=1e-12"]
    assert verb("train", *TINY, *arguments, "trainer.max_steps=1", f"output={run}").status == 0
    torch.testing.assert_close(weights(run), before, atol=1e-7, rtol=0)
    assert torch.equal(weights(trained["edm"], "ema"), before)


def test_checkpoints_rotate_and_are_whole(verb: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [
        "callbacks.checkpoint.every_n_train_steps=2",
        "trainer.max_steps=5",
        f"output={run}",
    ]
    assert verb("train", *TINY, *arguments).status == 0
    steps = {
        name: torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["k"]
        for name in ("last", "previous")
    }
    assert steps == {"last": 5, "previous": 4}
    assert load(run / "checkpoints" / "previous.ckpt").card.role == "consistency"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "last.ckpt", "last.ckpt.sha256", "previous.ckpt", "previous.ckpt.sha256",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_best_checkpoint_has_the_lowest_measured_distance(verb: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny = [
        a
        for a in TINY
        if a not in ("callbacks.evaluation=null", "callbacks.checkpoint.monitor=null")
    ]
    arguments = [
        "callbacks.evaluation.every_n_train_steps=1",
        "callbacks.evaluation.seeds=[0]",
        "callbacks.evaluation.batch_size=449",
        "trainer.max_steps=3",
        f"output={run}",
    ]
    outcome = verb("train", *tiny, *arguments)
    assert outcome.status == 0, outcome.err
    name = "quality/frechet_classifier/one_step/ema"
    found = {int(r["step"]): float(r[name]) for r in rows(run) if r.get(name)}
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    saved = best["callbacks"]["RunCheckpoints"]["best_value"]
    assert saved == pytest.approx(min(found.values()), rel=1e-6)
    assert "in the features of classifier: not FID" in outcome.out
    assert "Evaluation at step 1: 1,796 samples in " in outcome.out


@pytest.mark.slow
def test_without_inceptions_weights_a_run_goes_on_with_the_small_classifier(
    verb: Run, tmp_path: Path, offline: None
) -> None:
    run = tmp_path / "run"
    tiny = [a for a in TINY if a not in ("callbacks.evaluation=null", "callbacks.checkpoint.monitor=null")]  # fmt: skip
    given = ["evaluation@callbacks.evaluation=inception", "callbacks.evaluation.num_samples=20", "trainer.max_steps=1"]  # fmt: skip
    outcome = verb(
        "train", *tiny, *given, f"callbacks.evaluation.cache={tmp_path}", f"output={run}"
    )
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("No FID") == 1
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert any("quality/frechet_classifier/two_steps/ema" in row for row in rows(run))


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(verb: Run, tmp_path: Path) -> None:
    outcome = verb(
        "train", *TINY, "optimizer.lr=1e30", "trainer.max_steps=20", f"output={tmp_path / 'r'}"
    )
    assert outcome.status == 2
    assert "ConsistencyObjective at step k=" in outcome.err
    assert "t=" in outcome.err


def test_sample_grids_show_every_sampler_large_enough_to_see(trained: dict[str, Path]) -> None:
    with Image.open(trained["ect"] / "samples" / "latest.png") as picture:
        width, height = picture.size
    cell = 48 + 2  # four samples under ten classes: one row
    assert height >= cell
    assert width >= 2 * (4 * cell)


@pytest.mark.slow
def test_a_sweep_runs_both_modes_each_in_its_own_folder(process: Run, tmp_path: Path) -> None:
    outcome = process(
        "train", "-m", "mode=ct,ect", *TINY, "trainer.max_steps=1", f"output={tmp_path / 'sweep'}"
    )
    assert outcome.status == 0, outcome.err
    folders = sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir())
    assert folders == ["0_mode-ct", "1_mode-ect"]
    for folder in folders:
        assert load(tmp_path / "sweep" / folder).card.role == "consistency"


def test_no_picture_of_a_step_is_drawn_twice(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = list[str]()
    draw = plots.side_by_side

    def panels(parts: list[Any]) -> Image.Image:
        drawn.append(parts[0][0])
        return draw(parts)

    monkeypatch.setattr(plots, "side_by_side", panels)
    monkeypatch.setattr(plots, "draw_curves", lambda *_: drawn.append("curves"))
    often = [f"callbacks.{name}.every_n_train_steps=1" for name in ("samples", "curves")]
    tiny = [option for option in TINY if option != NO_CURVES]
    run = tmp_path / "run"
    assert verb("train", *tiny, *often, "trainer.max_steps=3", f"output={run}").status == 0
    assert drawn.count("curves") == 2  # the first row is written after the first step
    captions = [caption.rpartition(", ")[2] for caption in drawn if caption != "curves"]
    assert captions == ["step 1", "step 2", "step 3"]
    pictures = sorted((run / "samples").glob("step_*.png"))
    assert len(pictures) == 3
    assert (run / "samples" / "latest.png").read_bytes() == pictures[-1].read_bytes()
