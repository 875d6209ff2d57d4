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
    assert found["samples"] == 898
    assert len(found["seeds"]) == 3
    results = {name: quality["frechet"] for name, quality in found["results"].items()}
    assert results["one_step"] <= 2.0 * results["train_images"]
    assert results["one_step"] <= results["noise"] / 20
