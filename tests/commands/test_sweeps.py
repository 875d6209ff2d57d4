"""Sweepers and launchers: a run returns its value, and its failure is told."""

import json
import math
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from PIL import Image

import originals
from configurations import composed, options
from conftest import ROOT, TINY, Run
from consistency.commands import cli, sweeps
from consistency.commands.train import LastLosses, value_of
from consistency.errors import DivergenceError, UserError
from consistency.training.callbacks.checkpoints import RunCheckpoints
from consistency.training.callbacks.evaluation import Evaluation

SHORT = [*TINY, "mode=ect", "trainer.max_steps=1"]


def values(out: str) -> list[float]:
    return [float(t.split()[4].rstrip(",")) for t in out.splitlines() if "Value of this job" in t]


@pytest.mark.filterwarnings("ignore")  # of optuna's own imports
def test_optuna_finds_the_best_value(verb: Run, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    output = tmp_path / "sweep, with (1)"
    sweep = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2"]
    outcome = verb("train", *sweep, *SHORT, "optimizer.lr=interval(1e-4,1e-2)", f"output={output}")
    assert outcome.status == 0, outcome.err
    rows = sweeps.read(output)
    assert [float(row["value"]) for row in rows] == pytest.approx(values(outcome.out), rel=1e-5)
    assert [float(row["optimizer.lr"]) > 0 for row in rows] == [True, True]
    assert all((output / row["folder"] / "config.yaml").is_file() for row in rows)
    assert (output / "sweep.md").is_file() and (output / "sweep.png").is_file()
    found = OmegaConf.load(output / "optimization_results.yaml")
    assert len(values(outcome.out)) == 2
    assert found.best_value == pytest.approx(min(values(outcome.out)), rel=1e-5)
    assert "mean of the last" in outcome.out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_other_verbs_return_what_they_measure(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweep = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "seed=choice(0,1)"]
    few = ["num_samples=64", "evaluation.extractor=classifier", "logger=csv", "samplers=onestep"]
    output = tmp_path / "sweep"
    given = [f"checkpoint={trained['ect']}", "weights=ema", f"output={output}"]
    outcome = verb("evaluate", *sweep, *given, *few)
    assert outcome.status == 0, outcome.err
    found = OmegaConf.load(output / "optimization_results.yaml")
    (file,) = output.glob("0_seed-*/evaluation.json")
    (result,) = OmegaConf.load(file).results
    assert found.best_value == pytest.approx(result["frechet_classifier"])


def stand_in(kind: type, **attributes: Any) -> Any:
    made = kind.__new__(kind)
    vars(made).update(attributes)
    return made


def test_the_value_of_a_run_is_the_best_of_what_is_monitored() -> None:
    best = stand_in(RunCheckpoints, monitor="fid/x", best_value=3.0)
    never = stand_in(RunCheckpoints, monitor="fid/x", best_value=math.inf)
    nothing = stand_in(RunCheckpoints, monitor=None, best_value=math.inf)
    evaluation = stand_in(Evaluation)
    losses = LastLosses()
    cases = [
        ([evaluation, best], 3.0),
        ([never], math.nan),
        ([nothing], 1.5),
        ([], 1.5),
    ]
    trainer: Any = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert math.isnan(value_of(trainer, losses)[0])
    for loss in (1.0, 2.0):
        losses.on_train_batch_end(trainer, L.LightningModule(), {"loss": torch.tensor(loss)})
    for callbacks, value in cases:
        trainer.callbacks = callbacks
        assert value_of(trainer, losses)[0] == pytest.approx(value, nan_ok=True)


@pytest.mark.slow
def test_every_job_that_fails_is_told(verb: Run, tmp_path: Path) -> None:
    outcome = verb("train", "-m", *SHORT, "seed=-1,-2,3", f"output={tmp_path / 'sweep'}")
    assert outcome.status == 2
    for number, seed in ((0, -1), (1, -2)):
        told = next(t for t in outcome.err.split("error: ") if f"job {number} of the sweep" in t)
        assert f"got: {seed}" in told
    assert "job 2 of the sweep" not in outcome.err
    assert (tmp_path / "sweep" / "2_seed-3" / "checkpoints" / "last.ckpt").is_file()


def test_a_failure_is_told_with_its_cause(capfd: pytest.CaptureFixture[str]) -> None:
    job = SimpleNamespace(num=3, override_dirname="seed=1")
    try:
        try:
            raise ValueError("the true cause")
        finally:
            raise RuntimeError("what came of it")
    except RuntimeError as error:
        cli._print_failure(job, error)
    told = capfd.readouterr().err
    assert "job 3 of the sweep (seed=1)" in told
    assert "the true cause" in told and "what came of it" in told
    cli._print_failure(job, UserError("expected x\n  got: y"))
    assert "Traceback" not in capfd.readouterr().err


def test_a_job_in_a_process_of_joblib_can_start_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There the way to start processes is joblib's own by default."""
    chosen = []
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: "loky")
    monkeypatch.setattr(
        multiprocessing, "set_start_method", lambda method, force: chosen.append((method, force))
    )
    cli._allow_processes()
    assert chosen == [(None, True)]


@pytest.fixture
def free_threads(monkeypatch: pytest.MonkeyPatch) -> int:
    """Take back the one thread of tests, and return the number of cores."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    return len(os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, 3])
def test_jobs_of_joblib_share_the_cores(
    free_threads: int, process: Run, tmp_path: Path, own: int | None
) -> None:
    """A number in the environment holds for each."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    probe = ["+callbacks.probe._target_=probe.RankProbe", "+callbacks.probe.folder=${output}"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "optimizer.lr=1e-3,2e-3"]
    environment = {"PYTHONPATH": str(ROOT / "tests" / "support")}
    environment |= {} if own is None else {"OMP_NUM_THREADS": str(own)}
    sweep = tmp_path / "sweep"
    arguments = ["-m", *SHORT, *probe, *launcher, f"output={sweep}"]
    outcome = process("train", *arguments, **environment)
    assert outcome.status == 0, outcome.err
    seen = [json.loads(file.read_text())["threads"] for file in sweep.glob("*/rank_0.json")]
    assert seen == 2 * [own or max(1, free_threads // 2)]


@pytest.mark.slow
def test_the_job_after_one_of_two_processes_has_all_cores(
    free_threads: int, process: Run, tmp_path: Path
) -> None:
    probe = ["+callbacks.probe._target_=probe.RankProbe", "+callbacks.probe.folder=${output}"]
    support, sweep = str(ROOT / "tests" / "support"), tmp_path / "sweep"
    arguments = ["-m", *SHORT, "trainer.devices=2,1", *probe, f"output={sweep}"]
    outcome = process("train", *arguments, PYTHONPATH=support)
    assert outcome.status == 0, outcome.err
    files = [
        sweep / f"{job}_devices-{2 - job}" / f"rank_{r}.json" for job, r in ((0, 0), (0, 1), (1, 0))
    ]
    threads = [json.loads(file.read_text())["threads"] for file in files]
    assert threads == [max(1, free_threads // 2)] * 2 + [free_threads]


@pytest.mark.slow
def test_jobs_of_joblib_train_with_loader_processes(process: Run, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(16):
        Image.fromarray(originals.noise(16, 16, 3) + np.uint8(0)).save(images / f"{number}.png")
    data = ["data=folder", f"data.path={images}", "data.image_size=16", "data.num_workers=1"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "optimizer.lr=1e-3,2e-3"]
    outcome = process("train", "-m", *SHORT, *data, *launcher, f"output={tmp_path / 'sweep'}")
    assert outcome.status == 0, outcome.err
    for job in ("0_lr-0.001", "1_lr-0.002"):
        assert (tmp_path / "sweep" / job / "checkpoints" / "last.ckpt").is_file()


def job(folder: Path, number: int, *options: str, **sweeper: Any) -> Any:
    """Return Hydra's own configuration of a job, as far as sweeps read it; seed= alone is fixed."""
    name = SimpleNamespace(override_dirname=SimpleNamespace(exclude_keys=["seed"]))
    return SimpleNamespace(
        mode=RunMode.MULTIRUN,
        job=SimpleNamespace(num=number, config=name, override_dirname=" ".join(options)),
        overrides=SimpleNamespace(task=list(options)),
        sweep=SimpleNamespace(dir=str(folder)),
        runtime=SimpleNamespace(output_dir=str(folder / str(number))),
        sweeper=sweeper,
    )


def hydra_is(monkeypatch: pytest.MonkeyPatch, hydra: Any) -> None:
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: hydra))


def test_folders_are_named_by_what_varies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["seed=3", "optimizer.lr=0.00123456789", "data.path='/a/b, c/my set'", "mode.x=[1,2]", "x='token=abc'"]  # fmt: skip
    hydra_is(monkeypatch, job(tmp_path, 7, *options))
    name = sweeps.folder_name()
    assert name == "7_lr-0.001235_path-my-set_x-1-2_x-token"
    hydra_is(monkeypatch, job(tmp_path, 8, "mode=" + "x" * 300))
    assert len(sweeps.folder_name()) <= sweeps.LONGEST


def test_options_of_one_value_do_not_vary() -> None:
    given = ["-m", "seed=3", "optimizer.lr=1e-3,2e-3", "~callbacks.curves", "mode=choice(ct,ect)", "data.path='a,b'"]  # fmt: skip
    assert sweeps.fixed(given) == ["seed=3", "~callbacks.curves", "data.path='a,b'"]
    assert sweeps.first(given) == ["optimizer.lr=0.001", "mode=ct"]
    assert sweeps.first(["optimizer.lr=interval(1,2)", "+a@b=range(3,5)"]) == ["+a@b=3"]


def test_the_table_has_every_job_once_and_the_best_first(tmp_path: Path) -> None:
    for number, lr, value in ((2, 0.1, 3.0), (0, 0.2, math.nan), (1, 0.3, None), (2, 0.1, 2.0), (10, 0.4, 1.5)):  # fmt: skip
        failure = "" if value is not None else "expected a | b\n  got: token=abc"
        sweeps.record(job(tmp_path, number, "seed=3", f"lr={lr}"), value, 1.0, failure)
    rows = sweeps.read(tmp_path)
    assert [row["job"] for row in rows] == ["0", "1", "2", "10"]
    assert [row["value"] for row in rows] == ["nan", "", "2", "1.5"]
    assert "seed" not in rows[0] and "abc" not in (tmp_path / "sweep.csv").read_text()
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 10", "| 2", "| 0", "| 1"]
    assert (tmp_path / "sweep.png").is_file()


@pytest.mark.parametrize(
    ("direction", "worst"), [("Direction.minimize", math.inf), ("maximize", -math.inf)]
)
def test_what_is_not_finite_is_the_worst_for_a_search_and_a_failure_elsewhere(
    direction: str, worst: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def diverges() -> float:
        raise DivergenceError("a finite loss", "NaN", "lower the rate")

    outcomes = {"number": lambda: 1.5, "nan": lambda: math.nan, "diverges": diverges}
    monkeypatch.setattr(cli, "perform", lambda verb, main, config: main())
    hydra_is(monkeypatch, job(tmp_path, 0, "lr=1", direction=direction))
    found = [cli.perform_job("train", main, None) for main in outcomes.values()]  # type: ignore[arg-type]
    assert found == [1.5, worst, worst]
    hydra_is(monkeypatch, job(tmp_path, 0, "lr=1"))
    assert math.isnan(cli.perform_job("train", outcomes["nan"], None))  # type: ignore[arg-type]
    with pytest.raises(DivergenceError):
        cli.perform_job("train", diverges, None)  # type: ignore[arg-type]
    assert "lower the rate" in sweeps.read(tmp_path)[0]["failure"]


def test_a_monitor_that_nothing_logs_is_refused_before_the_first_job(
    verb: Run, tmp_path: Path
) -> None:
    given = [a for a in SHORT if "monitor" not in a]
    monitor = "callbacks.checkpoint.monitor=quality/fid/one_step/ema"
    sweep = tmp_path / "sweep"
    outcome = verb("train", "-m", *given, monitor, "seed=0,1", f"output={sweep}")
    assert outcome.status == 2
    assert outcome.err.count("callbacks.checkpoint.monitor among train/loss") == 1
    assert "job 0" not in outcome.err and not sweep.exists()


def test_a_monitor_is_one_of_the_first_job(verb: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and mode decide which metrics there are, and may be what varies."""
    seen: list[str] = []
    monkeypatch.setattr(cli, "perform", lambda verb, main, config: seen.append(config.mode.role))
    given = ["mode=edm,ct", "data=digits", "callbacks.checkpoint.monitor=quality/frechet_classifier/heun/ema"]  # fmt: skip
    assert verb("train", "-m", *given).status == 0
    assert seen == ["teacher", "consistency"]


def test_a_monitor_is_one_of_the_run_s_own_metrics() -> None:
    measured = composed("train", "evaluation@callbacks.evaluation=classifier")
    monitors = ("train/loss", "auto", None, "quality/frechet_classifier/two_steps/ema")
    for monitor in monitors:
        measured.callbacks.checkpoint.monitor = monitor
        sweeps.require_monitor(measured)
    wrong = ("loss", "quality/fid/one_step/ema", "quality/frechet_classifier/nine_steps/ema", "quality/frechet_classifier/one_step/online")  # fmt: skip
    for monitor in wrong:
        measured.callbacks.checkpoint.monitor = monitor
        with pytest.raises(UserError, match="monitor among"):
            sweeps.require_monitor(measured)
    own = {"_target_": "mine.Callback"}  # which may log anything
    OmegaConf.update(measured, "callbacks.mine", own, force_add=True)
    sweeps.require_monitor(measured)


@pytest.mark.parametrize("name", [option for option in options("search") if option != "shared"])
def test_every_search_composes_with_what_it_varies(name: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    config = cli._compose([f"search={name}", "data=digits"], "train")
    assert config.hydra.mode == RunMode.MULTIRUN
    assert config.hydra.sweeper.max_failure_rate == 1
    for key in config.hydra.sweeper.params:
        assert OmegaConf.select(config, key) is not None
    sweeps.require_monitor(config)
    assert config.callbacks.evaluation


def test_a_monitor_is_searched_in_the_direction_in_which_it_improves() -> None:
    """best.ckpt and the value of a run follow the same sign."""
    measured = composed("train", "evaluation@callbacks.evaluation=classifier")
    for monitor, right, wrong in (
        ("quality/precision_classifier/one_step/ema", "maximize", "Direction.minimize"),
        ("quality/kernel_classifier/one_step/ema", "Direction.minimize", "maximize"),
        ("auto", "minimize", "maximize"),
    ):
        measured.callbacks.checkpoint.monitor = monitor
        OmegaConf.update(measured, "hydra.sweeper.direction", right, force_add=True)
        sweeps.require_monitor(measured)
        measured.hydra.sweeper.direction = wrong
        with pytest.raises(UserError, match=f"direction={right.rpartition('.')[2]} for"):
            sweeps.require_monitor(measured)


@pytest.mark.filterwarnings("ignore")
def test_what_optuna_itself_refuses_is_one_message(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a search whose trials have all failed, in memory and in a file."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

    def fails(verb: str, main: Any, config: Any) -> float:
        raise UserError("a file", "none", "give one")

    monkeypatch.setattr(cli, "perform", fails)
    for number, storage in enumerate(("null", f"sqlite:///{tmp_path / 'trials.db'}")):
        search = ["search=optuna_digits", "hydra.sweeper.n_trials=1", f"hydra.sweeper.storage={storage}"]  # fmt: skip
        outcome = verb("train", *search, f"output={tmp_path / str(number)}")
        assert outcome.status == 2
        told = outcome.err.partition("error: expected a search that optuna can finish")
        assert told[2].splitlines()[-1].startswith("  do: correct the options of the sweep")
        assert "do: give one" in told[0]
