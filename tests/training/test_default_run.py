"""The promise of the default run, measured: minutes on two cores."""

import json
from pathlib import Path

import pytest

from conftest import Run


@pytest.mark.slow
def test_the_default_run_draws_digits_in_one_step(process: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = process("train", f"output={run}", OMP_NUM_THREADS="2")
    assert outcome.status == 0, outcome.err
    found = json.loads((run / "evaluation.json").read_text())
    assert found["protocol"]["samples"] == 898
    assert len(found["seeds"]) == 3
    distances = {name: values["frechet_classifier"] for name, values in found["results"].items()}
    assert distances["one_step/ema"] <= 2.0 * distances["train_images"]
    assert distances["one_step/ema"] <= distances["noise"] / 20
