"""Paths as people give them."""

import os
from pathlib import Path


def expanded(text: str) -> str:
    """The text of a path: what has exactly this name, if it exists; else ~ at the front is the home folder."""
    return text if os.path.lexists(text) else os.path.expanduser(text)


def path_of(given: str | os.PathLike[str]) -> Path:
    """The path that a person means."""
    return Path(expanded(os.fspath(given)))
