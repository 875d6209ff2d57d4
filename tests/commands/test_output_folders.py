"""Output folders: one for each run, none for a command that does not run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from conftest import TINY, Run
from consistency.commands import cli


def test_runs_of_one_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SimpleNamespace(cwd=str(tmp_path), output_dir=str(tmp_path))
    job = SimpleNamespace(mode=RunMode.RUN, runtime=runtime)
    monkeypatch.setattr(cli.HydraConfig, "get", staticmethod(lambda: job))
    config = OmegaConf.create({"output": "${dated:runs}"})
    made = [cli.output_path(config) for _ in range(3)]
    assert made[0].parent == tmp_path / "runs"
    assert [path.name for path in made[1:]] == [f"{made[0].name}_2", f"{made[0].name}_3"]
    (made[1] / "config.yaml").touch()
    cli.remove_unused()
    assert list((tmp_path / "runs").iterdir()) == [made[1]]
    named = OmegaConf.create({"output": "runs/given"})
    assert cli.output_path(named) == tmp_path / "runs" / "given"


@pytest.mark.parametrize(
    "arguments",
    [["--cfg", "job"], pytest.param(["--help"], marks=pytest.mark.slow), ["data.image_size=7"]],
)
def test_what_does_not_run_leaves_no_folder(arguments: list[str], verb: Run) -> None:
    verb("train", *TINY, *arguments)
    assert not list(Path.cwd().iterdir())


def test_a_refused_command_leaves_no_folder_at_its_output(verb: Run, tmp_path: Path) -> None:
    outcome = verb("train", *TINY, "data.image_size=7", f"output={tmp_path / 'a' / 'b'}")
    assert outcome.status == 2
    assert not (tmp_path / "a").exists()
