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
from contextlib import contextmanager
from typing import Any, NoReturn

import torch.distributed
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.strategies.launchers import subprocess_script as fabric_launcher
from lightning.pytorch.strategies.launchers import subprocess_script as pytorch_launcher

from consistency.command import ROOT, given_options, quoted
from consistency.orphans import end_with
from consistency.runtime import interrupt, meeting
from consistency.runtime.meeting import GRACE
from consistency.runtime.ranks import PARENT, here, is_started_here

RENDEZVOUS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _job_command(local_rank: int) -> tuple[list[str], str]:
    interrupt.hold()  # until `Ranks.watch`, when all are started
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
        """Has all processes of the job told where one of these dies, which may be before it has met the others."""
        interrupt.let_go()
        self.started = started
        if isinstance(meeting.current, meeting.Host):
            meeting.current.near = self
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            for local in range(1, len(self.started) + 1):
                status = self.started[local - 1].poll()
                if status is not None and (status < 0 or status in (1, 2)):
                    # Its own words, where it has left any, are on their way.
                    if not self._over.wait(1.0):
                        name = self._name(local)
                        end = meeting.End(name, self.account(name), 1, near=True)
                        meeting.current.report(end)
                    return

    def _name(self, local: int) -> str:
        return f"rank {here().node * (len(self.started) + 1) + local}"

    def has(self, name: str) -> bool:
        """Whether a rank was started here."""
        return name in map(self._name, range(1, len(self.started) + 1))

    def account(self, name: str) -> str:
        """What became of a rank that was started here and has ended, in a message."""
        names = map(self._name, range(1, len(self.started) + 1))
        process = dict(zip(names, self.started, strict=True))[name]
        try:
            status = process.wait(5.0)
        except subprocess.TimeoutExpired:
            return self.expected(f"{name} is lost")
        fate = f"ended with status {status}"
        if status < 0:
            fate = f"was killed by {signal.Signals(-status).name}"
        return self.expected(f"{name} {fate}")

    def expected(self, got: str) -> str:
        """The message about ranks that do not work together any more."""
        return (
            f"expected {len(self.started) + 1} processes that work together\n  got: {got}\n"
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


HANGS = "no answer within trainer.strategy.timeout"


def _leave_quietly() -> NoReturn:
    """Lost the others: the process that started this one knows why and says so. Where that one hangs, ends it."""
    _close()
    parent, until = int(os.environ[PARENT]), time.monotonic() + GRACE
    while (
        os.getppid() == parent and time.monotonic() < until and not meeting.current.ended.is_set()
    ):
        time.sleep(0.1)
    if os.getppid() != parent or meeting.current.ended.is_set():
        os._exit(1)
    print(
        f"error: expected rank 0 to go on\n  got: {HANGS}\n"
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

    Where another rank has died, hangs or has ended the job, raises UserError with its reason; those that were started
    here end as well, at the latest `GRACE` seconds later.
    """
    launched_here = here().launcher == "" and not is_started_here()
    ranks, patience = Ranks(), GRACE
    before = {name: os.environ.get(name) for name in (*RENDEZVOUS, PARENT)}
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
        meeting.current.leaving.set()
        if _is_lost_connection(error):
            if is_started_here():
                _leave_quietly()
            lost = meeting.current.account(ranks.expected(f"one that hangs, {HANGS}"))
            meeting.current.failed(lost)
            raise lost from error
        meeting.current.failed(error)
        raise
    finally:
        if launched_here:
            _close()
            ranks.end(patience)
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _close() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
