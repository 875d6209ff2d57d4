"""The scale of a run: what is counted in its steps, what stays, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf, open_dict

import consistency
from configurations import composed
from conftest import TINY, Run
from consistency.errors import UserError
from consistency.training.build import expanded
from consistency.training.length import shorten


def shortened(scale: float, **trainer: Any) -> dict[str, Any]:
    config = OmegaConf.create(
        {"scale": scale, "trainer": trainer, "mode": {}, "callbacks": {"off": None}}
    )
    shorten(config)
    return dict(config.trainer)


def test_steps_stay_whole_and_at_least_one_and_none_stays_none() -> None:
    given: dict[str, Any] = {"max_steps": 1000, "every_n_train_steps": 3, "ramp_steps": 0}
    given |= {"stage_steps": None, "ref_steps": 50.0, "steps": 18, "limit_steps": -1}
    given |= {"keep_every": 200}
    small = shortened(0.01, **given)
    assert small == given | {
        "max_steps": 10,
        "every_n_train_steps": 1,
        "ref_steps": 0.5,
        "keep_every": 2,
    }
    assert type(small["max_steps"]) is int
    assert shortened(1.0, **given) == given


def test_an_average_reaches_over_the_same_share_of_the_run() -> None:
    """What k steps leave of a weight is what k / scale steps of the whole run leave of it."""
    nodes = {"decays": [0.999, 0.0], "mu": 0.95, "half_lives": [500_000, 3], "widths": [0.1]}
    small = shortened(0.01, **nodes)
    assert small["decays"][0] ** 7 == pytest.approx(0.999**700)
    assert small["mu"] ** 2 == pytest.approx(0.95**200)
    assert (small["decays"][1], small["half_lives"]) == (0.0, [5000, 1])
    assert small["widths"] == [0.1]  # relative to the run so far


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5, math.nan, math.inf])
def test_a_scale_that_is_no_share_is_refused(scale: float) -> None:
    with pytest.raises(UserError, match="scale above 0 and at most 1"):
        shortened(scale)


@pytest.mark.parametrize("scale", ["half", "null"])
def test_a_scale_that_is_no_number_is_refused(scale: str) -> None:
    with pytest.raises(UserError, match="scale"):
        consistency.compose([f"scale={scale}"])


def test_numbers_of_the_command_line_are_of_the_whole_run_too() -> None:
    """`scale` at the end of any command gives that run in small; what no step counts stays."""
    given = ["data=cifar10", "mode=ct", "trainer.max_steps=3000", "parts.target.released.mu_0=0.5"]
    whole, small = (expanded(composed("train", *given, f"scale={s}")) for s in (1, 0.1))
    assert (small.trainer.max_steps, small.mode.total_steps) == (300, 300)
    scales = small.mode.callbacks.scale_schedule.num_scales
    assert (scales.total_steps, scales.s_1) == (300, 150)
    assert small.mode.callbacks.target_ema.decay.mu_0 == pytest.approx(0.5**10)
    assert small.callbacks.checkpoint.every_n_train_steps == 500
    assert small.trainer.log_every_n_steps == 5
    for same in ("optimizer", "data", "model", "mode.process", "mode.samplers"):
        assert OmegaConf.select(small, same) == OmegaConf.select(whole, same)


def test_a_configuration_is_shortened_once() -> None:
    """A run saves the numbers that it has, and its resume leaves them alone."""
    small = expanded(composed("train", "scale=0.1"))
    assert expanded(small).trainer.max_steps == small.trainer.max_steps == 150
    with open_dict(small):
        small.parts = {}  # as the structure of a configuration fills it in
    assert expanded(small).trainer.max_steps == 150
    assert "parts" not in expanded(small)


@pytest.mark.slow
def test_a_short_run_is_resumed_at_its_length(verb: Run, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = ["scale=0.002", f"output={output}", *TINY]
    first = verb("train", *given)
    assert first.status == 0, first.err
    saved: Any = OmegaConf.load(output / "config.yaml")
    assert (saved.scale, saved.trainer.max_steps, saved.mode.total_steps) == (0.002, 3, 3)
    again = verb("train", *given, "resume=auto")
    assert "All its steps are done" in again.out
    longer = verb("train", f"resume={output}", "trainer.max_steps=5")
    assert longer.status == 0, longer.err
    content = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)
    assert (content["k"], content["config"]["mode"]["total_steps"]) == (5, 3)
    other = verb("train", f"resume={output}", "scale=0.004")
    assert other.status == 2
    assert "scale=0.004, where the run has scale=0.002" in other.err
