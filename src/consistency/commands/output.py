"""Output folders: each command gets one of its own, and none stays empty."""

from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from consistency.runtime.files import path_of

DATE = "%Y-%m-%d_%H-%M-%S"

_dated: set[str] = set()
_made: list[Path] = []
_claimed: set[Path] = set()


def dated(folder: str, suffix: str = "", *, _root_: DictConfig) -> str:
    """Resolve `${dated:<folder>}`, the default of `output`, to a path with the date; `claimed` makes the folder.

    The value is the same everywhere in a configuration. The folder of a sweep is made here, before Hydra makes it.
    """
    paths = OmegaConf.get_cache(_root_)["dated"]
    if (folder, suffix) not in paths:
        path = f"{folder}/{datetime.now():{DATE}}{suffix}"
        mode: Any = OmegaConf.select(_root_, "hydra.mode")
        if mode is not None and mode.name == "MULTIRUN":
            path = str(_fresh(Path(path)))
        else:
            _dated.add(path)
        paths[folder, suffix] = path
    return str(paths[folder, suffix])


def register_dated() -> None:
    """Register the resolver `dated`."""
    OmegaConf.register_new_resolver("dated", dated, replace=True)


def claimed(output: str, base: Path) -> Path:
    """Return the path of `output`, relative to `base`; make a fresh folder if it is the default."""
    path = base / path_of(output)
    return _fresh(path) if output in _dated else path


def _fresh(path: Path) -> Path:
    """Make a folder that no other process has made, with a number behind its name if need be."""
    above = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = path.with_name(f"{path.name}_{number}") if number > 1 else path
        with suppress(FileExistsError):
            folder.mkdir()
            _made.extend([*above[::-1], folder])
            _claimed.add(folder)
            return folder
    raise AssertionError


def is_claimed(path: Path) -> bool:
    """Return whether a folder was made for the default of `output`; the same command again gets another one."""
    return path in _claimed


def remove_unused() -> None:
    """Remove the folders made here that are still empty."""
    while _made:
        with suppress(OSError):
            _made.pop().rmdir()
