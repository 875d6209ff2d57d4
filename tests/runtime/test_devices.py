"""Processes on one machine share its cores."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from consistency.runtime.devices import chosen_device, share_threads
from consistency.training.module import ConsistencyModule

CPU = torch.device("cpu")


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine of eight cores; the numbers of threads that are set."""
    threads: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    return threads


@pytest.mark.parametrize(("processes", "threads"), [(1, []), (2, [4]), (3, [2]), (16, [1])])
def test_each_process_takes_its_part(
    processes: int, threads: list[int], eight_cores: list[int]
) -> None:
    share_threads(CPU, processes)
    assert eight_cores == threads


def test_a_number_in_the_environment_holds(
    eight_cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    share_threads(CPU, 2)
    share_threads(torch.device("meta"), 2)
    assert eight_cores == []


def test_the_processes_of_a_training_take_theirs(eight_cores: list[int]) -> None:
    strategy = SimpleNamespace(root_device=CPU)
    module: Any = SimpleNamespace(trainer=SimpleNamespace(strategy=strategy, num_devices=4))
    ConsistencyModule.setup(module, "fit")
    assert eight_cores == [2]


@pytest.mark.parametrize(
    ("precision", "capability", "warned"),
    [
        ("bf16-mixed", "avx2", True),
        ("bf16-mixed", "avx512_bf16", False),
        ("bf16-mixed", "sve_bf16", False),
        ("32-true", "avx2", False),
    ],
)
def test_bfloat16_without_its_instructions_is_slow(
    precision: str,
    capability: str,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {"avx2": False, "avx512_bf16": False, "bf16": False} | {capability: True}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: known)
    chosen_device("cpu", precision=precision)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warned
    assert all("bfloat16" in line and "32-true" in line for line in lines)
