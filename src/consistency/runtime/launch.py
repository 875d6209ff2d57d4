"""DDP ranks under Hydra: one folder a job, the same configuration on every rank, and one end for all of them.

Lightning starts the other ranks by running the command again, which inside a sweep would be another sweep; here it is
made the one job. Lightning's functions that are replaced are private: its minor version is pinned and tests hold them.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from lightning.fabric.strategies.launchers import subprocess_script as fabric_launcher
from lightning.pytorch.strategies.launchers import subprocess_script as pytorch_launcher
from omegaconf import OmegaConf

from consistency.errors import UserError
from consistency.runtime import rendezvous, signals
from consistency.runtime.files import ROOT
from consistency.runtime.ranks import PARENT, is_started_here, this_launch
from consistency.runtime.rendezvous import GRACE, NOTICE, SILENT, EndedError, Guest

# Launching ranks sets these variables, which the next job of a sweep must not inherit.
VARIABLES = (
    PARENT, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"
)  # fmt: skip
HANGS = "no answer within trainer.strategy.timeout"


def _rank_command(local_rank: int) -> tuple[list[str], str]:
    """Return the command line of a rank, and its working folder."""
    signals.block()  # until `Ranks.watch`, when all are started
    run = HydraConfig.get()
    options: Any = OmegaConf.to_container(run.overrides.task, resolve=False)
    folder = QuotedString(run.runtime.output_dir, Quote.single).with_quotes()
    verb = str(run.job.config_name)
    script = [sys.executable, str(ROOT / "src" / f"{verb}.py"), "--config-name", verb]
    hydra = ["hydra.mode=RUN", f"hydra.run.dir={folder}", f"hydra.job.name=rank{local_rank}"]
    return [*script, *options, *hydra], run.runtime.cwd


class Ranks:
    """The other ranks, by name, that this process has started; it prints for all of them."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[Any]] = {}
        self._over = threading.Event()

    def watch(self, started: Sequence[subprocess.Popen[Any]]) -> None:
        """Report the end of a rank to the whole job, also before that rank has joined it."""
        signals.unblock()
        first = this_launch().node * (len(started) + 1)
        self.processes = {f"rank {first + i}": p for i, p in enumerate(started, start=1)}
        rendezvous.current.explain = self.explain
        for name, process in self.processes.items():
            threading.Thread(target=self._watch, args=(name, process), daemon=True).start()

    def _watch(self, name: str, process: subprocess.Popen[Any]) -> None:
        status = process.wait()
        # Its own message, if it sent one, is on its way.
        if (status < 0 or status in (1, 2)) and not self._over.wait(1.0):
            rendezvous.current.report(self.explain(EndedError(name, SILENT, 1)))

    def explain(self, end: EndedError) -> EndedError:
        """Return an end with what happened to its process, if that is one of these."""
        if end.name not in self.processes:
            return end
        text, fate = f"{end.message}\n  on: {end.name}", f"ended with status {end.cause}"
        if end.message == SILENT:
            fate = "is lost"
            with suppress(subprocess.TimeoutExpired):
                status = self.processes[end.name].wait(5.0)
                killed = f"was killed by {signal.Signals(-status).name}" if status < 0 else ""
                fate = killed or f"ended with status {status}"
        if end.message == SILENT or end.cause == 1:  # at status 1 its traceback stands above
            text = str(self.lost(f"{end.name} {fate}"))
        return EndedError(end.name, text, end.cause, near=True)

    def lost(self, got: str) -> UserError:
        """Return the error of ranks that do not work together any more."""
        return UserError(
            f"{len(self.processes) + 1} processes that work together",
            got,
            "look at what it said above and at the memory of the machine; resume= continues the last checkpoint",
        )

    def end(self, seconds: float) -> None:
        """Wait so long for the ranks to end, and kill the others."""
        self._over.set()
        until = time.monotonic() + seconds
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
            process.wait()


def _leave_quietly() -> NoReturn:
    """End a rank that lost the others: its parent knows the reason and prints it. End a parent that hangs."""
    _destroy_process_group()
    parent, until = int(os.environ[PARENT]), time.monotonic() + GRACE
    ended = rendezvous.current.ended
    while os.getppid() == parent and not ended.wait(0.1):
        if time.monotonic() > until:
            remedy = "look what it waits for; resume= continues the last checkpoint"
            error = UserError("rank 0 to go on", HANGS, remedy)
            print(f"error: {error}", file=sys.stderr, flush=True)
            os.kill(parent, signal.SIGKILL)
            break
    os._exit(1)


def _is_lost_connection(error: Exception) -> bool:
    """Return whether torch reports that another rank does not answer."""
    text = f"{type(error).__name__} {error}".lower()
    words = ("gloo", "nccl", "distnetwork", "diststore")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


@contextmanager
def one_job() -> Iterator[None]:
    """Launch further ranks as this job; leave no process and no process group to the next job of a sweep.

    Raises the `UserError` of a rank that died, hangs or ended the job. The ranks that were started here end as well, at
    the latest `GRACE` seconds later.
    """
    launches = this_launch().launcher == "" and not is_started_here()
    ranks, job, patience = Ranks(), rendezvous.current, GRACE
    before = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    threads = torch.get_num_threads()
    for launcher in (fabric_launcher, pytorch_launcher):
        launcher._hydra_subprocess_cmd = _rank_command  # type: ignore[attr-defined]
        launcher._launch_process_observer = ranks.watch  # type: ignore[attr-defined]
    if launches:
        os.environ[PARENT] = str(os.getpid())  # a rank dies with it, from `signals.take_over` on
    try:
        yield
    except Exception as error:
        patience = 5.0
        job.leaving.set()
        if not _is_lost_connection(error):
            job.failed(error)
            raise
        if is_started_here():
            _leave_quietly()
        job.ended.wait(GRACE if isinstance(job, Guest) else NOTICE)  # for the reason of another
        reason = job.end or ranks.lost(f"one that hangs, {HANGS}")
        job.failed(reason)
        raise reason from error
    finally:
        if launches:
            _destroy_process_group()
            ranks.end(patience)
            for name in VARIABLES:
                os.environ.pop(name, None)
            os.environ.update(before)
            torch.set_num_threads(threads)  # Lightning gives a process that starts others its share


def _destroy_process_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
