"""A container without a home: what cannot be kept is not needed."""

import json
import os
import pwd
from pathlib import Path

import pytest

from conftest import NO_CURVES, TINY, Run
from consistency.runtime import files

NOWHERE = ["/proc", "/dev/null/x", None]


def environment(monkeypatch: pytest.MonkeyPatch, home: str | None, **more: str) -> None:
    for name in ("HOME", *files.BASES):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    given = more if home is None else {"HOME": home, **more}
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def unknown(*_: object) -> None:
    raise KeyError("no such user")


@pytest.mark.parametrize("home", NOWHERE)
def test_without_a_home_caches_go_to_a_folder_that_can_be_written(
    home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, home)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    files.settle_caches()
    folders = {os.environ[name] for name in files.BASES}
    assert len(folders) == 1
    (folder,) = folders
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert files.cache_folder() == Path(folder, "consistency")
    assert Path.home() == Path(home or folder)
    Path(folder).rmdir()


def test_a_home_that_can_be_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, str(tmp_path / "home"))
    files.settle_caches()
    assert not any(name in os.environ for name in files.BASES)
    assert list(tmp_path.iterdir()) == []
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "consistency"


def test_only_what_cannot_be_written_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, str(tmp_path), XDG_CACHE_HOME="/proc/cache")
    files.settle_caches()
    assert "XDG_CONFIG_HOME" not in os.environ
    Path(os.environ["XDG_CACHE_HOME"]).rmdir()


@pytest.mark.slow
def test_a_reference_that_cannot_be_kept_measures_the_same(
    verb: Run, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, place in (("kept", str(tmp_path / "cache")), ("not_kept", "/proc/cache")):
        monkeypatch.setenv("CONSISTENCY_CACHE", place)
        output = tmp_path / name
        given = ["num_samples=16", "samplers=[onestep]", "weights=ema", "logger=none"]
        outcome = verb("evaluate", f"checkpoint={trained['ect']}", "evaluation.extractor=classifier", *given, f"output={output}")  # fmt: skip
        assert outcome.status == 0, outcome.err
        assert outcome.out.count("not kept for the next time") == (name == "not_kept")
        (result,) = json.loads((output / "evaluation.json").read_text())["results"]
        found.append({key: value for key, value in result.items() if key != "seconds"})
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_run_without_a_home_trains_measures_and_says_nothing_of_it(
    process: Run, tmp_path: Path
) -> None:
    """With W&B, matplotlib and a reference, as a process of its own: libraries look for a home when they are imported."""
    tiny = [a for a in TINY if not a.startswith(("logger=", "callbacks.evaluation=", NO_CURVES))]
    given = ["evaluation@callbacks.evaluation=classifier", "callbacks.evaluation.seeds=[0]", "callbacks.evaluation.num_samples=16"]  # fmt: skip
    output = tmp_path / "run"
    outcome = process(
        "train", *tiny, *given, "trainer.max_steps=1", f"output={output}", HOME="/proc", WANDB_MODE="offline"
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "matplotlib" not in outcome.err
    assert (output / "evaluation.json").is_file() and (output / "curves.png").is_file()
