"""DDP processes under Hydra: one folder a job, the same configuration on every rank, alone and inside a sweep.

Lightning starts the other ranks by running the command again. Inside a sweep that would be a second sweep; these lines
make it the one job. `_hydra_subprocess_cmd` is private, hence lightning is pinned to its minor version and a test holds
the behaviour.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.strategies.launchers import subprocess_script as fabric_launcher
from lightning.pytorch.strategies.launchers import subprocess_script as pytorch_launcher

RENDEZVOUS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_child() -> bool:
    """Whether another process started this one as a further rank, or a cluster's launcher started all of them."""
    return os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("RANK", "0") != "0"


def _job_command(local_rank: int) -> tuple[list[str], str]:
    run = HydraConfig.get()
    script = str(Path(sys.argv[0]).resolve())
    command = [
        sys.executable,
        script,
        "--config-name",
        str(run.job.config_name),
        *run.overrides.task,
        f'hydra.run.dir="{run.runtime.output_dir}"',
        "hydra.mode=RUN",
        f"hydra.job.name=rank{local_rank}",
    ]
    return command, run.runtime.cwd


@contextmanager
def one_job() -> Iterator[None]:
    """Launches further ranks as this job, and leaves no process group behind for the next job of a sweep."""
    launched_here = not any(name in os.environ for name in ("LOCAL_RANK", "WORLD_SIZE"))
    for launcher in (fabric_launcher, pytorch_launcher):
        launcher._hydra_subprocess_cmd = _job_command  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if launched_here:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name in RENDEZVOUS:
                os.environ.pop(name, None)
