"""The place of a process among others: read as Lightning reads it, and refused where the numbers contradict each other."""

import os
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from conftest import Run
from consistency.errors import UserError
from consistency.runtime import rendezvous
from consistency.runtime.ranks import PARENT, require_alone, require_launched, this_launch

SRUN = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NAME": "train",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "2",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
}
SALLOC = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "t", "SLURM_JOB_ID": "1"}
ALL = {*SRUN, *TORCHRUN, *SALLOC, "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", PARENT}  # fmt: skip


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher has started this process."""
    for name in ALL:
        monkeypatch.delenv(name, raising=False)


def put(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("env", "kind"),
    [
        ({}, LightningEnvironment),
        ({"NODE_RANK": "1"}, LightningEnvironment),
        ({"NODE_RANK": "1", "LOCAL_RANK": "1"}, LightningEnvironment),
        ({"GROUP_RANK": "1"}, LightningEnvironment),
        (SRUN, SLURMEnvironment),
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, LightningEnvironment),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, LightningEnvironment),
        (TORCHRUN, TorchElasticEnvironment),
        (SRUN | TORCHRUN, TorchElasticEnvironment),
    ],
)
def test_the_place_is_the_one_that_lightning_finds(
    env: dict[str, str], kind: type[ClusterEnvironment], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, env)
    kinds = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment)
    found = next((k for k in kinds if k.detect()), LightningEnvironment)
    assert found is kind
    theirs, ours = kind(), this_launch()
    if (
        kind is LightningEnvironment
    ):  # what the strategy does, with two processes on each of two machines
        theirs.set_global_rank(theirs.node_rank() * 2 + theirs.local_rank())
        theirs.set_world_size(4)
    assert ours.global_rank(2) == theirs.global_rank()
    assert (ours.node, ours.local) == (theirs.node_rank(), theirs.local_rank())
    assert ours.processes in (None, theirs.world_size())
    assert ours.first == (theirs.global_rank() == 0)
    if kind is not LightningEnvironment:
        assert ours.processes == 4


def test_a_further_rank_is_told_from_the_process_that_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(monkeypatch, {PARENT: str(os.getpid()), "LOCAL_RANK": "0", "WORLD_SIZE": "2"})
    assert this_launch().first
    put(monkeypatch, {PARENT: "1", "LOCAL_RANK": "1"})
    assert not this_launch().first


@pytest.mark.parametrize(
    ("env", "devices", "nodes", "said"),
    [
        (SALLOC, 2, 1, ["SLURM_NTASKS=2", "no SLURM_PROCID", "srun python", "unset SLURM_NTASKS"]),
        (SALLOC, 1, 1, ["srun python"]),
        (SALLOC | {"SLURM_NTASKS": "1"}, 2, 1, ["srun python"]),
        (SRUN, 4, 2, ["4 x 2 = 8 processes", "SLURM_NTASKS=4", "devices=2", "srun --nodes=2"]),
        (SRUN, 2, 1, ["2 x 1 = 2", "4, started by srun"]),
        (SRUN, 4, 1, ["num_nodes=2", "num_nodes=1"]),
        (TORCHRUN, 3, 2, ["3 x 2 = 6", "WORLD_SIZE=4", "torchrun --nnodes=2 --nproc_per_node=3"]),
        ({"NODE_RANK": "1"}, 1, 1, ["NODE_RANK=1", "num_nodes=2"]),
        ({}, 1, 2, ["MASTER_ADDR, MASTER_PORT and NODE_RANK"]),
        ({"LOCAL_RANK": "2"}, 2, 1, ["LOCAL_RANK=2", "devices=2"]),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, 2, 1, ["mpi4py"]),
    ],
)
def test_numbers_that_contradict_the_launcher_are_refused_by_name(
    env: dict[str, str],
    devices: int,
    nodes: int,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(monkeypatch, env)
    with pytest.raises(UserError) as caught:
        require_launched(devices, nodes, "trainer.")
    for words in said:
        assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("env", "devices", "nodes"),
    [
        ({}, 2, 1),
        (SRUN, 2, 2),
        (SRUN, None, 2),
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}, 1, 1),
        (SALLOC | {"SLURM_JOB_NAME": "interactive"}, 2, 1),
        (SALLOC | {"SLURM_NTASKS": "1"}, 1, 1),
        (TORCHRUN, 2, 2),
        ({"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 1, 2),
    ],
)
def test_numbers_that_agree_are_taken(
    env: dict[str, str], devices: int | None, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, env)
    require_launched(devices, nodes)


@pytest.mark.parametrize("verb_name", ["train", "evaluate"])
def test_python_without_srun_in_an_allocation_is_told_what_to_type(
    verb_name: str, verb: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, SALLOC)
    outcome = verb(verb_name)
    assert outcome.status == 2
    assert "srun python" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("verb_name", "devices"), [("train", "trainer.devices=2"), ("evaluate", "devices=2")]
)
def test_a_device_count_that_the_launcher_overrules_is_refused(
    verb_name: str, devices: str, verb: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    put(monkeypatch, SRUN | alone)
    outcome = verb(verb_name, devices)
    assert outcome.status == 2
    assert f"{devices.partition('=')[0]} x" in outcome.err
    assert "SLURM_NTASKS=1" in outcome.err
    assert not list(Path.cwd().iterdir())


def test_a_command_of_one_process_is_not_done_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, SRUN)
    with pytest.raises(UserError, match="4, started by srun"):
        require_alone("sample")
    # The script of a SLURM job, outside of srun, is one process.
    put(monkeypatch, {"SLURM_PROCID": "0"})
    require_alone("sample")


def test_a_sweep_in_every_process_of_a_launcher_is_refused(
    verb: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, TORCHRUN)
    monkeypatch.setattr(rendezvous, "tried", True)  # nobody else is there to be told
    outcome = verb("train", "-m", "optimizer.lr=1e-3,2e-3")
    assert outcome.status == 2
    assert "leave torchrun out" in outcome.err
    assert not list(Path.cwd().iterdir())
