"""Check and measure on a GPU: `python tests/tools/gpu.py [option of benchmark.py ...]`, within about eight minutes.

Run the tests marked `gpu`, then the training step of two networks in three modes beside the plain loop, in TF32, and of the
larger one in bfloat16. Write gpu.json and gpu.md below runs/gpu and print the table. Without a GPU print one line and end
with 0: nothing failed, nothing was measured.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from configurations import composed
from consistency.checkpoints import ours
from consistency.runtime.files import ROOT
from consistency.training.build import describe

FOLDER = ROOT / "runs" / "gpu"
SECONDS = 8 * 60
"""Time for all; what has not begun by then is not measured."""

NETWORKS = {
    "ddpmpp_cifar10": ["data=cifar10", "train_batch=128"],
    "adm_imagenet64": ["data=imagenet64", "train_batch=32"],
}
# Beside the recipes: no weights to download, and float32 unless the command line says otherwise.
MODES = {"ct": ["init=null", "mode.distance=l2"], "cd": ["mode.distance=l2"], "ect": ["init=null"]}
PLAIN = ["trainer.precision=32-true", "scaler=null", "model.network.dropout=0.0"]
WINDOWS = ["part=train", "images=512", "windows=3", "seconds=1.5", "logger=none"]
ROWS: dict[str, tuple[str, str, list[str]]] = {
    f"{network} {mode}": (network, mode, ["baseline=plain"])
    for mode in MODES
    for network in NETWORKS
}
for name, compilation in (("bf16", "false"), ("bf16 compiled", "true")):
    half = ["trainer.precision=bf16-mixed", f"compile={compilation}"]
    ROWS[f"adm_imagenet64 ect {name}"] = ("adm_imagenet64", "ect", half)
"""Network, mode and further options of each row of the table."""
MISSING = "not measured"


def random_teacher(options: list[str], path: Path) -> None:
    """Write a checkpoint of a denoiser with random weights, for the speed of a distillation."""
    config = composed("train", "mode=edm", *options)
    card = describe(config)
    network = instantiate(config.model.network, _convert_="all")
    state = {f"online.network.{name}": w for name, w in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    ours.write({"card": card.saved(), "state_dict": state, "callbacks": {}, "k": 0}, path)


def measured(network: str, mode: str, given: list[str], seconds: float) -> dict[str, Any]:
    """Return the benchmark of a row, or the reason why there is none."""
    data, batch = NETWORKS[network]
    options = [data, f"model={network}", f"mode={mode}", batch, *MODES[mode], *PLAIN, *WINDOWS]
    options += given
    if mode == "cd":
        teacher = FOLDER / network / "teacher.ckpt"
        if not teacher.is_file():
            random_teacher([data, f"model={network}"], teacher)
        options += [f"teacher={teacher}", "teacher_weights=online"]
    output = FOLDER / network / f"{mode}_{time.time_ns()}"
    command = [sys.executable, str(ROOT / "src" / "benchmark.py"), *options, f"output={output}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {MISSING: "no time was left"}
    if done.returncode:
        return {MISSING: (done.stderr.strip().splitlines() or ["no message"])[-1]}
    content: dict[str, Any] = json.loads((output / "benchmark.json").read_text())
    return content


def tested() -> dict[str, Any]:
    """Run the tests that need a GPU, several at a time; return their status and last line."""
    began = time.monotonic()
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:benchmark"]  # which warns beside several processes, where it is there
    command += ["--numprocesses", "auto", "--maxprocesses", "6", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    return {"status": done.returncode, "tests": last, "seconds": time.monotonic() - began}


def cell(value: Any) -> str:
    """Return a figure as text, a spread one by its median."""
    value = value.get("median") if isinstance(value, dict) else value
    return f"{value:.4g}" if isinstance(value, float | int) else str(value)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the figures of all pairs, a row each, in the columns that any of them has."""
    plain = {
        pair: {
            k: v for k, v in figures.items() if isinstance(v, float | int | str) or "median" in v
        }
        for pair, figures in results.items()
    }
    named = dict.fromkeys(k for figures in plain.values() for k in figures)
    columns = [k for k in named if not k.startswith(("title", "settings", "machine", "hours"))]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for pair, figures in plain.items():
        lines.append(f"| {pair} | {' | '.join(cell(figures.get(c, '')) for c in columns)} |")
    return "\n".join(lines)


def main(given: list[str]) -> int:
    if not torch.cuda.is_available():
        print("not measured: this machine has no GPU that torch can use")
        return 0
    began, tests = time.monotonic(), tested()
    results = {}
    for row, (network, mode, options) in ROWS.items():
        left = began + SECONDS - time.monotonic()
        results[row] = measured(network, mode, options + given, left)
        print(table({row: results[row]}), flush=True)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    content = {"gpus": names, "torch": torch.__version__, "tests": tests, "benchmarks": results}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "gpu.json").write_text(json.dumps(content, indent=2))
    (FOLDER / "gpu.md").write_text(f"{', '.join(names)}; {tests['tests']}\n\n{table(results)}\n")
    print((FOLDER / "gpu.md").read_text() + f"\nWritten: {FOLDER / 'gpu.json'} and gpu.md")
    return int(bool(tests["status"]) or any(MISSING in figures for figures in results.values()))


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "offline")
    sys.exit(main(sys.argv[1:]))
