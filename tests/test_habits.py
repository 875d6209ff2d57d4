"""What people expect of a project: continuous integration, pre-commit, citation, issue forms, versions, Windows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml

from configurations import composed
from conftest import ROOT
from consistency import __main__ as report
from consistency.runtime.files import commit
from consistency.training import build as training
from consistency.training.callbacks.overfit import Overfit

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
POSIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
POSIX_NAMES = {
    "os": ("fork", "getuid", "killpg", "register_at_fork", "set_blocking", "uname"),
    "signal": ("SIGKILL", "SIGUSR1", "alarm", "pthread_sigmask"),
}


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def locked(package: str) -> str:
    """The version of a package in requirements.lock."""
    found = re.search(rf"^{package}==([0-9.]+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert found is not None
    return found[1]


def test_github_runs_what_ci_runs() -> None:
    job = read(".github/workflows/ci.yml")["jobs"]["test"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    pythons = job["strategy"]["matrix"]["python"]
    assert bounds == f">={pythons[0]},<3.{int(pythons[-1].split('.')[1]) + 1}"


def test_pre_commit_has_the_locked_ruff() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"].endswith("/ruff-pre-commit")
    assert repository["rev"] == f"v{locked('ruff')}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_image_installs_the_locked_packages() -> None:
    """The pins that the Dockerfile takes for a CPU are all of the lock but CUDA's."""
    text = (ROOT / "Dockerfile").read_text()
    commands = re.findall(r"sed -n '(.*?)' requirements.lock .*?grep -Ev '(.*?)'", text, re.S)
    ((pattern, left_out),) = commands
    call = ["sed", "-n", pattern, str(ROOT / "requirements.lock")]
    pins = subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()
    names = re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.M)
    assert [pin.split("==")[0] for pin in pins] == names
    kept = [pin for pin in pins if not re.match(left_out, pin)]
    assert any(pin.startswith("torch==") for pin in kept)
    assert not any(pin.startswith(("nvidia", "cuda", "triton")) for pin in kept)
    assert "ARG DEVICE=cpu" in text


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = read("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["references"][0]["url"].endswith("2303.01469")


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_issue_forms_ask_for_the_version(form: Any) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(content)
    identities = [part["id"] for part in content["body"]]
    assert len(set(identities)) == len(identities)
    for part in content["body"]:
        assert part["type"] in ("input", "textarea")
        assert part["attributes"]["label"]
    assert "python -m consistency --version" in form.read_text()


def test_the_version_names_what_a_report_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["consistency", "--version"])
    report.main()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(report.PACKAGES) < set(lines)
    assert lines["torch"] == locked("torch")
    assert lines["python"].startswith(sys.version.split()[0])
    assert str(commit() or "unknown") in lines["consistency"]
    assert "CPU" in lines
    assert report.installed("no-such-package") == "not installed"


def test_presets_of_debug_are_short_and_local() -> None:
    for name in ("fast", "overfit", "profile"):
        config = composed("train", f"debug={name}")
        assert config.trainer.max_steps <= 2000
        assert list(config.logger) == ["csv"]
        training.require_taken(config.trainer)
        assert training.build_callbacks(training.expanded(config))
    assert {path.stem for path in (ROOT / "conf" / "debug").glob("*.yaml")} == {
        "fast",
        "overfit",
        "profile",
    }


def test_a_machine_has_settings_of_its_own(tmp_path: Path) -> None:
    """They come after recipe and experiment, and before the command line."""
    (tmp_path / "local").mkdir()
    own = "# @package _global_\ndata: {path: /images, num_workers: 3}\noptimizer: {lr: 0.25}\n"
    (tmp_path / "local" / "default.yaml").write_text(own)
    place = f"hydra.searchpath=[file://{tmp_path}]"
    config = composed("train", place, "data=cifar10", "data.num_workers=5")
    assert (config.data.path, config.data.num_workers, config.optimizer.lr) == ("/images", 5, 0.25)
    assert composed("train", place, "~local", "data=cifar10").data.path != "/images"
    assert "/conf/local/" in (ROOT / ".gitignore").read_text().split()


@pytest.mark.parametrize("falls", [True, False])
def test_overfit_trains_on_one_batch_until_the_loss_has_fallen(
    falls: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = Overfit(share=0.5, window=4)
    trainer: Any = SimpleNamespace(should_stop=False, global_step=0)
    module, first = cast(Any, None), [torch.rand(2, 1, 4, 4), torch.tensor([3, 1])]
    while trainer.global_step < 40 and not trainer.should_stop:
        batch = [torch.rand(2, 1, 4, 4), torch.tensor([0, 0])]
        if trainer.global_step == 0:
            batch = [tensor.clone() for tensor in first]
        callback.on_train_batch_start(trainer, module, batch, 0)
        assert all(map(torch.equal, batch, first))
        loss = torch.tensor(0.9**trainer.global_step if falls else 1.0)
        callback.on_train_batch_end(trainer, module, {"loss": loss})
        trainer.global_step += 1
    callback.on_train_end(trainer, module)
    # The means of windows of 4 fall by 0.9^4 = 0.66: the third is the first below a half.
    assert trainer.global_step == (12 if falls else 40)
    assert ("still above" in capsys.readouterr().out) != falls


def imported(modules: list[str], first: str = "") -> None:
    """Import modules of ours, after others, in a process whose Python has what Windows has of these parts."""
    code = f"""
import importlib, os, signal, sys
# Whatever chooses by the platform when it is imported comes before the platform changes.
{first}
for name in {POSIX_MODULES!r}:
    sys.modules[name] = None
for module, names in {POSIX_NAMES!r}.items():
    for name in names:
        vars(sys.modules[module]).pop(name, None)
sys.platform = "win32"
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_imports_without_posix() -> None:
    names = ["consistency", "consistency.commands", "consistency.__main__"]
    imported(names, "import multiprocessing.connection, shutil, subprocess, tempfile")


@pytest.mark.slow
def test_every_module_imports_without_posix() -> None:
    package = ROOT / "src" / "consistency"
    paths = sorted(path.relative_to(package.parent) for path in package.rglob("*.py"))
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    others = "multiprocessing.connection, torch, torchvision, lightning.pytorch, hydra, wandb, torchmetrics, torch_fidelity, litdata, sklearn.datasets, matplotlib.pyplot, lmdb"
    imported(names, f"import {others}")
