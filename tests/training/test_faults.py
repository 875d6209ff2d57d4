"""Faults and signals, put into runs on purpose: what goes on, what stops, how it ends, and what is left."""

import csv
import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import NO_CURVES, REPORT, ROOT, TINY, Run
from consistency.checkpoints import ours
from consistency.checkpoints.load import load
from consistency.checkpoints.ours import read
from consistency.runtime import files
from consistency.training.loggers import MetricsFile

SAME = ["mode=ct", "mode.total_steps=30", "data.device_batch_size=4"]
LONG = [*SAME, "trainer.max_steps=3000"]
"""A run with two micro-batches a step, far from its end."""


def probe(kind: str, **arguments: object) -> str:
    """The override that puts a fault of tests/support/probe.py into a run."""
    given = "".join(f", {name}: {value}" for name, value in arguments.items())
    return f"+callbacks.{kind.lower()}={{_target_: probe.{kind}{given}}}"


def last(run: Path, name: str = "last") -> dict[str, Any]:
    """A checkpoint of a run, read as a resumed run would: it must agree with its checksum."""
    path = run / "checkpoints" / f"{name}.ckpt"
    assert files.checksum_path(path).is_file()
    return read(path)


def tensors(content: Any) -> Iterator[Tensor]:
    """All tensors of a checkpoint, in order."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from tensors(value)


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether weights, target, averages and optimizer are the same to the bit."""
    names = ("state_dict", "callbacks", "optimizer_states")
    pairs = [(list(tensors(one[n])), list(tensors(other[n]))) for n in names]
    return all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in pairs
    )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of three steps, of which `LONG` is a longer one."""
    from consistency.commands import cli, train

    output = tmp_path_factory.mktemp("three") / "run"
    arguments = [*TINY, *SAME, "trainer.max_steps=3", f"output={output}"]
    before, sys.argv = sys.argv, [str(ROOT / "src" / "train.py"), *arguments]
    try:
        cli.run("train", train.train)
    finally:
        sys.argv = before
    return output


# Signals


@pytest.mark.parametrize("batch", [pytest.param(4, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    name: str,
    status: int,
    batch: int,
    verb: Run,
    three: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Sent in the first or second half of step 3, it leaves the state of an undisturbed run of three steps."""
    run, handlers = tmp_path / "run", (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in handlers]
    start, output = time.perf_counter(), f"output={run}"
    outcome = verb("train", *TINY, *LONG, output, probe("Signal", name=name, batch=batch))
    assert outcome.status == status, outcome.err
    assert outcome.err.count(name) == 1
    assert f"{name}: stopped after step k=3; checkpoint: {run}" in outcome.err
    assert "Traceback" not in outcome.err
    content = last(run)
    assert content["k"] == content["global_step"] == 3
    assert same_state(content, last(three))
    with (run / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    assert [signal.getsignal(number) for number in handlers] == before
    record_property(
        REPORT,
        f"{name} in micro-batch {batch + 1}, two a step: status {status}, checkpoint of k=3 as in a run of three steps; "
        f"{time.perf_counter() - start:.1f} s with start and end",
    )


def test_without_checkpoints_a_signal_still_ends_the_run(verb: Run, tmp_path: Path) -> None:
    arguments = ["callbacks.checkpoint=null", f"output={tmp_path / 'run'}"]
    tiny = [a for a in TINY if "callbacks.checkpoint" not in a]
    outcome = verb("train", *tiny, *arguments, probe("Signal", name="SIGTERM", batch=1))
    assert outcome.status == 143
    assert "stopped after step k=2; no checkpoint of it: callbacks.checkpoint=null" in outcome.err


@pytest.mark.slow
def test_under_slurm_the_job_is_queued_again(
    verb: Run, three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Lightning, once our checkpoint is written; never in the middle of a step."""
    run, asked = tmp_path / "run", tmp_path / "asked"
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nls {run}/checkpoints >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    slurm = {"JOB_ID": 7, "JOB_NAME": "t", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for key, value in {**slurm, "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    output = f"output={run}"
    outcome = verb("train", *TINY, *LONG, output, probe("Signal", name="SIGUSR1", batch=4))
    assert outcome.status == 138, outcome.err
    words = asked.read_text().split()
    assert words[:2] == ["requeue", "7"]
    assert "last.ckpt" in words
    assert same_state(last(run), last(three))


# Disks and folders


@pytest.mark.parametrize(
    ("place", "code", "fails"),
    [
        pytest.param("open", errno.EROFS, [2], marks=pytest.mark.slow),
        ("save", errno.ENOSPC, [2]),
        ("fsync", errno.ENOSPC, [2]),
        pytest.param("replace", errno.EROFS, [2], marks=pytest.mark.slow),
        pytest.param("save", errno.ENOSPC, [2, 3], marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    place: str,
    code: int,
    fails: list[int],
    verb: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run says so in a line and goes on; where the last one of the run fails, it ends in one error."""
    owner, name = {
        "open": (Path, "open"),
        "save": (torch, "save"),
        "fsync": (os, "fsync"),
        "replace": (Path, "replace"),
    }[place]
    write, real = ours.write, getattr(owner, name)
    saved: list[int] = []

    def counted(content: dict[str, Any], path: Path) -> None:
        saved.append(content["k"])
        write(content, path)

    def failing(*arguments: Any, **options: Any) -> Any:
        ours = owner is not Path or "next.ckpt" in str(arguments[0])
        if ours and len(saved) in fails:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    run = tmp_path / "run"
    arguments = ["callbacks.checkpoint.every_n_train_steps=2", "trainer.max_steps=6"]
    with monkeypatch.context() as patch:
        patch.setattr(ours, "write", counted)
        patch.setattr(owner, name, failing)
        outcome = verb("train", *TINY, *arguments, f"output={run}")
    assert saved == [2, 4, 6]
    assert "the checkpoint of step k=4 could not be written: [Errno" in outcome.err
    assert outcome.err.count(os.strerror(code)) == len(fails)
    if len(saved) in fails:
        assert outcome.status == 2
        assert outcome.err.count("error:") == 1
        assert "expected to write the last checkpoint" in outcome.err
        assert last(run)["k"] == 2
    else:
        assert outcome.status == 0, outcome.err
        assert (last(run)["k"], last(run, "previous")["k"]) == (6, 2)
    assert not list(run.rglob("*.part"))


class FullOnce(io.BytesIO):
    """A file of which one write finds no room, and the later ones do."""

    mode = name = "wb"

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.made = number, 0

    def write(self, data: Any) -> int:
        self.made += 1
        if self.made == self.number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_told_as_one_wherever_it_is_met() -> None:
    """Not as what torch makes of it."""
    content = {"weights": torch.zeros(100), "more": torch.zeros(200)}
    whole = FullOnce(0)
    ours.save(content, whole)
    assert whole.made > 10
    for number in range(1, whole.made + 1):
        with pytest.raises(OSError) as caught:
            ours.save(content, FullOnce(number))
        assert caught.value.errno == errno.ENOSPC


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("until", [5, None])
def test_a_disk_that_runs_full(until: int | None, verb: Run, small_disk: Path) -> None:
    """For a while: everything is written in the end. For good: one error, and the checkpoint of before."""
    run = small_disk / "run"
    arguments = [
        "callbacks.checkpoint.every_n_train_steps=2",
        "callbacks.samples.every_n_train_steps=2",
        "trainer.max_steps=8",
        f"output={run}",
        probe("Fill", folder=small_disk, batch=3, until="null" if until is None else until),
    ]
    outcome = verb("train", *TINY, *arguments)
    assert "k=4 could not be written: [Errno 28] No space left on device" in outcome.err
    assert "the picture of step k=4 could not be written" in outcome.err
    assert load(run).card.role == "consistency"
    with (run / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(step) for step in range(8)]
    if until is None:
        assert outcome.status == 2
        assert outcome.err.count("error:") == 1
        assert last(run)["k"] == 2
    else:
        assert outcome.status == 0, outcome.err
        assert (last(run)["k"], last(run, "previous")["k"]) == (8, 6)


def test_a_file_system_that_becomes_read_only(verb: Run, small_disk: Path) -> None:
    run = small_disk / "run"
    arguments = ["callbacks.checkpoint.every_n_train_steps=2", "trainer.max_steps=6"]
    outcome = verb(
        "train", *TINY, *arguments, f"output={run}", probe("Seal", folder=small_disk, batch=3)
    )
    assert outcome.status == 2
    assert outcome.err.count("error:") == 1
    assert "Read-only file system" in outcome.err
    assert last(run)["k"] == 2


def test_a_folder_that_is_removed_is_made_again(verb: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["callbacks.checkpoint.every_n_train_steps=2", "trainer.max_steps=6"]
    removed = probe("Remove", folder=run, batch=3)
    outcome = verb("train", *TINY, *arguments, f"output={run}", removed)
    assert outcome.status == 0, outcome.err
    assert "error" not in outcome.err
    assert (last(run)["k"], last(run, "previous")["k"]) == (6, 4)
    with (run / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "4", "5"]
    assert (run / "samples" / "latest.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        ["metrics.csv"],
        ["curves.png", "evaluation.json", "samples/step_00000001.png"],
    ],
)
def test_what_is_not_the_model_never_stops_a_run(
    wrong: list[str], verb: Run, tmp_path: Path
) -> None:
    """Rows, or curves, pictures and the table, each of which finds a folder in its place."""
    run = tmp_path / "run"
    arguments = [
        f"callbacks.evaluation.cache={tmp_path / 'cache'}",
        "callbacks.evaluation.seeds=[0]",
        "callbacks.evaluation.batch_size=449",
        "callbacks.samples.every_n_train_steps=1",
        "trainer.max_steps=2",
        probe("Obstruct", folders=[str(run / name) for name in wrong], batch=0),
    ]
    tiny = [a for a in TINY if a not in ("callbacks.evaluation=null", NO_CURVES)]
    outcome = verb("train", *tiny, *arguments, f"output={run}")
    assert outcome.status == 0, outcome.err
    assert "in the features of classifier: not FID" in outcome.out
    assert last(run)["k"] == 2
    for name in wrong:
        assert re.search(rf"warning: .* could not be written.*\b{re.escape(name)}", outcome.err), (
            name
        )
    assert (run / "samples" / "step_00000002.png").is_file()


def test_rows_wait_for_a_disk_and_none_stays_by_half(small_disk: Path) -> None:
    file, filler = small_disk / "metrics.csv", small_disk / "filler"
    logger = MetricsFile(path=str(file))
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    with filler.open("wb", buffering=0) as disk, pytest.raises(OSError):
        while True:
            disk.write(bytes(4096))
    for step in range(1, 400):
        logger.log_metrics({"loss": step / 7}, step=step)
    assert file.read_text().endswith("\n")
    assert 1 < len(file.read_text().splitlines()) < 399
    filler.unlink()
    logger.log_metrics({"loss": 0.0, "quality": 2.0}, step=400)
    logger.finalize("success")
    with file.open(newline="") as rows:
        assert [int(row["step"]) for row in csv.DictReader(rows)] == list(range(401))


def test_a_logger_that_fails_ends_the_run_in_one_message(verb: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["callbacks.checkpoint.every_n_train_steps=2", "trainer.max_steps=6"]
    unsteady = "+logger.unsteady={_target_: probe.Unsteady, step: 4}"
    outcome = verb("train", *TINY, *arguments, unsteady, f"output={run}")
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert "OSError: [Errno 5] Input/output error: 'somewhere'" in outcome.err
    assert last(run)["k"] == 4


# Steps that are not finite


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_leaves_the_checkpoint_of_before(
    kind: str,
    verb: Run,
    three: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """In the second half of step 4; the state kept is that of an undisturbed run of three steps."""
    run = tmp_path / "run"
    parameter = "online.network.time_embed.0.weight"
    fault = {
        "loss": [
            "+parts.weighting.poisoned={_target_: probe.Poisoned, calls: [7]}",
            "mode.weighting=poisoned",
        ],
        "gradient": [probe("Exploding", parameter=parameter, batch=7)],
    }[kind]
    outcome = verb("train", *TINY, *LONG, f"output={run}", *fault)
    assert outcome.status == 2
    assert "in the term ConsistencyObjective at step k=3, t=" in outcome.err
    if kind == "gradient":
        assert re.search(
            rf"t=[\d.]+ to [\d.]+, in {parameter.rpartition('.')[0].removeprefix('online.')}\n",
            outcome.err,
        )
    content = last(run)
    assert content["k"] == 3
    assert same_state(content, last(three))
    record_property(REPORT, outcome.err[outcome.err.index("error:") :].strip())
