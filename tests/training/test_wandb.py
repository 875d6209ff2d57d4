"""The offline W&B run is read back from its file."""

import json
from pathlib import Path

import pytest

from conftest import ROOT, TINY, Run
from consistency.checkpoints.ours import read
from consistency.training.loggers import PatientWandbLogger
from wandb_files import contents


@pytest.mark.slow
def test_an_evaluation_is_in_wandb(
    verb: Run, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = tmp_path / "out"
    given = ["num_samples=16", "samplers=[onestep]", "weights=[online,ema]", "evaluation.extractor=classifier"]  # fmt: skip
    cache = f"evaluation.cache={tmp_path / 'cache'}"
    outcome = verb("evaluate", f"checkpoint={trained['ect']}", *given, cache, f"output={output}")
    assert outcome.status == 0, outcome.err
    (file,) = output.glob("wandb/offline-run-*/run-*.wandb")
    rows, config = contents(file)
    logged = {name: value for row in rows for name, value in row.items()}
    for result in json.loads((output / "evaluation.json").read_text())["results"]:
        name = f"frechet_classifier/onestep/{result['weights']}"
        assert logged[name] == pytest.approx(result["frechet_classifier"], rel=1e-6)
    assert config["evaluation"]["protocol"]["samples"] == 16


def test_a_run_without_account_is_complete_and_offline(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    run = tmp_path / "run"
    tiny = [a for a in TINY if a != "logger=csv"]
    outcome = verb("train", "mode=ct", *tiny, "trainer.max_steps=2", f"output={run}")
    assert outcome.status == 0, outcome.err
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert f"wandb sync {file.parent}" in outcome.out
    rows, config = contents(file)
    logged = {name for row in rows for name in row}
    expected = {"N", "mu", "train/loss", "train/gradient_norm", "train/learning_rate"}
    expected |= {"images_per_second", *(f"train/loss_noise_quartile_{q}" for q in (1, 2, 3, 4))}
    assert expected <= logged
    assert any(name.startswith("samples") for name in logged)
    assert list(file.parent.glob("files/media/images/samples*.png"))
    assert config["data"]["batch_size"] == 8
    assert config["mode"]["role"] == "consistency"


@pytest.mark.slow
def test_a_failing_service_never_stops_training(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError("the service is gone")

    monkeypatch.setattr(wandb, "init", broken)
    tiny = [a for a in TINY if a != "logger=csv"]
    outcome = verb("train", *tiny, "trainer.max_steps=2", f"output={tmp_path / 'run'}")
    assert outcome.status == 0, outcome.err
    assert outcome.err.count("W&B failed") == outcome.err.count("W&B") == 1
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
def test_a_service_that_is_killed_never_stops_training(process: Run, tmp_path: Path) -> None:
    """It runs as a process beside; one line says that it is gone, and nothing at the end."""
    run = tmp_path / "run"
    tiny = [a for a in TINY if a != "logger=csv"]
    kill = "+callbacks.kill={_target_: probe.KillService, batch: 3}"
    outcome = process(
        "train",
        *tiny,
        kill,
        "trainer.max_steps=20",
        f"output={run}",
        PYTHONPATH=str(ROOT / "tests" / "support"),
        WANDB_MODE="offline",
    )
    assert outcome.status == 0, outcome.err
    assert outcome.err.count("W&B failed") == 1
    assert "Traceback" not in outcome.err
    assert read(run / "checkpoints" / "last.ckpt")["k"] == 20


@pytest.mark.parametrize("part", [pytest.param("log", marks=pytest.mark.slow), "finish"])
def test_a_failure_on_the_way_or_at_the_end_never_stops_training(
    part: str, verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.sdk.wandb_run import Run as WandbRun

    def broken(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(WandbRun, part, broken)
    tiny = [a for a in TINY if a != "logger=csv"]
    outcome = verb("train", *tiny, "trainer.max_steps=2", f"output={tmp_path / 'run'}")
    assert outcome.status == 0, outcome.err
    assert outcome.err.count("W&B failed") == 1
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_a_configured_key_means_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from consistency.training import loggers

    monkeypatch.delenv("WANDB_MODE", raising=False)
    for key, mode in ((True, "online"), (False, "offline")):
        monkeypatch.setattr(loggers, "key_configured", lambda found=key: found)
        logger = PatientWandbLogger(project="p", folder=str(tmp_path), name=None)
        assert logger._wandb_init["settings"].mode == mode
