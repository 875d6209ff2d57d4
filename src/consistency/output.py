"""Folders that a command makes for itself: each is made once, and none stays in which nothing was written."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from consistency.paths import path_of

DATE = "%Y-%m-%d_%H-%M-%S"

_dated: set[str] = set()
_made: list[Path] = []
_claimed: set[Path] = set()


def dated(folder: str, suffix: str = "", *, _root_: DictConfig) -> str:
    """The resolver behind `output` where nobody says it: a path with the date, which `claimed` makes a folder of its own.

    All jobs of a sweep are in one folder, which is made here, before Hydra makes it.
    """
    remembered = OmegaConf.get_cache(_root_)["dated"]
    if (folder, suffix) not in remembered:
        path = f"{folder}/{datetime.now():{DATE}}{suffix}"
        mode: Any = OmegaConf.select(_root_, "hydra.mode")
        if mode is not None and mode.name == "MULTIRUN":
            path = str(_fresh(Path(path)))
        else:
            _dated.add(path)
        remembered[folder, suffix] = path
    return str(remembered[folder, suffix])


def register_dated() -> None:
    """Makes `${dated:<folder>}` known; the same value stands wherever a configuration refers to it."""
    OmegaConf.register_new_resolver("dated", dated, replace=True)


def claimed(output: str, base: Path) -> Path:
    """The path of `output`, relative to `base`; where nobody has said it, a folder that is made now and is no one else's."""
    path = base / path_of(output)
    return _fresh(path) if output in _dated else path


def _fresh(path: Path) -> Path:
    for folder in chain([path], _numbered(path)):
        above = [p for p in (folder.parent, *folder.parent.parents) if not p.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()
            _made.extend([*above[::-1], folder])
            _claimed.add(folder)
            return folder
    raise AssertionError


def _numbered(path: Path) -> Iterator[Path]:
    return (path.with_name(f"{path.name}_{number}") for number in count(2))


def is_claimed(path: Path) -> bool:
    """Whether nobody has said this path, and the same command would get another one."""
    return path in _claimed


def remove_unused() -> None:
    """Removes the folders made here that are still empty."""
    while _made:
        with suppress(OSError):
            _made.pop().rmdir()
