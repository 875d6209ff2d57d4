"""Networks on a GPU, and compiled ones on any device, against the numbers of the published code."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compiled
import golden_networks as networks
from conftest import REPORT, ROOT
from golden_harness import FOLDER, Archive

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=gpu)]


@pytest.fixture
def without_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(compiled.GOLDEN))
def test_a_network_on_a_device(
    name: str,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    without_tf32: None,
) -> None:
    """Outputs and gradients with the channels last, in both precisions."""
    load = networks.loaded

    def placed(*arguments: object) -> nn.Module:
        return compiled.placed(load(*arguments), device, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(networks, "loaded", placed)
    archive = Archive(FOLDER / f"{name}.npz")
    compiled.GOLDEN[name](archive)
    assert len(archive.compared) > 5


CHECKS = {
    "golden": ["edm/ddpmpp", "edm/adm"],
    "modes": ["ct", "ect", "ct_continuous"],
    "resume": [],
    "law": ["ct"],
}
"""Golden networks of two kinds; modes with a target, without, and with forward-mode derivatives; a resumed run; a mode of the
oracle, with a target and an N(k) that moves.
"""


def require_near(check: str, device: str, record_property: Any) -> None:
    """Run a comparison of tests/support/compiled.py, and report how near its runs come."""
    script = Path(compiled.__file__)
    done = subprocess.run(
        [sys.executable, str(script), check, device, *CHECKS[check]],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([compiled.PATHS, *sys.path]),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # which trainer.deterministic demands on a GPU
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "tolerance" in line or "apart" in line]
    record_property(REPORT, "\n".join(["compiled:", *lines]))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("check", ["golden", "modes", "resume"])
def test_compiled_networks(check: str, device: str, record_property: object) -> None:
    """Each takes a minute or two of a CPU, mostly for the compiler."""
    require_near(check, device, record_property)


@pytest.mark.slow
def test_compiled_networks_reach_the_same_on_a_law_with_exact_answers(
    record_property: object,
) -> None:
    """Of the plane, whose points the oracle draws on the CPU."""
    require_near("law", "cpu", record_property)
