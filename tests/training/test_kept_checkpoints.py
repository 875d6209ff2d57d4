"""Checkpoints that stay: callbacks.checkpoint.keep_every."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from conftest import TINY, Run
from consistency.checkpoints import ours
from consistency.checkpoints.load import load
from consistency.runtime.files import verify_checksum
from consistency.training.callbacks import checkpoints

EVERY_TWO = ["callbacks.checkpoint.keep_every=2", "callbacks.samples=null"]


def test_every_n_steps_one_stays_and_resuming_is_unaffected(verb: Run, tmp_path: Path) -> None:
    """The kept files are those of an unbroken run, and the newest checkpoint stays last.ckpt."""
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    given = [*TINY, *EVERY_TWO, f"output={run}"]
    assert verb("train", *given, "trainer.max_steps=5", "mode.total_steps=6").status == 0
    assert list(ours.kept(folder)) == [2, 4]
    again = verb("train", f"resume={run}", "trainer.max_steps=6")
    assert again.status == 0, again.err
    assert "at step 5" in again.out
    assert list(ours.kept(folder)) == [2, 4, 6]
    for step, file in ours.kept(folder).items():
        assert file.name == f"step_{step:07d}.ckpt"
        assert file.with_name(f"{file.name}.sha256").is_file()
        verify_checksum(file)
        content = torch.load(file, weights_only=True)
        assert (content["k"], content["global_step"]) == (step, step)
    last = load(run).denoiser.network.state_dict()
    kept = load(folder / "step_0000006.ckpt").denoiser.network.state_dict()
    assert all(torch.equal(last[name], kept[name]) for name in last)
    assert "Kept:       3 checkpoints" in again.out
    assert "=" not in "".join(file.name for file in folder.iterdir())


def test_no_interval_is_refused(verb: Run, tmp_path: Path) -> None:
    given = [*TINY, "callbacks.checkpoint.keep_every=0", "trainer.max_steps=1"]
    outcome = verb("train", *given, f"output={tmp_path / 'run'}")
    assert outcome.status == 2
    assert "callbacks.checkpoint.keep_every" in outcome.err
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize("name", ["step_0000002.ckpt.sha256", "step_2.ckpt", "step_two.ckpt"])
def test_other_files_are_no_kept_checkpoints(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    ours.kept_path(tmp_path, 12_345_678).touch()
    assert list(ours.kept(tmp_path)) == [12_345_678]


@pytest.mark.parametrize(
    ("monitor", "best"),
    [("quality/precision/one_step/ema", 0.7), ("quality/fid/one_step/ema", 0.1), ("loss", 0.1)],
)
def test_the_best_value_is_the_largest_of_a_metric_that_should_grow(
    monitor: str, best: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[float] = []
    monkeypatch.setattr(checkpoints, "_written", lambda trainer, path: written.append(value))
    callback = checkpoints.RunCheckpoints(
        folder=str(tmp_path), every_n_train_steps=1, monitor=monitor
    )
    for value in (0.4, 0.1, float("nan"), 0.7, 0.3):
        metrics = {monitor: torch.tensor(value)}
        callback._save_best(cast(Any, SimpleNamespace(callback_metrics=metrics)))
    assert written[-1] == best == pytest.approx(callback.best_value)
