"""Paths as people give them, and the root of the project."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def expanded(text: str) -> str:
    """Expand ~ at the front to the home folder, unless a file has exactly this name."""
    return text if os.path.lexists(text) else os.path.expanduser(text)


def path_of(path: str | os.PathLike[str]) -> Path:
    """Return the path that a person means."""
    return Path(expanded(os.fspath(path)))
