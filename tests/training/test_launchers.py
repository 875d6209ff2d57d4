"""Two real processes as a launcher starts them, not at the same moment: one job, one folder, one end with its reason."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from conftest import ROOT, TINY, Run
from consistency.checkpoints.ours import read
from consistency.commands import cli
from consistency.commands.train import train

JOB = [
    *TINY,
    "mode=ct",
    "data.flip=true",
    "callbacks.samples=null",
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.max_steps=3",
]
LONG = ["trainer.max_steps=1000000", "callbacks.checkpoint.every_n_train_steps=5"]


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def srun(rank: int) -> dict[str, str]:
    """What srun tells task `rank` of two."""
    return {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


@dataclass
class Job:
    """Two processes, each with a log of its own."""

    home: Path
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def log(self, rank: int) -> str:
        return (self.home / f"log.{rank}").read_text()

    def statuses(self, within: float) -> list[int]:
        """How they ended, all within so many seconds."""
        until = time.monotonic() + within
        return [self.processes[r].wait(max(0.1, until - time.monotonic())) for r in (0, 1)]

    def wait_for(self, path: str) -> None:
        until = time.monotonic() + 120
        while not list(self.home.glob(path)):
            assert time.monotonic() < until
            assert all(p.poll() is None for p in self.processes.values()), self.log(0) + self.log(1)
            time.sleep(0.1)


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(srun, arguments, delay=1.0, order=(1, 0), more={1: [...]}) begins the ranks in that order."""
    inside = {cli.INSIDE, "HYDRA_FULL_ERROR"}
    own = {name: value for name, value in os.environ.items() if name not in inside}
    job = Job(tmp_path / "home")
    job.home.mkdir()

    def begin(
        environment: Callable[[int], dict[str, str]],
        arguments: list[str],
        *,
        verb: str = "train",
        delay: float = 1.0,
        order: tuple[int, ...] = (0, 1),
        more: dict[int, list[str]] | None = None,
    ) -> Job:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        paths = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "support")}
        for number, rank in enumerate(order):
            time.sleep(delay if number else 0)
            given = [*arguments, *(more or {}).get(rank, [])]
            with (job.home / f"log.{rank}").open("wb") as log:
                job.processes[rank] = subprocess.Popen(
                    [sys.executable, str(ROOT / "src" / f"{verb}.py"), *given],
                    cwd=job.home,
                    env=own | paths | meeting | environment(rank),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
        return job

    yield begin
    for process in job.processes.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of the same run in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    arguments = [*(a for a in JOB if a != "trainer=ddp"), f"output={run}"]
    before, sys.argv = sys.argv, [str(ROOT / "src" / "train.py"), *arguments]
    try:
        cli.run("train", train)
    finally:
        sys.argv = before
    return read(run / "checkpoints" / "last.ckpt")["state_dict"]


def require_same(run: Path, alone: dict[str, torch.Tensor]) -> None:
    """The weights of a run are those of one process but for rounding: a step at a rate of 1e-4 is 100 times as large."""
    weights = read(run / "checkpoints" / "last.ckpt")["state_dict"]
    assert weights.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def check(job: Job, alone: dict[str, torch.Tensor], output: Path | None) -> None:
    """Both end well, in one folder, with the weights of one process."""
    assert job.statuses(within=150) == [0, 0], job.log(0) + job.log(1)
    folders = [p for p in job.home.iterdir() if p.is_dir()]
    if output is None:
        assert [p.name for p in folders] == ["runs"]
        (output,) = folders[0].iterdir()
    else:
        assert folders == [output]
    require_same(output, alone)
    assert "Run folder" not in job.log(1)


slow = pytest.mark.slow


@slow
@pytest.mark.parametrize(
    ("delay", "order", "named"),
    [
        (1.0, (1, 0), False),
        (0.0, (0, 1), True),
        (5.0, (0, 1), True),
        (30.0, (0, 1), False),
        (30.0, (1, 0), True),
    ],
)
def test_two_tasks_of_srun_are_one_job(
    delay: float, order: tuple[int, ...], named: bool, start: Start, alone: dict[str, torch.Tensor]
) -> None:
    more = ["output=run"] if named else []
    job = start(srun, [*JOB, "trainer.devices=2", *more], delay=delay, order=order)
    check(job, alone, job.home / "run" if named else None)


@slow
@pytest.mark.parametrize(
    ("delay", "order", "named"),
    [(0.0, (0, 1), False), (5.0, (1, 0), False), (12.0, (0, 1), True), (30.0, (1, 0), True)],
)
def test_two_machines_are_one_job(
    delay: float, order: tuple[int, ...], named: bool, start: Start, alone: dict[str, torch.Tensor]
) -> None:
    more = ["output=run"] if named else []
    arguments = [*JOB, "trainer.devices=1", "trainer.num_nodes=2", *more]
    job = start(lambda rank: {"NODE_RANK": str(rank)}, arguments, delay=delay, order=order)
    check(job, alone, job.home / "run" if named else None)


@slow
@pytest.mark.parametrize("named", [True, False])
def test_the_processes_of_torchrun_are_one_job(
    named: bool, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    more = ["output=run"] if named else []
    command = ["-m", "torch.distributed.run", f"--master_port={free_port()}", "--nproc_per_node=2"]
    script = str(ROOT / "src" / "train.py")
    done = subprocess.run(
        [sys.executable, *command, script, *JOB, "trainer.devices=2", *more],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / "run"] if named else list((tmp_path / "runs").iterdir())
    assert len(folders) == 1
    require_same(folders[0], alone)


@slow
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_run_goes_on_under_srun_where_its_first_start_left_it(
    order: tuple[int, ...], start: Start
) -> None:
    arguments = [*JOB, "trainer.devices=2", "output=run", "resume=auto"]
    for steps, step in ((3, None), (5, 3)):
        job = start(srun, [*arguments, f"trainer.max_steps={steps}"], delay=3.0, order=order)
        assert job.statuses(within=150) == [0, 0], job.log(0) + job.log(1)
        assert read(job.home / "run" / "checkpoints" / "last.ckpt")["k"] == steps
        assert step is None or f"at step {step}" in job.log(0)


@slow
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_tasks_measure_into_one_folder(
    order: tuple[int, ...], start: Start, trained: dict[str, Path]
) -> None:
    arguments = [f"checkpoint={trained['ect']}", "data=digits", "device=cpu", "devices=2", "num_samples=60", "logger=csv", "samplers=onestep", "weights=ema"]  # fmt: skip
    job = start(srun, arguments, verb="evaluate", delay=5.0, order=order)
    assert job.statuses(within=200) == [0, 0], job.log(0) + job.log(1)
    (folder,) = (job.home / "evaluations").iterdir()
    assert (folder / "evaluation.json").is_file()


# Ends


@slow
@pytest.mark.parametrize("rank", [1, 0])
def test_the_death_of_a_task_is_told_by_the_other(rank: int, start: Start) -> None:
    job = start(srun, [*JOB, *LONG, "trainer.devices=2", "output=run"], delay=0.0)
    job.wait_for("run/checkpoints/last.ckpt")
    os.kill(job.processes[rank].pid, signal.SIGKILL)
    begun = time.monotonic()
    statuses = job.statuses(within=30)
    assert time.monotonic() - begun < 10
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] not in (0, -signal.SIGKILL)
    told = job.log(1 - rank)
    assert told.count("error:") == 1, told
    assert f"error: rank {rank} ended without a word, killed or lost; do:" in told
    assert "Traceback" not in told


@slow
@pytest.mark.parametrize(("user", "status"), [(True, 2), (False, 1)])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_task_ends_the_other_with_its_words(
    user: bool, status: int, rank: int, start: Start
) -> None:
    loud = f"+callbacks.loud={{_target_: probe.Loud, user: {str(user).lower()}, batch: 8, rank: {rank}}}"
    job = start(srun, [*JOB, *LONG, loud, "trainer.devices=2", "output=run"], delay=0.0)
    job.processes[rank].wait(150)
    begun = time.monotonic()
    statuses = job.statuses(within=30)
    assert time.monotonic() - begun < 10
    assert (statuses[rank], statuses[1 - rank]) == (status, 2)
    words = "expected quiet; got: noise" if user else "ValueError: a bug"
    assert job.log(1 - rank).rstrip().splitlines()[-1] == f"error: rank {rank}: {words}"


@slow
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({1: ["seed=5"]}, "got: seed=5 on rank 1, and something else on rank 0"),
        ({1: ["sead=5"]}, "Could not override 'sead'"),
        ({0: ["sead=5"]}, "Could not override 'sead'"),
        ({0: ["output=full"], 1: ["output=full"]}, "got: a folder with content"),
    ],
)
def test_a_rank_that_is_refused_at_the_start_is_the_end_of_both(
    more: dict[int, list[str]], words: str, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "home" / "full").mkdir()
    (tmp_path / "home" / "full" / "file").touch()
    job = start(srun, [*JOB, "trainer.devices=2"], delay=5.0, more=more)
    assert job.statuses(within=60) == [2, 2], job.log(0) + job.log(1)
    for rank in (0, 1):
        assert words in job.log(rank)
        assert job.log(rank).count("error:") == 1
    assert not list((tmp_path / "home" / "runs").glob("*"))


@slow
def test_four_runs_of_one_second_have_four_folders(process: Run, tmp_path: Path) -> None:
    home = tmp_path / "process_cwd"
    runs = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "src" / "train.py"), *TINY, "trainer.max_steps=2", f"seed={seed}"],
            cwd=home,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        for seed in range(4)
    ]  # fmt: skip
    assert [run.wait(200) for run in runs] == [0] * 4
    folders = list((home / "runs").iterdir())
    assert len(folders) == 4
    seeds = [f"seed: {seed}\n" for seed in range(4)]
    found = [(folder / "config.yaml").read_text() for folder in folders]
    assert sorted(seed for seed in seeds for text in found if seed in text) == seeds
    for folder in folders:
        assert len((folder / "metrics.csv").read_text().splitlines()) == 3
