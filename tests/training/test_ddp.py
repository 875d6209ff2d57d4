"""Two real processes, over gloo or on two GPUs over NCCL: the same values on both ranks, one folder a job, alone and inside a sweep."""

import json
from pathlib import Path

import pytest
import torch

from conftest import BEGINS_WITH, ROOT, TINY, Run
from consistency.checkpoints.load import load
from consistency.checkpoints.ours import read

TWO = [
    *TINY,
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.log_every_n_steps=1",
    "trainer.max_steps=3",
    "mode=ct",
    "mode.rate=constant",
    "+callbacks.probe._target_=probe.RankProbe",
    "+callbacks.probe.folder=${output}",
]


def check(run: Path) -> dict[str, object]:
    first, second = (json.loads((run / f"rank_{r}.json").read_text()) for r in (0, 1))
    assert first["same"] == second["same"]
    for mine, other in zip(first["images"], second["images"], strict=True):
        assert len(mine) == len(other) == 4
        assert not set(mine) & set(other)
    assert load(run).card.role == "consistency"
    return first["same"]


@pytest.mark.slow  # test_launchers.py holds the same
def test_two_processes_train_alone(process: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = process("train", *TWO, f"output={run}", PYTHONPATH=str(ROOT / "tests" / "support"))
    assert outcome.status == 0, outcome.err
    assert check(run)["k"] == 3
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and p.name != "process_cwd"] == ["run"]


TWO_GPUS = pytest.param(
    "gpu",
    "ct",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    ],
)


ON_TWO_CPUS = [pytest.param("cpu", mode, marks=pytest.mark.slow) for mode in ("ct", "tcm", "sct", "meanflow")]  # fmt: skip


@pytest.mark.parametrize(("accelerator", "mode"), [*ON_TWO_CPUS, TWO_GPUS])
def test_two_processes_train_as_one(
    accelerator: str, mode: str, process: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    """Over gloo or NCCL, the same batch: but for rounding, in float32 without TF32."""
    given = [option for option in TWO if "probe" not in option]
    given += [f"trainer.accelerator={accelerator}", "float32_matmul=highest", f"mode={mode}"]
    if mode in BEGINS_WITH:
        given += [f"teacher={trained[BEGINS_WITH[mode]]}"]
    states = []
    for devices in (1, 2):
        run = tmp_path / str(devices)
        outcome = process("train", *given, f"trainer.devices={devices}", f"output={run}")
        assert outcome.status == 0, outcome.err
        states.append(read(run / "checkpoints" / "last.ckpt")["state_dict"])
    one, two = states
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_inside_a_sweep(process: Run, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    outcome = process(
        "train",
        "-m",
        *TWO,
        "optimizer.lr=1e-3,2e-3",
        f"output={sweep}",
        PYTHONPATH=str(ROOT / "tests" / "support"),
    )
    assert outcome.status == 0, outcome.err
    folders = sorted(p for p in sweep.iterdir() if p.is_dir())
    assert [p.name for p in folders] == ["0_lr-0.001", "1_lr-0.002"]
    assert [check(p)["lr"] for p in folders] == [1e-3, 2e-3]
    assert not list((tmp_path / "process_cwd").iterdir())


@pytest.mark.slow
def test_two_processes_measure_as_one(process: Run, tmp_path: Path) -> None:
    """Nobody waits for anybody, with two sets of weights and uneven shares, and numbers of images that no network made do
    not depend on the number of processes.
    """
    tiny = [a for a in TWO if "evaluation=null" not in a and "probe" not in a]
    short = [
        "callbacks.evaluation.seeds=[0]",
        "callbacks.evaluation.batch_size=449",
        "callbacks.checkpoint.monitor=auto",
        "callbacks.evaluation.weights=[ema,online]",
        "callbacks.evaluation.num_samples=101",
        "callbacks.evaluation.every_n_train_steps=1",
        "callbacks.checkpoint.every_n_train_steps=1",
        "trainer.max_steps=2",
    ]
    found = []
    for devices in (1, 2):
        run = tmp_path / str(devices)
        outcome = process("train", *tiny, *short, f"trainer.devices={devices}", f"output={run}")
        assert outcome.status == 0, outcome.err
        found.append(json.loads((run / "evaluation.json").read_text())["results"])
        assert (run / "checkpoints" / "best.ckpt").is_file()
        assert outcome.out.count("Evaluation at step") == 2
        assert set(found[-1]) == {
            "train_images",
            "noise",
            "one_step/ema",
            "two_steps/ema",
            "one_step/online",
            "two_steps/online",
        }
    for name in ("train_images", "noise"):
        for field, value in found[0][name].items():
            assert found[1][name][field] == pytest.approx(value, rel=1e-6), (name, field)
