"""The position in the data survives a resume, on one process and on two, from files and from shards."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import positions
from conftest import ROOT
from positions import Numbered

SIZE, BATCH, STEPS = 53, 12, 11
"""4 batches an epoch with 5 images left out; the run ends in its third epoch."""


def watch(output: Path, **settings: Any) -> None:
    output.mkdir(exist_ok=True)
    text = json.dumps({"size": SIZE, "batch_size": BATCH, "steps": STEPS, "output": str(output), **settings})  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "positions.py"), text],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def seen(output: Path, name: str, rank: int = 0) -> list[list[int]]:
    return json.loads((output / f"{name}_rank_{rank}.json").read_text())


def global_batches(output: Path, name: str, *, devices: int, accumulated: int) -> list[list[int]]:
    """What all ranks saw, by optimizer step."""
    ranks = [seen(output, name, rank) for rank in range(devices)]
    micro = [[i for rank in ranks for i in rank[m]] for m in range(len(ranks[0]))]
    starts = range(0, len(micro), accumulated)
    return [[i for part in micro[s : s + accumulated] for i in part] for s in starts]


def check_epochs(batches: list[list[int]]) -> None:
    """At most once an epoch, never on two ranks, and less than one batch left out."""
    assert len(batches) == STEPS
    epochs = [[i for batch in batches[e : e + 4] for i in batch] for e in (0, 4)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 48
        assert SIZE - len(epoch) < BATCH
    assert epochs[0] != epochs[1]


def check_resumes(
    output: Path, *, devices: int, accumulated: int, steps: list[int], workers: list[int]
) -> None:
    for rank in range(devices):
        whole = seen(output, "whole", rank)
        assert len(whole) == STEPS * accumulated
        for step in steps:
            for number in workers:
                rest = seen(output, f"from_{step}_{number}", rank)
                assert rest == whole[step * accumulated :], (rank, step, number)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The numbered images in 9 shards."""
    pytest.importorskip("litdata")
    from consistency.data.shards import write_shards

    folder = tmp_path_factory.mktemp("data") / "shards"
    assert write_shards(Numbered(SIZE), folder, shard_bytes=250, show=False) == SIZE
    return folder


@pytest.mark.slow
def test_one_process_resumes_where_it_was(tmp_path: Path) -> None:
    """Inside an epoch and at its end, with accumulation, with other numbers of workers."""
    given = {"steps": [3, 4, 9], "workers": [0, 2]}
    watch(
        tmp_path,
        devices=1,
        device_batch_size=6,
        save_at=given["steps"],
        workers=given["workers"],
    )
    check_epochs(global_batches(tmp_path, "whole", devices=1, accumulated=2))
    check_resumes(tmp_path, devices=1, accumulated=2, **given)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("files", marks=pytest.mark.slow),
        pytest.param("shards", marks=pytest.mark.slow),
        pytest.param("store", marks=pytest.mark.slow),
    ],
)
def test_two_processes_share_every_epoch_and_resume(
    source: str, shards: Path, tmp_path: Path
) -> None:
    """Also with other numbers of workers, and going on with one process afterwards."""
    places = {"files": None, "shards": str(shards), "store": f"local:{shards}"}
    given = {"stream": places[source], "cache": str(tmp_path / "cache")}
    watch(tmp_path, devices=2, device_batch_size=3, save_at=[3], workers=[0, 1], **given)
    whole = global_batches(tmp_path, "whole", devices=2, accumulated=2)
    check_epochs(whole)
    check_resumes(tmp_path, devices=2, accumulated=2, steps=[3], workers=[0, 1])
    alone = tmp_path / "alone"
    start = str(tmp_path / "3.ckpt")
    watch(alone, devices=1, device_batch_size=None, **{**given, "from": start})
    assert global_batches(alone, "other", devices=1, accumulated=1) == whole[3:]


def test_the_script_tells_its_numbers() -> None:
    source = Numbered(600)
    assert positions.numbers(positions.torch.stack([source[i][0] for i in (0, 599)])) == [0, 599]
