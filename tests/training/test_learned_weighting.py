"""The learned weighting of sCT is trained, averaged, saved and resumed beside the network, and is no part of a model."""

import shutil
from pathlib import Path

import pytest
import torch

from comparing_runs import assert_equal, content
from conftest import TINY, Run
from consistency.checkpoints.load import load
from consistency.checkpoints.ours import LAST, PREVIOUS

RUN = [
    *TINY,
    "mode=sct",
    "mode.average=constant",
    "trainer.max_steps=4",
    "callbacks.checkpoint.every_n_train_steps=2",
    "parts.average.constant.decays=[0.5]",
    "parts.warmup.linear.ramp_steps=3",
]


@pytest.mark.slow
def test_the_head_goes_on_to_the_bit_and_is_no_part_of_a_model(verb: Run, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    outcome = verb("train", *RUN, f"output={whole}")
    assert outcome.status == 0, outcome.err
    shutil.copytree(whole, resumed)
    for suffix in ("", ".sha256"):
        name = resumed / "checkpoints" / f"{PREVIOUS}{suffix}"
        name.replace(resumed / "checkpoints" / f"{LAST}{suffix}")
    (resumed / "checkpoints" / f"{LAST}.sha256").unlink()
    outcome = verb("train", *RUN, f"output={resumed}", "resume=auto")
    assert outcome.status == 0, outcome.err
    one, other = (content(run / "checkpoints" / LAST) for run in (whole, resumed))
    assert_equal(one, other, LAST)
    bias = one["state_dict"]["objective.head.linear.bias"]
    averaged = one["callbacks"]["EvaluationEMA"]["heads"]["0.5"]["linear.bias"]
    assert 0 < abs(float(averaged)) < abs(float(bias))
    assert all(n.startswith(("online.", "objective.head.")) for n in one["state_dict"])
    model = load(whole)
    assert not any("head" in name for name in model.denoiser.network.state_dict())
    assert torch.isfinite(model.sample(2, steps=2).float()).all()
