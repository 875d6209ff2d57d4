"""Which of a job's processes this one is, where the first one is, and what the ranks exchange. Imports no torch.

srun, torchrun, jsrun, mpirun or a script of one's own (LOCAL_RANK) start every process of a job. Without a launcher, the
first process of each machine starts the others of that machine; NODE_RANK numbers several machines.
"""

import os
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

from consistency.errors import require

T = TypeVar("T")

# The variable with the id of the process that starts its machine's ranks.
PARENT = "_CONSISTENCY_PARENT"
NOT_SLURM = ("bash", "interactive")  # names of SLURM jobs inside which Lightning ignores SLURM
JSRUN = {"LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_LOCAL_RANK"}
UNSET = "\n      or, for processes without SLURM: unset SLURM_NTASKS"

VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "GROUP_RANK", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NODEID", "SLURM_LOCALID"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "", "", "JSM_NAMESPACE_LOCAL_RANK"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK PMI_RANK",
        "OMPI_COMM_WORLD_SIZE PMI_SIZE",
        "",
        "",
        "OMPI_COMM_WORLD_LOCAL_RANK MPI_LOCALRANKID",
    ),
    "LOCAL_RANK": ("", "WORLD_SIZE", "", "NODE_RANK GROUP_RANK", "LOCAL_RANK"),
    "": ("", "", "", "NODE_RANK GROUP_RANK", "LOCAL_RANK"),
}
"""Variables with the rank, the numbers of processes and machines, and the numbers of this machine and of the process on it."""


@dataclass(frozen=True)
class Launch:
    """The launcher of this process and the ranks in it; None is a number that the launcher does not set."""

    launcher: str  # what started all processes of the job; "" if a process starts the others itself
    rank: int | None
    processes: int | None
    nodes: int | None  # machines
    node: int  # number of its machine
    local: int  # number of the process on that machine

    @property
    def first(self) -> bool:
        """Return whether this is the first process, which decides for all."""
        return self.rank == 0 if self.rank is not None else self.node == self.local == 0

    def global_rank(self, devices: int) -> int:
        """Return the rank, given the number of processes on a machine."""
        return self.node * devices + self.local if self.rank is None else self.rank

    @property
    def started(self) -> str:
        """The number of processes and their launcher, for a message."""
        variable = VARIABLES[self.launcher][1].partition(" ")[0]
        return f"{self.processes}, started by {self.launcher} ({variable}={self.processes})"

    def first_address(self) -> tuple[str, int]:
        """Return address and port of the first process, as Lightning finds them."""
        from lightning.fabric.plugins import environments

        kinds = {"srun": "SLURMEnvironment", "jsrun": "LSFEnvironment", "mpirun": "MPIEnvironment"}
        if self.launcher in kinds:
            environment = getattr(environments, kinds[self.launcher])()
            return environment.main_address, environment.main_port
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        return address, int(os.environ.get("MASTER_PORT", "29500"))


def this_launch() -> Launch:
    """Read how this process was started, from the variables and in the order that Lightning reads them."""
    env = os.environ

    def number(names: str) -> int | None:
        return next((int(env[n]) for n in names.split() if env.get(n, "").isdigit()), None)

    launchers = {
        "": PARENT in env,
        "torchrun": "TORCHELASTIC_RUN_ID" in env,
        "srun": "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in NOT_SLURM,
        "jsrun": set(env) >= JSRUN,
        "mpirun": (number(VARIABLES["mpirun"][1]) or 1) > 1,
        "LOCAL_RANK": "LOCAL_RANK" in env,
    }
    launcher = next((name for name, present in launchers.items() if present), "")
    rank, processes, nodes, node, local = map(number, VARIABLES[launcher])
    is_parent = env.get(PARENT) == str(os.getpid())
    return Launch(launcher, rank, processes, nodes, node or 0, 0 if is_parent else local or 0)


def is_started_here() -> bool:
    """Return whether the first process of this machine started this one; it then prints for it."""
    return os.environ.get(PARENT, str(os.getpid())) != str(os.getpid())


def require_launched(devices: int | None, nodes: int, option: str = "") -> None:
    """Refuse numbers of devices and machines that the launcher contradicts; Lightning would ignore them or wait for ever."""
    launch, env = this_launch(), os.environ
    wanted, started = devices and devices * nodes, launch.processes or 1
    each = started // nodes or 1
    missing = [n for n in ("SLURM_PROCID", "SLURM_NTASKS_PER_NODE") if n not in env]
    alone = started == 1 and (launch.rank is not None or (devices or 1) * nodes == 1)
    require(
        launch.launcher != "srun" or alone or not missing,
        "a process that srun has started with a number of tasks for each machine",
        f"SLURM_NTASKS={started}, but no {' and no '.join(missing)}",
        f"srun {shlex.join(['python', *sys.argv])}, with --ntasks-per-node={devices or each} after srun{UNSET}",
    )
    require(
        launch.launcher != "mpirun" or find_spec("mpi4py") is not None,
        f"the package mpi4py, which connects the {started} processes of mpirun",
        "no such package",
        f"pip install mpi4py; or start one process, which starts the others: {option}devices=<n>",
    )
    lines = {
        "srun": f": srun --nodes={nodes} --ntasks-per-node={devices} ...{UNSET}",
        "torchrun": f": torchrun --nnodes={nodes} --nproc_per_node={devices} ...",
    }
    require(
        wanted is None or launch.processes in (None, wanted),
        f"{option}devices x {option}num_nodes = {devices} x {nodes} = {wanted} processes",
        launch.started,
        f"say {option}devices={each}, or start {wanted} processes{lines.get(launch.launcher, '')}",
    )
    machines = launch.nodes or max(nodes, launch.node + 1)
    source = launch.launcher if launch.nodes else f"NODE_RANK={launch.node}"
    require(
        nodes == machines,
        f"{option}num_nodes={machines}, the number of machines by {source}",
        f"{option}num_nodes={nodes}",
        f"say {option}num_nodes={machines}, or correct {source}",
    )
    require(
        nodes == 1 or launch.launcher not in ("", "LOCAL_RANK") or "MASTER_PORT" in env,
        f"MASTER_ADDR, MASTER_PORT and NODE_RANK, which connect {option}num_nodes={nodes} machines",
        "none of them",
        "set them on every machine: address and a free port of the first, and 0, 1, ... ; or use srun or torchrun",
    )
    require(
        launch.launcher != "LOCAL_RANK" or devices is None or launch.local < devices,
        f"a number of this process below {option}devices={devices}",
        f"LOCAL_RANK={launch.local}",
        f"say {option}devices=<processes of each machine>, or unset LOCAL_RANK",
    )


def require_alone(verb: str) -> None:
    """Refuse to do the same work in every process that a launcher has started."""
    launch = this_launch()
    # The script of a SLURM job, outside of srun, is one process, whatever the number of tasks.
    script = launch.launcher == "srun" and launch.rank == 0 and "SLURM_STEP_ID" not in os.environ
    require(
        launch.processes in (None, 1) or launch.rank is None or script,
        f"one process: {verb}.py starts further ones itself if it can use them (devices=)",
        launch.started,
        f"start it once, without {launch.launcher} or with one process",
    )


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks in torch's process group."""
    import torch.distributed as dist

    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def gathered(value: T) -> list[T]:
    """Return the values of all ranks in their order. Collective: every rank calls it."""
    import torch.distributed as dist

    values = [value] * rank_and_size()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def batches(count: int, batch_size: int) -> list[range]:
    """Return this rank's batches of the numbers below `count`; of all ranks together they are the same for any number
    of ranks that all have a batch, and so are roundings.
    """
    rank, ranks = rank_and_size()
    size = max(1, min(batch_size, count // ranks))
    return [range(first, min(first + size, count)) for first in range(0, count, size)][rank::ranks]


def print_once(line: str) -> None:
    """Print a line on rank 0."""
    if rank_and_size()[0] == 0:
        print(line, flush=True)
