"""A learned weighting is trained, averaged, saved and resumed beside the network, and is no part of a model."""

import shutil
from pathlib import Path

import pytest
import torch

from comparing_runs import assert_equal, content
from conftest import SHORT, TINY, Run
from consistency.checkpoints.load import load
from consistency.checkpoints.ours import LAST, PREVIOUS

RUN = [
    "mode.average=constant",
    "trainer.max_steps=4",
    "callbacks.checkpoint.every_n_train_steps=2",
    "parts.average.constant.decays=[0.5]",
]
SCT = [*TINY, "mode=sct", "parts.warmup.linear.ramp_steps=3"]
EDM2 = [
    *SHORT,
    *("mode=edm", "mode.head=fourier", "model=edm2_digits", "model.network.model_channels=8"),
    *("model.network.num_res_blocks=1", "model.network.num_head_channels=8"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "learned"),
    [(SCT, "linear.bias"), (EDM2, "linear.weight")],
    ids=["sinusoidal", "fourier"],
)
def test_the_head_goes_on_to_the_bit_and_is_no_part_of_a_model(
    settings: list[str], learned: str, verb: Run, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    outcome = verb("train", *settings, *RUN, f"output={whole}")
    assert outcome.status == 0, outcome.err
    shutil.copytree(whole, resumed)
    for suffix in ("", ".sha256"):
        name = resumed / "checkpoints" / f"{PREVIOUS}{suffix}"
        name.replace(resumed / "checkpoints" / f"{LAST}{suffix}")
    (resumed / "checkpoints" / f"{LAST}.sha256").unlink()
    outcome = verb("train", *settings, *RUN, f"output={resumed}", "resume=auto")
    assert outcome.status == 0, outcome.err
    one, other = (content(run / "checkpoints" / LAST) for run in (whole, resumed))
    assert_equal(one, other, LAST)
    last = one["state_dict"][f"objective.head.{learned}"]
    averaged = one["callbacks"]["EvaluationEMA"]["heads"]["0.5"][learned]
    assert 0 < float((averaged - last).norm()) < float(last.norm())
    assert all(n.startswith(("online.", "objective.head.")) for n in one["state_dict"])
    if settings is EDM2:  # normalised before each step, which leads less than its rate away
        weights = [w.flatten(1) for n, w in one["state_dict"].items() if n.endswith(".weight")]
        lengths = torch.cat([w.square().mean(1).sqrt() for w in weights])
        assert float((lengths - 1).abs().max()) < 5e-3
    model = load(whole)
    assert not any("head" in name for name in model.denoiser.network.state_dict())
    assert torch.isfinite(model.sample(2, steps=2).float()).all()
