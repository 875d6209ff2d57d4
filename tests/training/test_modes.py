"""Every mode trains, and its checkpoint samples."""

from pathlib import Path

import numpy as np
import pytest

from conftest import BEGINS_WITH, MODES, TINY, Run

QUICK = ("cd", "ct", "meanflow", "sct", "tcm")


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in MODES]
)
def test_every_mode_trains_and_its_checkpoint_samples(
    mode: str, verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    teacher = trained[BEGINS_WITH.get(mode, "edm")]
    given = [f"mode={mode}", f"teacher={teacher}", "trainer.max_steps=2", f"output={run}"]
    outcome = verb("train", *TINY, *given)
    assert outcome.status == 0, outcome.err
    sampled = verb("sample", f"checkpoint={run}", "num_samples=4", f"output={tmp_path / 'out'}")
    assert sampled.status == 0, sampled.err
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 8, 8, 1)
        assert arrays["arr_0"].dtype == np.uint8
