"""Comparison of run folders and checkpoints, bit by bit."""

import csv
from pathlib import Path
from typing import Any

import torch

TIMES = {"speed/images_per_second", "speed/hours", "speed/evaluation_seconds"}


def rows(run: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without the times."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(file)]


def files(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())


def assert_same(whole: Path, run: Path) -> None:
    """Check that two run folders hold the same files with the same bits, apart from times."""
    assert files(run) == files(whole)
    assert rows(run) == rows(whole)
    assert [int(row["step"]) for row in rows(run)] == list(range(len(rows(run))))
    for name in files(whole):
        one, other = whole / name, run / name
        if name.endswith(".ckpt"):
            assert_equal(content(one), content(other), name)
        elif name.endswith((".json", ".png")):
            assert one.read_bytes() == other.read_bytes(), name
    assert (run / "config.yaml").read_text().replace(str(run), "") == (
        whole / "config.yaml"
    ).read_text().replace(str(whole), "").replace("resume: null", "resume: auto")


def content(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint without paths and times."""
    state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    del state["config"], state["callbacks"]["Throughput"]
    return state


def assert_equal(one: Any, other: Any, path: str) -> None:
    """Check that two nested values are equal to the bit."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_equal(first, second, f"{path}/{number}")
    else:
        assert one == other, path
