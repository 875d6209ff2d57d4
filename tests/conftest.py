"""Fixtures that run the commands, in this process or in a process of their own."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import lightning
import pytest
import sklearn.datasets
import torch
import torchmetrics
import wandb
import yaml
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "consistency"

# The hook compiles anew, past all caches, every package that a module of ours is the first to import.
IMPORTED_FIRST = (lightning, sklearn.datasets, torchmetrics, wandb)
# Arrays are checked at run time in the modules that annotate some; mypy checks the other types.
ANNOTATED = [
    ".".join(file.relative_to(SOURCES.parent).with_suffix("").parts)
    for file in sorted(SOURCES.rglob("*.py"))
    if re.search(r"from (jaxtyping|consistency\.tensors) import", file.read_text())
]
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(ANNOTATED, CHECKER)
MODES = sorted(p.stem for p in (ROOT / "conf" / "mode").glob("*.yaml"))

BEGINS_WITH = {"tcm": "ect"}
"""Modes whose teacher= is no denoiser -> the mode that trains it."""

NO_CURVES = "callbacks.curves=null"  # a second to draw

SHORT = [
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "data.batch_size=8",
    "callbacks.samples.num_samples=4",
    "callbacks.evaluation=null",
    "callbacks.checkpoint.monitor=null",
    NO_CURVES,
]
"""Overrides that make a run on the digits take seconds."""

TINY = [
    *SHORT,
    "model.network.channel_mult=[1,2]",
    "model.network.num_groups=4",
    "model.network.model_channels=8",
    "model.network.num_head_channels=8",
]
"""Overrides that make such a run take one second."""

yaml.SafeLoader = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # of OmegaConf: a third of the time to compose
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job, and all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


Run = Callable[..., Outcome]

REPORT = "report"
"""The property whose texts are printed at the end of a test session."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the reports of tests."""
    for outcome in terminalreporter.getreports("passed"):
        for name, text in outcome.user_properties:
            if name == REPORT:
                terminalreporter.write_line(f"\n{text}")


compose_for_mode = Hydra.get_mode


def hydra_mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """Return `hydra.mode`; only if these options may set it, compose the configuration for it, as Hydra does always."""
    if any(option.startswith(("hydra.mode", "experiment=", "search=")) for option in overrides):
        return compose_for_mode(hydra, config_name, overrides)
    return None


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """verb("train", "mode=ct", ...) runs src/train.py in this process, in an empty folder."""
    from consistency.commands import cli

    home = tmp_path / "cwd"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setattr(Hydra, "get_mode", hydra_mode)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(name: str, *arguments: str) -> Outcome:
        monkeypatch.delenv(cli.INSIDE, raising=False)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", [str(ROOT / "src" / f"{name}.py"), *arguments])
        status = 0
        try:
            cli.run(name, getattr(import_module(f"consistency.commands.{name}"), name))
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture
def convert(verb: Run) -> Run:
    """convert("source=...", ...) runs src/convert.py in this process, in an empty folder."""
    return partial(verb, "convert")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small checkpoint of every format, by the format's name."""
    from tiny_models import write_files

    return write_files(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def process(tmp_path: Path) -> Run:
    """process("train", "mode=ct", ...) runs `python src/train.py` as a process of its own, in an empty folder."""
    from consistency.commands import cli

    home = tmp_path / "process_cwd"
    home.mkdir(exist_ok=True)
    inside = {cli.INSIDE, "HYDRA_FULL_ERROR"}
    own = {name: value for name, value in os.environ.items() if name not in inside}

    def call(name: str, *arguments: str, **environment: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, str(ROOT / "src" / f"{name}.py"), *arguments],
            cwd=home,
            env={**own, **environment},
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a network, and with an empty torch hub."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of two-step runs by mode, trained once: `trained["ect"]`."""
    from consistency.commands import cli, train

    folder, runs = tmp_path_factory.mktemp("trained"), {}
    tiny = [option for option in TINY if option != NO_CURVES]
    for mode in ("edm", "ect", "ct"):
        output = folder / mode
        arguments = [f"mode={mode}", "trainer.max_steps=2", f"output={output}", *tiny]
        before, sys.argv = sys.argv, [str(ROOT / "src" / "train.py"), *arguments]
        try:
            cli.run("train", train.train)
        finally:
            sys.argv = before
        runs[mode] = output
    return runs
