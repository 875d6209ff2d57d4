"""Two real processes and their loaders: a signal, a death, a hang or an error of one is the end of all, told once."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import REPORT, ROOT, TINY
from consistency.checkpoints.ours import read
from consistency.commands import cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

TWO = [
    *TINY,
    "mode=ct",
    "mode.total_steps=1000",
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.log_every_n_steps=1",
    "trainer.max_steps=1000000",
    "data.device_batch_size=2",
    "data.num_workers=1",
    "callbacks.checkpoint.every_n_train_steps=5",
    "mode.rate=constant",
]
Report = Callable[[str, object], None]


@dataclass
class Running:
    """A command that runs, with all its processes told by a mark in their environment."""

    main: subprocess.Popen[bytes]
    mark: str
    run: Path

    def processes(self) -> dict[int, str]:
        """The command lines of those that live."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        words = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                        found[int(entry.name)] = words.decode()
            except OSError:
                continue
        return found

    def rank(self, number: int) -> int:
        """The process of a rank; its loader has the same command line and another parent."""
        if number == 0:
            return self.main.pid
        (found,) = (
            pid
            for pid, line in self.processes().items()
            if f"hydra.job.name=rank{number}" in line
            and f"PPid:\t{self.main.pid}\n" in Path(f"/proc/{pid}/status").read_text()
        )
        return found

    def training(self) -> "Running":
        """Once it trains and has saved."""
        until = time.monotonic() + 120
        while not (self.run / "checkpoints" / "previous.ckpt").is_file():
            assert self.main.poll() is None, self.err
            assert time.monotonic() < until, self.err
            time.sleep(0.1)
        assert len(self.processes()) >= 4
        return self

    def fail_once(self) -> None:
        """Has a checkpoint fail, because a folder stands where it would be written."""
        obstacle, until = self.run / "checkpoints" / "next.ckpt.part", time.monotonic() + 60
        while not obstacle.is_dir():
            assert time.monotonic() < until
            with suppress(FileExistsError):
                obstacle.mkdir()
        while "could not be written: [Errno 21]" not in self.err:
            assert time.monotonic() < until, self.err
            time.sleep(0.1)
        obstacle.rmdir()

    @property
    def err(self) -> str:
        return self.run.with_suffix(".err").read_text()

    def ended(self, within: float) -> tuple[int, float]:
        """Status of the first rank, and the seconds until the last process was gone."""
        start = time.monotonic()
        status = self.main.wait(within)
        while left := self.processes():
            assert time.monotonic() - start < within, left
            time.sleep(0.1)
        return status, time.monotonic() - start


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """started("trainer.max_steps=3", ...) begins a run of two processes in a group of their own."""
    inside = {cli.INSIDE, "HYDRA_FULL_ERROR"}
    own = {name: value for name, value in os.environ.items() if name not in inside}
    begun: list[Running] = []

    def start(*arguments: str) -> Running:
        mark, run = f"mark-{uuid.uuid4()}", tmp_path / "run"
        with run.with_suffix(".out").open("wb") as out, run.with_suffix(".err").open("wb") as err:
            main = subprocess.Popen(
                [sys.executable, str(ROOT / "src" / "train.py"), *TWO, *arguments, f"output={run}"],
                cwd=tmp_path,
                env={
                    **own,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT / "tests" / "support"),
                    "MARK": mark,
                },
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        begun.append(Running(main, mark, run))
        return begun[-1]

    yield start
    for running in begun:
        for pid in running.processes():
            os.kill(pid, signal.SIGKILL)
        running.main.wait()


def k_of(run: Path) -> int:
    """The step of the last checkpoint, which must agree with its checksum."""
    k = read(run / "checkpoints" / "last.ckpt")["k"]
    assert isinstance(k, int)
    return k


@pytest.mark.parametrize(
    ("name", "status", "receiver"),
    [
        pytest.param("SIGTERM", 143, "rank 1", marks=pytest.mark.slow),
        ("SIGUSR1", 138, "all processes"),
        pytest.param("SIGINT", 130, "all processes", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_ranks_at_the_same_step(
    name: str, status: int, receiver: str, started: Callable[..., Running], record_property: Report
) -> None:
    """To the other rank alone, or to the whole group with the loaders, as a scheduler or a terminal sends it.

    In the second case a write of the first rank has failed before, which must not bring the ranks out of step.
    """
    running = started().training()
    number = signal.Signals[name]
    if receiver == "rank 1":
        os.kill(running.rank(1), number)
    else:
        running.fail_once()
        os.killpg(running.main.pid, number)
    ended, seconds = running.ended(within=60)
    assert ended == status, running.err
    assert "Traceback" not in running.err
    (k,) = re.findall(rf"{name}: stopped after step k=(\d+); checkpoint: ", running.err)
    assert running.err.count(name) == 1
    content = read(running.run / "checkpoints" / "last.ckpt")
    assert content["k"] == int(k)
    progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert progress["ready"] == 2 * int(k)
    record_property(
        REPORT,
        f"{name} to {receiver} of two: status {ended}, checkpoint of the step, all processes gone after {seconds:.1f} s",
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_rank_is_the_end_of_all(
    rank: int, started: Callable[..., Running], record_property: Report
) -> None:
    running = started().training()
    os.kill(running.rank(rank), signal.SIGKILL)
    ended, seconds = running.ended(within=60)
    assert k_of(running.run) % 5 == 0
    if rank == 0:
        assert ended == -signal.SIGKILL
    else:
        assert ended == 2, running.err
        assert running.err.count("rank 1 was killed by SIGKILL") == running.err.count("error:") == 1
    assert "Traceback" not in running.err
    record_property(
        REPORT, f"SIGKILL of rank {rank} of two: all processes gone after {seconds:.1f} s"
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_the_end_of_all(
    rank: int, started: Callable[..., Running], record_property: Report
) -> None:
    timeout = 30.0
    running = started(f"trainer.strategy.timeout.minutes={timeout / 60}").training()
    os.kill(running.rank(rank), signal.SIGSTOP)
    _, seconds = running.ended(within=timeout + 60)
    assert running.err.count("error:") == 1, running.err
    assert "no answer within trainer.strategy.timeout" in running.err
    assert "Traceback" not in running.err
    assert k_of(running.run) % 5 == 0
    record_property(
        REPORT,
        f"rank {rank} of two stands still, timeout {timeout:.0f} s: all processes gone after {seconds:.1f} s",
    )


@pytest.mark.slow
@pytest.mark.parametrize("user", [True, False])
def test_an_error_of_one_rank_alone_is_told(user: bool, started: Callable[..., Running]) -> None:
    running = started(
        f"+callbacks.loud={{_target_: probe.Loud, user: {str(user).lower()}, batch: 30, rank: 1}}"
    )
    ended, _ = running.ended(within=120)
    assert ended == 2
    assert running.err.count("error:") == 1, running.err
    if user:
        assert "error: expected quiet\n  got: noise\n  on: rank 1" in running.err
        assert "Traceback" not in running.err
    else:
        assert running.err.count("ValueError: a bug") == 1
        assert "rank 1 ended with status 1" in running.err
    assert not list(running.run.glob(".rank_*"))
