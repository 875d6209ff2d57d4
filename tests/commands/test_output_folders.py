"""Output folders: one for each run, none for a command that does not run."""

from pathlib import Path

import pytest

from conftest import TINY, Run
from consistency.commands import output


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    output._dated.add("runs/now")
    found = [output.claimed("runs/now", tmp_path) for _ in range(3)]
    assert [path.name for path in found] == ["now", "now_2", "now_3"]
    (found[1] / "config.yaml").touch()
    output.remove_unused()
    assert list(tmp_path.rglob("now*")) == [found[1]]
    assert output.claimed("runs/given", tmp_path) == tmp_path / "runs" / "given"


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--help"], ["data.image_size=7"]])
def test_what_does_not_run_leaves_no_folder(arguments: list[str], verb: Run) -> None:
    verb("train", *TINY, *arguments)
    assert not list(Path.cwd().iterdir())


def test_a_refused_command_leaves_no_folder_at_its_output(verb: Run, tmp_path: Path) -> None:
    outcome = verb("train", *TINY, "data.image_size=7", f"output={tmp_path / 'a' / 'b'}")
    assert outcome.status == 2
    assert not (tmp_path / "a").exists()
