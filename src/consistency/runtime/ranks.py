"""The place of this process among the processes of its job, whatever has started them.

srun, torchrun, jsrun, mpirun or a script of one's own (LOCAL_RANK) start every process of a job. Where nobody did, the
first process of each machine starts the others of it: the job is then on one machine, or on several of which each has
been told its number (NODE_RANK). The variables are read in the order in which Lightning reads them.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from consistency.errors import require

PARENT = "_CONSISTENCY_PARENT"
"""The process that starts the other ranks of its machine, by its number."""

NOT_SLURM = ("bash", "interactive")
"""Names of SLURM jobs inside which Lightning takes no notice of SLURM."""


@dataclass(frozen=True)
class Place:
    """Where a process stands: `local` among those of machine number `node`, `rank` among all.

    launcher: what started all processes of the job, or "" where a process starts others itself. rank, processes and
    nodes are None where the launcher does not say them.
    """

    launcher: str = ""
    node: int = 0
    local: int = 0
    rank: int | None = None
    processes: int | None = None
    nodes: int | None = None
    count: str = ""

    @property
    def first(self) -> bool:
        """Whether it is the one that decides for all."""
        return self.rank == 0 if self.rank is not None else self.node == self.local == 0

    def number(self, devices: int) -> int:
        """The rank, with so many processes on a machine."""
        return self.node * devices + self.local if self.rank is None else self.rank


def here(env: Mapping[str, str] = os.environ) -> Place:
    """The place of this process."""

    def number(*names: str) -> int | None:
        return next((int(env[name]) for name in names if env.get(name, "").isdigit()), None)

    node = number("NODE_RANK", "GROUP_RANK") or 0
    if PARENT in env:
        own = env[PARENT] == str(os.getpid())
        return Place("", node, 0 if own else number("LOCAL_RANK") or 0)
    if "TORCHELASTIC_RUN_ID" in env:
        ranks = number("RANK"), number("WORLD_SIZE"), number("GROUP_WORLD_SIZE")
        node = number("GROUP_RANK") or 0
        return Place("torchrun", node, number("LOCAL_RANK") or 0, *ranks, "WORLD_SIZE")
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in NOT_SLURM:
        ranks = number("SLURM_PROCID"), number("SLURM_NTASKS"), number("SLURM_NNODES")
        local = number("SLURM_LOCALID") or 0
        return Place("srun", number("SLURM_NODEID") or 0, local, *ranks, "SLURM_NTASKS")
    if {"LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_LOCAL_RANK"} <= set(env):
        ranks = number("JSM_NAMESPACE_RANK"), number("JSM_NAMESPACE_SIZE"), None
        local = number("JSM_NAMESPACE_LOCAL_RANK") or 0
        return Place("jsrun", 0, local, *ranks, "JSM_NAMESPACE_SIZE")
    size = number("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") or 1
    if size > 1:
        rank = number("OMPI_COMM_WORLD_RANK", "PMI_RANK")
        local = number("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID") or 0
        return Place("mpirun", 0, local, rank, size, None, "the size of its world")
    if "LOCAL_RANK" in env:
        local, processes = number("LOCAL_RANK") or 0, number("WORLD_SIZE")
        return Place("LOCAL_RANK", node, local, None, processes, None, "WORLD_SIZE")
    return Place("", node, 0)


def is_first() -> bool:
    """Whether this process decides and writes, and the others follow."""
    return here().first


def is_started_here() -> bool:
    """Whether the first process of this machine has started this one: it then speaks for it."""
    return os.environ.get(PARENT, str(os.getpid())) != str(os.getpid())


def require_launched(devices: int | None, nodes: int, option: str = "") -> None:
    """Refuses numbers of devices and machines that are not those the launcher has made: Lightning would take the
    launcher's in silence, or wait for ever.

    devices: None where it is not known yet; option: what stands before `devices` and `num_nodes` on the command line.
    """
    place = here()
    if place.launcher == "srun":
        _require_srun(place, devices, nodes)
    require(
        place.launcher != "mpirun" or find_spec("mpi4py") is not None,
        f"the package mpi4py, by which the {place.processes} processes of mpirun know each other",
        "no such package",
        f"pip install mpi4py; or start one process, which starts the others: {option}devices=<n>",
    )
    wanted = None if devices is None else devices * nodes
    if place.processes is not None and wanted is not None:
        each = place.processes // nodes or 1
        require(
            place.processes == wanted,
            f"{option}devices x {option}num_nodes = {devices} x {nodes} = {wanted} processes",
            f"{place.processes}, started by {place.launcher} ({place.count}={place.processes})",
            f"say {option}devices={each}, or start {wanted} processes{_how(place, devices or 1, nodes)}",
        )
    require(
        place.nodes in (None, nodes),
        f"{option}num_nodes={place.nodes}, the machines that {place.launcher} has",
        f"{option}num_nodes={nodes}",
        f"say {option}num_nodes={place.nodes}",
    )
    require(
        place.node < nodes,
        f"a number of this machine below {option}num_nodes={nodes}",
        f"NODE_RANK={place.node}",
        f"say {option}num_nodes={place.node + 1} or more, as on the other machines, or unset NODE_RANK",
    )
    require(
        place.launcher != "LOCAL_RANK" or devices is None or place.local < devices,
        f"a number of this process below {option}devices={devices}",
        f"LOCAL_RANK={place.local}",
        f"say {option}devices=<processes of each machine>, or unset LOCAL_RANK",
    )
    alone = place.launcher in ("", "LOCAL_RANK") and "MASTER_PORT" not in os.environ
    require(
        not alone or nodes == 1,
        f"MASTER_ADDR, MASTER_PORT and NODE_RANK, by which {option}num_nodes={nodes} machines find each other",
        "none of them",
        "set them on every machine: address and a free port of the first, and 0, 1, ... ; or use srun or torchrun",
    )


def _require_srun(place: Place, devices: int | None, nodes: int) -> None:
    line = shlex.join(["python", *sys.argv])
    several = (place.processes or 1) > 1 or (devices or 1) * nodes > 1
    require(
        place.rank is not None or not several,
        f"one of the {place.processes} processes that SLURM is to start (SLURM_NTASKS={place.processes})",
        "a process that srun has not started (no SLURM_PROCID)",
        f"srun {line}\n      or, for processes without SLURM: unset SLURM_NTASKS",
    )
    require(
        (place.processes or 1) == 1 or "SLURM_NTASKS_PER_NODE" in os.environ,
        "SLURM_NTASKS_PER_NODE, which Lightning asks for",
        f"SLURM_NTASKS={place.processes} alone",
        f"say how many on each machine: srun --ntasks-per-node={(place.processes or 1) // nodes or 1} {line}",
    )


def _how(place: Place, devices: int, nodes: int) -> str:
    return {
        "srun": f": srun --nodes={nodes} --ntasks-per-node={devices} ...\n"
        "      or, for processes without SLURM: unset SLURM_NTASKS",
        "torchrun": f": torchrun --nnodes={nodes} --nproc_per_node={devices} ...",
    }.get(place.launcher, "")


def require_alone(verb: str) -> None:
    """Refuses to do the same work in every process that a launcher has started."""
    place = here()
    # In the script of a SLURM job, outside of srun, there is one process, whatever the number of tasks.
    script = place.launcher == "srun" and place.rank == 0 and "SLURM_STEP_ID" not in os.environ
    require(
        (place.processes or 1) == 1 or place.rank is None or script,
        f"one process: {verb}.py starts further ones itself where it can use them (devices=)",
        f"{place.processes}, started by {place.launcher} ({place.count}={place.processes})",
        f"start it once, without {place.launcher} or with one process",
    )
