"""Every argument of Lightning's Trainer is taken, or refused with what to say instead; no logger is one of the choices."""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import OmegaConf

from configurations import composed
from conftest import TINY, Run
from consistency.checkpoints.ours import read
from consistency.commands.overrides import spelled_out
from consistency.errors import UserError
from consistency.training import build
from consistency.training.build import REFUSED, STRATEGIES, require_taken, require_whole
from consistency.training.lightning_patches import AtomicCheckpointIO
from consistency.training.nonfinite import OVERFLOWS

TAKEN = frozenset(
    "accelerator benchmark default_root_dir detect_anomaly deterministic devices enable_model_summary "
    "gradient_clip_algorithm gradient_clip_val log_every_n_steps max_steps num_nodes plugins precision "
    "profiler strategy sync_batchnorm".split()
)
"""The arguments that reach Lightning unchanged."""

NOT_CSV = [a for a in TINY if a != "logger=csv"]


def trainer_node(*overrides: str) -> Any:
    return composed("train", *TINY, *overrides).trainer


@cache
def plain_trainer() -> dict[str, Any]:
    plain = OmegaConf.to_container(trainer_node(), resolve=True)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def test_every_argument_of_lightnings_trainer_is_decided() -> None:
    """A new version's argument fails here until it is taken or refused."""
    signature = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert set(REFUSED) | TAKEN == signature
    assert not set(REFUSED) & TAKEN


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_run_sets_itself_is_refused_with_what_to_say_instead(name: str) -> None:
    plain = plain_trainer()
    with pytest.raises(UserError, match=rf"got: trainer\.{name}=1\n  do: say \S+"):
        require_taken(OmegaConf.create({**plain, name: 1}))
    require_taken(OmegaConf.create({**plain, name: None}))


@pytest.mark.parametrize("name", ["max_epochs", "precision", "profiler"])
def test_an_argument_in_the_environment_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"PL_TRAINER_{name.upper()}", "1")
    with pytest.raises(UserError, match=rf"unset PL_TRAINER_{name.upper()}; say trainer\."):
        require_taken(trainer_node())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("+trainer.max_epochs=1", "trainer.max_steps"),
        ("+trainer.accumulate_grad_batches=2", "data.device_batch_size"),
        ("trainer.strategy=ddp_spawn", "trainer=ddp"),
        ("+trainer.plugins=[{_target_: lightning.fabric.plugins.TorchCheckpointIO}]", "TorchCheckpointIO"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps >= 1"),
        ("trainer.precision=16-mixed", "bf16-mixed on a CPU"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", pytest.param("benchmark", marks=pytest.mark.slow)])
def test_a_run_that_is_refused_has_opened_and_written_nothing(
    given: str, said: str, command: str, verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("the data were opened")

    monkeypatch.setattr("consistency.training.build.build_data", opened)
    monkeypatch.chdir(tmp_path)
    outcome = verb(command, *TINY, given, f"output={tmp_path / 'run'}")
    assert outcome.status == 2
    assert said in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given",
    [
        "trainer.strategy=ddp_fork",
        "trainer.strategy=ddp_notebook",
        "trainer.strategy=ddp_spawn_find_unused_parameters_true",
        "trainer.strategy=fsdp",
        "trainer.strategy=deepspeed_stage_2",
        "trainer.strategy=single_device",
        "trainer.strategy=null",
        "+trainer={strategy: {_target_: lightning.pytorch.strategies.FSDPStrategy}}",
        "+trainer={strategy: {_target_: lightning.pytorch.strategies.DDPStrategy, start_method: spawn}}",
    ],
)
def test_a_strategy_that_cannot_keep_what_a_run_promises_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="trainer=ddp"):
        require_taken(trainer_node(given))


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_other_strategies_are_taken(name: str) -> None:
    require_taken(trainer_node(f"trainer.strategy={name}"))
    require_whole(L.Trainer(strategy=name, devices=2, accelerator="cpu", logger=False).strategy)


def test_ddp_is_taken_with_arguments_of_its_own() -> None:
    given = ["trainer=ddp", "+trainer.strategy.static_graph=true", "+trainer.strategy.gradient_as_bucket_view=true"]  # fmt: skip
    require_taken(trainer_node(*given))


def test_processes_that_lightning_forks_in_a_notebook_are_refused() -> None:
    forked = L.Trainer(strategy="ddp_fork", devices=2, accelerator="cpu", logger=False).strategy
    with pytest.raises(UserError, match=r"start_method=fork\n.*in a notebook trainer\.devices=1"):
        require_whole(forked)


def test_plugins_of_a_person_stand_beside_ours(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[L.Trainer] = []

    def kept(*given: Any) -> L.Trainer:
        built.append(original(*given))
        return built[0]

    original = build.build_trainer
    monkeypatch.setattr("consistency.training.build.build_trainer", kept)
    scaler = "scaler: {_target_: torch.amp.GradScaler, device: cpu, init_scale: 1024.0}"
    half = f"{{_target_: lightning.pytorch.plugins.MixedPrecision, precision: 16-mixed, device: cpu, {scaler}}}"
    place = "{_target_: lightning.pytorch.plugins.environments.LightningEnvironment}"
    given = ["trainer.precision=null", f"+trainer.plugins=[{half}, {place}]", "trainer.max_steps=1"]
    outcome = verb("train", *TINY, *given, f"output={tmp_path / 'run'}")
    assert outcome.status == 0, outcome.err
    strategy = built[0].strategy
    assert isinstance(built[0].precision_plugin, MixedPrecision)
    assert isinstance(strategy.checkpoint_io, AtomicCheckpointIO)
    assert isinstance(built[0]._accelerator_connector.cluster_environment, LightningEnvironment)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt.sha256").is_file()


OPENAI = "scaler={init_scale: 1048576, growth_factor: 1.0006933874625807, growth_interval: 1}"


def test_a_gradient_scaler_has_its_own_start_and_growth() -> None:
    """OpenAI's: 2^20, and 0.001 more in the exponent after every good step."""
    plugin = build.scaled(composed("train", "trainer.precision=16-mixed", OPENAI), "cpu")
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 2**20
    assert plugin.scaler.get_growth_factor() == pytest.approx(2**0.001)
    assert plugin.scaler.get_growth_interval() == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["trainer.precision=32-true", OPENAI], "half precision for scaler="),
        (["trainer.precision=16-mixed", "scaler={growth: 3}"], "growth_factor: 2"),
        (["trainer.precision=16-mixed", "scaler={growth_factor: 1.0}"], "growth factor must be"),
    ],
)
def test_a_scaler_that_cannot_be_is_one_message(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build.scaled(composed("train", *given), "cpu")


@pytest.mark.slow
def test_gradients_are_clipped_as_the_trainer_is_told(verb: Run, tmp_path: Path) -> None:
    """Under SGD of rate 1 a step is as long as its gradient; by value, no coordinate is longer."""
    sgd = ["~optimizer", "+optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 1.0}"]
    norms = {}
    for name, more in {
        "start": ["optimizer.lr=1e-20"],
        "norm": ["trainer.gradient_clip_val=0.5"],
        "value": ["trainer.gradient_clip_val=0.25", "+trainer.gradient_clip_algorithm=value"],
    }.items():
        run = tmp_path / name
        outcome = verb("train", *TINY, *sgd, *more, "trainer.max_steps=1", f"output={run}")
        assert outcome.status == 0, outcome.err
        state = read(run / "checkpoints" / "last.ckpt")["state_dict"]
        norms[name] = torch.cat([value.flatten() for value in state.values()])
    assert float((norms["norm"] - norms["start"]).norm()) == pytest.approx(0.5, rel=1e-3)
    assert float((norms["value"] - norms["start"]).abs().max()) == pytest.approx(0.25, rel=1e-3)


def test_a_callback_that_is_switched_off_is_not_replaced_by_lightnings(
    verb: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    off = ["callbacks.checkpoint=null", "callbacks.progress=null", "trainer.max_steps=1"]
    given = [a for a in TINY if not a.startswith("callbacks.checkpoint")]
    outcome = verb("train", *given, *off, f"output={run}")
    assert outcome.status == 0, outcome.err
    assert not list(run.rglob("*.ckpt"))
    assert "it/s" not in outcome.out + outcome.err


@pytest.mark.slow
def test_a_scaler_that_falls_for_ever_ends_a_run_and_its_checkpoint_stays(
    verb: Run, tmp_path: Path
) -> None:
    """With the plugin of Lightning's for half precision, from a scale that nothing fits in."""
    scaler = "scaler: {_target_: torch.amp.GradScaler, device: cpu, init_scale: 1e38}"
    half = f"{{_target_: lightning.pytorch.plugins.MixedPrecision, precision: 16-mixed, device: cpu, {scaler}}}"
    given = ["trainer.precision=null", f"+trainer.plugins=[{half}]", "trainer.max_steps=60"]
    run = tmp_path / "run"
    outcome = verb("train", *TINY, *given, f"output={run}")
    assert outcome.status == 2
    assert f"the last of {OVERFLOWS} in a row" in outcome.err
    assert "ConsistencyObjective at step k=0" in outcome.err
    kept = read(run / "checkpoints" / "last.ckpt")
    assert (kept["k"], kept["overflows"]) == (0, [OVERFLOWS, OVERFLOWS])


@pytest.mark.slow
def test_a_run_with_the_constant_rate_can_be_made_longer(verb: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    constant = "mode.rate=constant"
    first = verb("train", *TINY, constant, "trainer.max_steps=2", f"output={run}")
    assert first.status == 0, first.err
    longer = verb("train", f"resume={run}", "trainer.max_steps=5")
    assert longer.status == 0, longer.err
    assert read(run / "checkpoints" / "last.ckpt")["k"] == 5


# ------------------------------------------------------------------------ loggers


@pytest.mark.parametrize(
    "none", [pytest.param("logger=null", marks=pytest.mark.slow), "logger=none"]
)
def test_no_logger_is_a_choice(none: str, verb: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = verb("train", *NOT_CSV, none, "trainer.max_steps=2", f"output={run}")
    assert outcome.status == 0, outcome.err
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", "samples"]
    later = verb("train", f"resume={run}", none, "trainer.max_steps=3")
    assert later.status == 0, later.err
    assert not (run / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("logger=null,csv", ["logger=none,csv"]),
        ("evaluation@callbacks.evaluation=null", ["evaluation@callbacks.evaluation=none"]),
        ("mask=null", ["mask=none"]),
        ("experiment=null", []),
        ("callbacks.evaluation=null", ["callbacks.evaluation=null"]),
        ("data.num_classes=null", ["data.num_classes=null"]),
    ],
)
def test_null_is_the_option_none_of_a_choice_that_has_one(given: str, meant: list[str]) -> None:
    assert spelled_out(given) == meant


def test_a_choice_without_an_option_none_says_its_options(verb: Run, tmp_path: Path) -> None:
    outcome = verb("train", "data=null", f"output={tmp_path / 'run'}")
    assert outcome.status == 2
    assert "cifar10, digits" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_logger_of_a_persons_own_is_taken(verb: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mine = f"+logger.mine={{_target_: lightning.pytorch.loggers.CSVLogger, save_dir: '{run}/mine', name: null, version: ''}}"  # fmt: skip
    outcome = verb("train", *TINY, mine, "trainer.max_steps=2", f"output={run}")
    assert outcome.status == 0, outcome.err
    assert "train/loss" in (run / "mine" / "metrics.csv").read_text()
    assert (run / "metrics.csv").is_file()


@pytest.mark.parametrize("wrong", ["{_target_: torch.nn.Identity}", "{project: mine}"])
def test_what_is_no_logger_is_told(wrong: str, verb: Run, tmp_path: Path) -> None:
    outcome = verb("train", *TINY, f"+logger.mine={wrong}", f"output={tmp_path / 'run'}")
    assert outcome.status == 2
    assert "_target_ of one of Lightning's loggers" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tensorboard_has_one_history_of_a_run_and_its_pictures(verb: Run, tmp_path: Path) -> None:
    """Also of steps that were taken twice: what a stopped run wrote after its checkpoint is left out."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    given = ["logger=tensorboard", "callbacks.checkpoint.every_n_train_steps=2"]
    first = verb("train", *NOT_CSV, *given, "trainer.max_steps=2", f"output={run}")
    assert first.status == 0, first.err
    torn = instantiate(composed("train", "logger=tensorboard", f"output={run}").logger.tensorboard, folder=str(run / "tensorboard"))  # fmt: skip
    torn.log_metrics({"train/loss": -1.0}, 2)
    torn.finalize("failed")
    second = verb("train", f"resume={run}", "trainer.max_steps=4")
    assert second.status == 0, second.err
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [0, 1, 2, 3]
    assert all(event.value > 0 for event in losses)
    assert [event.step for event in events.Images("samples/one_step")] == [1, 3]
    assert (run / "metrics.csv").is_file()


def test_without_the_package_tensorboard_one_message_says_so(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consistency.training.loggers.find_spec", lambda name: None)
    run = tmp_path / "run"
    outcome = verb("train", *NOT_CSV, "logger=tensorboard", f"output={run}")
    assert outcome.status == 2
    assert "pip install tensorboard" in outcome.err
    assert not run.exists()


@pytest.mark.slow
def test_tensorboard_that_fails_never_stops_training(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "add_scalar", broken)
    run = tmp_path / "run"
    given = ["logger=tensorboard", "trainer.max_steps=2"]
    outcome = verb("train", *NOT_CSV, *given, f"output={run}")
    assert outcome.status == 0, outcome.err
    assert outcome.err.count("TensorBoard failed and is off") == 1
    assert read(run / "checkpoints" / "last.ckpt")["k"] == 2
