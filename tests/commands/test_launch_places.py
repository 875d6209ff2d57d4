"""The place of a process among others: read as Lightning reads it, and refused where the numbers contradict each other."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import OmegaConf

from conftest import TINY, Run
from consistency.commands import cli
from consistency.commands.cli import require_agreement
from consistency.errors import UserError
from consistency.runtime import rendezvous
from consistency.runtime.ranks import PARENT, require_alone, require_launched, this_launch
from consistency.runtime.rendezvous import SILENT, End, EndedError, Guest, Host

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


# Folders


def test_runs_of_one_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SimpleNamespace(cwd=str(tmp_path), output_dir=str(tmp_path))
    job = SimpleNamespace(mode=RunMode.RUN, runtime=runtime)
    monkeypatch.setattr(cli.HydraConfig, "get", staticmethod(lambda: job))
    cli._dated.add("runs/now")
    config = OmegaConf.create({"output": "runs/now"})
    found = [cli.output_path(config) for _ in range(3)]
    assert [path.name for path in found] == ["now", "now_2", "now_3"]
    (found[1] / "config.yaml").touch()
    cli.remove_unused()
    assert list(tmp_path.rglob("now*")) == [found[1]]
    named = OmegaConf.create({"output": "runs/given"})
    assert cli.output_path(named) == tmp_path / "runs" / "given"


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--help"], ["data.image_size=7"]])
def test_what_does_not_run_leaves_no_folder(arguments: list[str], verb: Run) -> None:
    verb("train", *TINY, *arguments)
    assert not list(Path.cwd().iterdir())


def test_a_refused_command_leaves_no_folder_at_its_output(verb: Run, tmp_path: Path) -> None:
    outcome = verb("train", *TINY, "data.image_size=7", f"output={tmp_path / 'a' / 'b'}")
    assert outcome.status == 2
    assert not (tmp_path / "a").exists()


# The rendezvous


def guest(host: Host, name: str = "rank 1") -> Guest:
    return Guest(name, ["127.0.0.1", host.port, host.token], 5.0)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A first process, none of whose others is ended by force."""
    monkeypatch.setattr(rendezvous.Rendezvous, "_end_process", lambda self: None)
    host = Host("127.0.0.1")
    yield host
    host.close()
    time.sleep(0.2)


def test_all_are_told_what_the_first_decides_also_who_comes_late(host: Host) -> None:
    early = guest(host)
    host.gather(1, 5)
    assert host.decided(lambda: {"folder": "a"}) == {"folder": "a"}
    assert host.decided(lambda: [1, None]) == [1, None]
    for other in (early, guest(host, "rank 2")):
        assert other.decided(lambda: {"folder": "mine"}) == {"folder": "a"}
        assert other.decided(list) == [1, None]
        other.close()
    time.sleep(0.2)
    assert host.end is None
    assert early.end is None


def test_the_words_of_one_reach_all_on_one_line(host: Host) -> None:
    one, other = guest(host), guest(host, "rank 2")
    host.gather(2, 5)
    one.failed(UserError("expected a\n  got: b"))
    assert host.ended.wait(5)
    assert other.ended.wait(5)
    assert host.end == other.end == End("rank 1", "expected a\n  got: b", 2)
    assert str(host.reason(UserError(""))) == "rank 1: expected a; got: b"
    with pytest.raises(EndedError):
        other.decided(lambda: 0)


def test_a_connection_that_ends_without_a_word_is_a_death(host: Host) -> None:
    one, other = guest(host), guest(host, "rank 2")
    host.gather(2, 5)
    with socket.socket(fileno=os.dup(one.links["rank 0"].fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)
    assert other.ended.wait(5)
    assert other.end == End("rank 1", SILENT, 1)
    assert "rank 1 ended without a word, killed or lost; do:" in str(other.reason(UserError("")))


def test_a_process_without_the_token_is_no_guest(host: Host) -> None:
    with pytest.raises(EndedError, match="rank 0 ended"):
        Guest("rank 1", ["127.0.0.1", host.port, "guess"], 5.0)
    with pytest.raises(UserError, match="1 after 0 s"):
        host.gather(1, 0.2)


def test_other_settings_than_those_of_the_first_are_refused_without_telling_values(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "current", host)
    require_agreement(OmegaConf.create({"seed": 0, "data": {"password": "secret"}}))
    other = guest(host)
    assert "secret" not in str(host._sent)
    monkeypatch.setattr(rendezvous, "current", other)
    with pytest.raises(UserError, match="seed=5 on rank 1"):
        require_agreement(OmegaConf.create({"seed": 5, "data": {"password": "secret"}}))


def test_a_process_that_hangs_is_ended_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = threading.Event()
    monkeypatch.setattr(rendezvous, "NOTICE", 0.1)
    monkeypatch.setattr(os, "_exit", lambda status: gone.set())
    rendezvous.Rendezvous("rank 0").report(End("rank 1", SILENT, 1))
    assert gone.wait(5)
    assert "error: rank 1 ended without a word" in capsys.readouterr().err
