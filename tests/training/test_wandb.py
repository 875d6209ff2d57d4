"""The offline W&B run is read back from its file."""

import json
import re
from pathlib import Path

import pytest
import wandb
import workspace

from conftest import ROOT, TINY, Run
from consistency.checkpoints.ours import read
from consistency.errors import UserError
from consistency.evaluation.results import PUBLISHED
from consistency.training.loggers import PatientWandbLogger
from wandb_files import as_documented, contents, documented, names, records


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
        name = f"quality/frechet_classifier/onestep/{result['weights']}"
        assert logged[name] == pytest.approx(result["frechet_classifier"], rel=1e-6)
    assert config["evaluation"]["protocol"]["samples"] == 16
    assert logged["quality/results/nrows"] == 2


@pytest.mark.slow
def test_a_measured_run_has_its_table_with_the_bounds_and_its_best_checkpoint(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    tiny = [
        a
        for a in TINY
        if not a.startswith(("logger", "callbacks.evaluation", "callbacks.checkpoint"))
    ]
    measured = ["evaluation@callbacks.evaluation=classifier", "callbacks.evaluation.num_samples=16"]
    few = ["callbacks.evaluation.seeds=[0]", "trainer.max_steps=2", "logger.wandb.log_model=true"]
    outcome = verb("train", *tiny, *measured, *few, f"output={run}")
    assert outcome.status == 0, outcome.err
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    quality = {n for n in documented() if n.startswith("quality/") and "<features>" in n}
    assert quality | {"quality/results", "speed/evaluation_seconds"} <= as_documented(names(file))
    (table,) = file.parent.glob("files/media/table/quality/results*.json")
    rows = json.loads(table.read_text())["data"]
    assert [row[0] for row in rows] == ["train_images", "noise", "one_step/ema", "two_steps/ema"]
    (measurement,) = [row for row in contents(file)[0] if "speed/evaluation_seconds" in row]
    assert measurement["speed/images_seen"] == 16 and measurement["speed/hours"] > 0
    kept = [r.artifact for r in records(file) if r.WhichOneof("record_type") == "artifact"]
    (model,) = [artifact for artifact in kept if artifact.type == "model"]
    assert [entry.path for entry in model.manifest.contents] == ["best.ckpt"]
    workspace.draw([run], tmp_path / "workspace.png")
    assert (tmp_path / "workspace.png").stat().st_size > 10_000


def test_the_page_has_the_names_of_every_method_and_of_the_published_measures() -> None:
    shown = {
        n
        for f in (ROOT / "conf/mode").glob("*.yaml")
        for n in re.findall(r"shown: (\w+)", f.read_text())
    }
    assert {f"schedule/{name}" for name in shown} <= documented()
    measures = [n.removeprefix("quality/") for n in documented() if "<features>" in n]
    for name in measures:
        metric = name.partition("_<features>")[0]
        for ours, published in PUBLISHED.items():
            metric = metric.replace(ours, published)
        assert f"quality/{metric}/<sampler>/<weights>" in documented()


def test_a_run_without_account_is_complete_and_offline(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    run = tmp_path / "run"
    tiny = [a for a in TINY if a != "logger=csv"]
    given = [
        "logger.wandb.tags=[a,b]",
        "logger.wandb.notes=mine",
        "+logger.wandb.settings.label_disable=true",
    ]
    secret = "+logger.wandb.settings.http_proxy=https://me:hidden@proxy"
    outcome = verb(
        "train", "mode=ct", *tiny, *given, secret, "trainer.max_steps=2", f"output={run}"
    )
    assert outcome.status == 0, outcome.err
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    (started,) = [r.run for r in records(file) if r.WhichOneof("record_type") == "run"]
    assert (list(started.tags), started.notes) == (["a", "b"], "mine")
    assert (started.display_name, started.run_group) == ("run", "")
    assert f"wandb sync {file.parent}" in outcome.out
    rows, config = contents(file)
    logged = {name for row in rows for name in row}
    assert {f"train/loss_noise_quartile_{q}" for q in (1, 2, 3, 4)} <= logged
    other = ("quality/", "speed/evaluation", "schedule/r", "schedule/alpha")  # of other runs
    assert as_documented(names(file)) == {n for n in documented() if not n.startswith(other)}
    for sampler in ("one_step", "two_steps"):
        assert list(file.parent.glob(f"files/media/images/samples/{sampler}*.png"))
    assert config["options"]["data"]["batch_size"] == 8
    plain = {name: config[name] for name in ("mode", "data", "model", "experiment")}
    assert plain == {"mode": "ct", "data": "digits", "model": "unet", "experiment": None}
    assert config["parameters"] > 0
    assert "mode=ct" in config["command"] and "hidden" not in json.dumps(config)


@pytest.mark.slow
def test_a_failing_service_never_stops_training(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_wrong_option_is_told_before_the_run(tmp_path: Path) -> None:
    given = {"folder": str(tmp_path), "mode": "offline"}
    for wrong, told in (
        ({"entitty": "me"}, "entitty"),
        ({"kwargs": 1}, "kwargs"),
        ({"log_model": "some"}, "log_model"),
        ({"settings": {"no_such": 1}}, "no_such"),
    ):
        with pytest.raises(UserError, match=told):
            PatientWandbLogger(**given, **wrong)
    logger = PatientWandbLogger(**given, entity="team", job_type="train", id="abc")
    taken = {name: logger._wandb_init[name] for name in ("entity", "job_type", "name", "id")}
    assert taken == {"entity": "team", "job_type": "train", "name": tmp_path.name, "id": "abc"}


def test_files_model_and_config_are_as_the_options_ask(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "checkpoints").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("step_0000002", "step_0000004", "best", "last"):
        (run / "checkpoints" / f"{name}.ckpt").write_text(name)
    options = {"dir": str(elsewhere), "offline": True, "checkpoint_name": "mine", "log_model": "all"}  # fmt: skip
    config = {"my_token": "hidden", "note": 1}
    settings = {"silent": True, "console": "off", "x_disable_meta": True}
    logger = PatientWandbLogger(folder=str(run), config=config, settings=settings, **options)
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.finalize("success")
    wandb.teardown()  # the service has then written all
    (file,) = elsewhere.glob("wandb/offline-run-*/run-*.wandb")
    assert (run / "wandb_id.txt").read_text().strip() in file.name
    assert contents(file)[1].items() >= {"my_token": "***", "note": 1}.items()
    kept = [r.artifact for r in records(file) if r.WhichOneof("record_type") == "artifact"]
    assert [a.name for a in kept] == 3 * ["mine"]
    assert [set(a.aliases) - {"latest"} for a in kept] == [{"step_0000002"}, {"step_0000004"}, {"best"}]  # fmt: skip
    assert not any(b"hidden" in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


def test_a_run_begins_as_a_branch_and_is_resumed_as_itself(tmp_path: Path) -> None:
    """W&B takes fork_from or resume, not both."""
    for expected in ({"fork_from"}, {"resume"}):
        given = {"folder": str(tmp_path), "mode": "disabled", "fork_from": "other?_step=3"}
        logger = PatientWandbLogger(**given)
        assert logger.experiment is not None
        assert {"fork_from", "resume"} & logger._wandb_init.keys() == expected
        logger.finalize("success")
