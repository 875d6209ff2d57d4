"""`make gpu`, as far as it goes without a GPU."""

from pathlib import Path

import gpu
import pytest
import torch

from conftest import TINY
from consistency.checkpoints.load import load_teacher

SMALL = [option for option in TINY if option.startswith("model.")]


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the status is 0, as after `make audit` without a network: nothing has failed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_the_random_teacher_can_be_distilled(tmp_path: Path) -> None:
    gpu.random_teacher(["data=digits", *SMALL], tmp_path / "teacher.ckpt")
    teacher = load_teacher(str(tmp_path / "teacher.ckpt"), weights="online")
    image = torch.zeros(1, 1, 8, 8)
    assert teacher(image, torch.ones(1), torch.zeros(1, dtype=torch.long)).shape == image.shape


def test_the_table_has_a_row_for_each_pair() -> None:
    figures = {"images a second": {"median": 12.34567, "min": 1.0}, "peak memory, MiB": 3.0}
    results = {
        "one ct": {"title": "x", **figures, "machine": "y"},
        "two ct": {gpu.MISSING: "no time"},
    }
    head, _, one, two = gpu.table(results).splitlines()
    assert head == f"| | images a second | peak memory, MiB | {gpu.MISSING} |"
    assert one == "| one ct | 12.35 | 3 |  |"
    assert two == "| two ct |  |  | no time |"
