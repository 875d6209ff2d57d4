"""A run in one's own script or notebook: without a command line."""

import math
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import consistency
from conftest import ROOT, TINY, Run
from consistency.commands import cli, train
from consistency.errors import UserError
from consistency.runtime import launch, signals

SMALL = [*TINY, "mode=ct", "data=digits", "trainer.max_steps=1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lr_of(run: Path) -> float:
    return float(OmegaConf.load(run / "config.yaml").optimizer.lr)


def test_a_configuration_trains_twice_each_time_in_a_folder_of_its_own(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = HydraConfig.instance().cfg
    config = consistency.compose(SMALL)
    config.optimizer.lr = 0.25
    value = consistency.train(config)
    first = Path(config.output)
    assert math.isfinite(value)
    assert first.parent == here / "runs"
    assert "mode=ct data=digits model=unet" in capfd.readouterr().out
    consistency.train(config)
    second = Path(config.output)
    assert second != first
    assert sorted(p.name for p in (here / "runs").iterdir()) == sorted([first.name, second.name])
    for run in (first, second):
        assert (run / "checkpoints" / "last.ckpt").is_file()
        assert lr_of(run) == 0.25
    assert HydraConfig.instance().cfg is before


@pytest.mark.slow
def test_a_folder_that_is_named_is_used_once(here: Path) -> None:
    config = consistency.compose([*SMALL, "output=my run (1)"])
    consistency.train(config)
    assert (here / "my run (1)" / "checkpoints" / "last.ckpt").is_file()
    with pytest.raises(UserError, match=r"'resume=.*my run \(1\)'"):
        consistency.train(config)
    longer = consistency.compose(["resume=my run (1)", "trainer.max_steps=2"])
    consistency.train(longer)
    assert longer.output == str(here / "my run (1)")
    other = consistency.compose(["resume=my run (1)"])
    other.optimizer.lr = 0.5
    with pytest.raises(UserError, match=r"optimizer\.lr=0\.5"):
        consistency.train(other)


def test_it_works_after_a_command_and_in_another_use_of_hydra(verb: Run, here: Path) -> None:
    outcome = verb("train", *SMALL, "output=command")
    assert outcome.status == 0, outcome.err
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        theirs = compose("train", ["mode=edm"], return_hydra_config=True)
        HydraConfig.instance().set_config(theirs)
        try:
            consistency.train(consistency.compose([*SMALL, "output=ours"]))
            assert HydraConfig.get().runtime.choices.mode == "edm"
        finally:
            HydraConfig.instance().cfg = None
        assert compose("train", ["mode=ict"]).mode.role == "consistency"
    one, other = (OmegaConf.load(here / f / "config.yaml") for f in ("command", "ours"))
    one.output = other.output = ""
    assert one.mode == other.mode and one.optimizer == other.optimizer


@pytest.mark.parametrize("folder_given", [True, False])
def test_what_hydra_s_own_interface_composes_trains(folder_given: bool, here: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*SMALL, "optimizer.lr=0.125", "output=x"])
    if folder_given:
        train.train(config, here / "x")
    else:
        consistency.train(config)
    assert lr_of(here / "x") == 0.125


def test_mistakes_are_errors_of_ours() -> None:
    for given, said in (
        (["trainer.max_stepz=3"], "max_stepz"),
        (["mode=xyz"], "mode/xyz"),
        (["mode"], "mode"),
        (["+parts.pairs.ratio.p_meen=1"], "p_meen"),
    ):
        with pytest.raises(UserError, match=said):
            consistency.compose(given)
    with pytest.raises(UserError, match="checkpoint"):
        consistency.compose([], "sample")
    with pytest.raises(UserError, match="a verb among"):
        consistency.compose([], "paint")


def test_further_processes_are_told_what_was_changed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line of another rank composes the configuration at hand, also where that was copied or replaced."""
    config = consistency.compose(["mode=ct", "data=digits", "output=it's"])
    config.optimizer.lr = 0.5
    config.callbacks.curves = None
    config.callbacks.evaluation_ema.decays = [0.9, 0.99]
    config.data.path = "a,b (it's)"
    config.mode.scales, config.parts.scales.constant.num_scales = "constant", 7
    commands = []

    def main(config: object, output: Path) -> None:
        commands.append(launch._rank_command(1)[0])
        signals.unblock()  # as when all ranks are started

    for each in (config, deepcopy(config)):
        cli.called(main, each, "train")
        script, _, name, *options = commands[-1][1:]
        assert (Path(script), name) == (ROOT / "src" / "train.py", "train")
        assert f"hydra.run.dir='{here}/it\\'s'" in options
        again = consistency.compose([*options, "output=it's"])
        again.output = each.output
        assert OmegaConf.to_container(again) == OmegaConf.to_container(each)


def test_importing_the_package_imports_no_framework() -> None:
    code = "import sys, consistency; print([m for m in ('torch', 'hydra', 'lightning', 'omegaconf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
