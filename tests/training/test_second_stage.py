"""The second stage of truncated consistency models goes on with a checkpoint of the first."""

from pathlib import Path

import pytest
import torch

import consistency
from conftest import TINY, Run
from consistency.runtime.files import fingerprint


def test_a_second_stage_records_its_first_and_leaves_it_alone(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    run, first = tmp_path / "run", trained["ect"] / "checkpoints" / "last.ckpt"
    digest = fingerprint(first)
    given = ["mode=tcm", f"teacher={trained['ect']}", "optimizer.lr=1e-12", "trainer.max_steps=1"]
    outcome = verb("train", *TINY, *given, f"output={run}")
    assert outcome.status == 0, outcome.err
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    expected = {"path": str(first), "weights": "ema", "sha256": digest}
    assert content["sources"] == {"teacher": expected, "init": expected}
    assert not [name for name in content["state_dict"] if "first_stage" in name]
    assert fingerprint(first) == digest
    before, after = (
        consistency.load(path, weights=weights).denoiser.network.state_dict()
        for path, weights in ((trained["ect"], "ema"), (run, "online"))
    )
    torch.testing.assert_close(after, before, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [("edm", "give a consistency model"), (None, "mode=ect")],
)
def test_a_second_stage_needs_a_consistency_model(
    teacher: str | None, expected: str, verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    given = [f"teacher={trained[teacher]}"] if teacher else []
    outcome = verb("train", *TINY, "mode=tcm", *given, f"output={tmp_path / 'run'}")
    assert outcome.status == 2
    assert expected in outcome.err
