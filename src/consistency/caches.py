"""Folders of caches, ours and the libraries': below the home folder, or temporary if that cannot be written."""

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

BASES = {
    "XDG_CACHE_HOME": ("~/.cache", "consistency"),
    "XDG_CONFIG_HOME": ("~/.config", "matplotlib"),
    "XDG_DATA_HOME": ("~/.local/share", "wandb"),
    "TRITON_HOME": ("~", ".triton"),
}
"""By variable: its default, and a folder made there. torch hub, Hugging Face, fontconfig and others read the first three."""


def own() -> Path:
    """Return the folder of our own cache: downloads, references, shards."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "consistency")
    return Path(os.path.expanduser(os.environ.get("CONSISTENCY_CACHE") or default))


def settle() -> None:
    """Point bases that cannot be written, as in a container without a home, to one temporary folder.

    The folder is removed at the end of this process; processes that it starts share it.
    """
    variables = [name for name, base in BASES.items() if not _is_writable(name, *base)]
    if not os.path.isabs(os.path.expanduser("~")):  # an unknown user, for whom libraries fail
        variables.append("HOME")
    if not variables:
        return
    with suppress(OSError):  # without any writable folder, what needs a cache fails by itself
        folder = tempfile.mkdtemp(prefix="consistency-")
        atexit.register(_remove, folder, os.getpid())
        os.environ.update(dict.fromkeys(variables, folder))


def _is_writable(variable: str, default: str, inside: str) -> bool:
    """Try to write a file: permissions say little to root and of mounted folders."""
    base = os.path.expanduser(os.environ.get(variable) or default)
    if not os.path.isabs(base):
        return False
    folder = Path(base, inside)
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return True
    except OSError:
        return False


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
