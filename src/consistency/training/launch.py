"""DDP processes under Hydra: one folder a job, the same configuration on every rank, and one end for all of them.

Lightning starts the other ranks by running the command again. Inside a sweep that would be a second sweep; these lines
make it the one job. Where a rank dies or hangs, they say so once and end all of them. What they replace in Lightning is
private, hence lightning is pinned to its minor version and tests hold the behaviour.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.strategies.launchers import subprocess_script as fabric_launcher
from lightning.pytorch.strategies.launchers import subprocess_script as pytorch_launcher

from consistency.command import ROOT, given_options, quoted
from consistency.errors import UserError
from consistency.orphans import end_with

RENDEZVOUS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PARENT = "_CONSISTENCY_PARENT"

GRACE = 40.0
"""Seconds that the other processes have to end by themselves, once one has; W&B may take most of them."""


def is_child() -> bool:
    """Whether another process started this one as a further rank, or a cluster's launcher started all of them."""
    return os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("RANK", "0") != "0"


def _job_command(local_rank: int) -> tuple[list[str], str]:
    run = HydraConfig.get()
    script = str(ROOT / "src" / f"{run.job.config_name}.py")
    command = [
        sys.executable,
        script,
        "--config-name",
        str(run.job.config_name),
        *given_options(run),
        f"hydra.run.dir={quoted(run.runtime.output_dir)}",
        "hydra.mode=RUN",
        f"hydra.job.name=rank{local_rank}",
    ]
    return command, run.runtime.cwd


class Ranks:
    """The further ranks that this process has started; it answers for all of them."""

    def __init__(self) -> None:
        self.started: Sequence[subprocess.Popen[Any]] = ()
        self._over = threading.Event()

    def watch(self, started: Sequence[subprocess.Popen[Any]]) -> None:
        """Ends everything where one has died and this process, which may wait for it inside a kernel, has not noticed."""
        self.started = started
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            if self._dead() and not self._over.wait(GRACE):
                print(f"error: {self.account()}", file=sys.stderr, flush=True)
                self._kill()
                os._exit(1)

    def _dead(self) -> list[str]:
        """What became of those that ended alone: by a signal, or by an error that is no stop all ranks agreed on."""
        fates = []
        for rank, process in enumerate(self.started, start=1):
            status = process.poll()
            if status is not None and status < 0:
                fates.append(f"rank {rank} was killed by {signal.Signals(-status).name}")
            elif status in (1, 2):
                fates.append(f"rank {rank} ended with status {status}")
        return fates

    def account(self) -> str:
        """Why a connection to another rank was lost, in the words of that rank where it left any; waits a moment for it."""
        until = time.monotonic() + 5
        while not (dead := self._dead()) and time.monotonic() < until:
            time.sleep(0.1)
        for rank in range(1, len(self.started) + 1):
            if _last_words(rank).is_file():
                return f"{_last_words(rank).read_text()}\n  on: rank {rank}"
        got = ", ".join(dead) or "one that hangs, no answer within trainer.strategy.timeout"
        return (
            f"expected {len(self.started) + 1} processes that train together\n  got: {got}\n"
            "  do: look at what it said above and at the memory of the machine; resume= continues the last checkpoint"
        )

    def end(self, seconds: float) -> None:
        """Waits so long for those that are ending, and kills the others."""
        self._over.set()
        until = time.monotonic() + seconds
        for process in self.started:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for rank in range(1, len(self.started) + 1):
            with suppress(OSError):
                _last_words(rank).unlink(missing_ok=True)

    def _kill(self) -> None:
        for process in self.started:
            process.kill()


def _last_words(rank: int) -> Path:
    """Where a rank that alone finds something wrong leaves its message for the first, which speaks for all."""
    return Path(HydraConfig.get().runtime.output_dir) / f".rank_{rank}"


def _wait_for_parent() -> NoReturn:
    """Lost the others: the one that started this process knows why and says so. Where it hangs itself, ends it."""
    parent, until = int(os.environ[PARENT]), time.monotonic() + GRACE
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.1)
    if os.getppid() != parent:
        os._exit(1)
    print(
        "error: expected rank 0 to go on\n  got: no answer within trainer.strategy.timeout\n"
        "  do: look what it waits for; resume= continues the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os.kill(parent, signal.SIGKILL)
    os._exit(1)


def _is_lost_connection(error: Exception) -> bool:
    """Whether it says that another rank does not answer, and nothing about this one."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, RuntimeError) and any(
        n in text for n in ("gloo", "nccl", "distnetwork", "diststore")
    )


@contextmanager
def one_job() -> Iterator[None]:
    """Launches further ranks as this job, and leaves no process and no process group behind for the next job of a sweep.

    Raises UserError on the rank that launched them, where one of them died or hangs; the others then end as well, at the
    latest `GRACE` seconds later.
    """
    launched_here = not any(name in os.environ for name in ("LOCAL_RANK", "WORLD_SIZE"))
    ranks, patience = Ranks(), GRACE
    for launcher in (fabric_launcher, pytorch_launcher):
        launcher._hydra_subprocess_cmd = _job_command  # type: ignore[attr-defined]
        launcher._launch_process_observer = ranks.watch  # type: ignore[attr-defined]
    if launched_here:
        os.environ[PARENT] = str(os.getpid())
    elif PARENT in os.environ:
        end_with(int(os.environ[PARENT]))
    try:
        yield
    except Exception as error:
        patience = 5.0
        if _is_lost_connection(error):
            if ranks.started:
                raise UserError(ranks.account()) from error
            if PARENT in os.environ:
                _close()
                _wait_for_parent()
        if isinstance(error, UserError) and not launched_here and PARENT in os.environ:
            with suppress(OSError):
                _last_words(int(os.environ["LOCAL_RANK"])).write_text(str(error))
        raise
    finally:
        if launched_here:
            _close()
            ranks.end(patience)
            for name in (*RENDEZVOUS, PARENT):
                os.environ.pop(name, None)


def _close() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
