"""Where libraries and we keep what can be computed or fetched again: below the home folder, or nowhere that lasts."""

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
"""By variable: the folder that it stands for, and one that is made there. Most libraries ask for the first three: torch hub,
Hugging Face, matplotlib, fontconfig, W&B.
"""


def own() -> Path:
    """The folder of what we keep ourselves: downloaded files, references, shards."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "consistency")
    return Path(os.path.expanduser(os.environ.get("CONSISTENCY_CACHE") or default))


def settle() -> None:
    """Points what cannot be written, in a container without a home for example, to a temporary folder that goes with this
    process; those that it starts use the same.
    """
    unwritable = [name for name, place in BASES.items() if not _is_writable(name, *place)]
    if not os.path.isabs(
        os.path.expanduser("~")
    ):  # nobody knows this user, and libraries fail at that
        unwritable.append("HOME")
    if not unwritable:
        return
    with suppress(OSError):  # nowhere at all: what needs a cache says so
        folder = tempfile.mkdtemp(prefix="consistency-")
        atexit.register(_remove, folder, os.getpid())
        os.environ.update(dict.fromkeys(unwritable, folder))


def _is_writable(variable: str, default: str, inside: str) -> bool:
    """Tried, because permissions say little to root and of mounted folders; without leaving anything behind."""
    base = os.path.expanduser(os.environ.get(variable) or default)
    if not os.path.isabs(base):
        return False
    place = Path(base, inside)
    there = next(path for path in (place, *place.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
