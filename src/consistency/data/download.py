"""Download of a public set by its library, or one error that names the missing files and their addresses."""

import fcntl
import socket
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from consistency.errors import UserError

PATIENCE = 30.0
"""Seconds without an answer after which a download fails."""


@contextmanager
def timeout() -> Iterator[None]:
    """Let connections in the body fail after `PATIENCE` seconds without an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def find_or_download(
    root: Path,
    find: Callable[[Path], Path | None],
    download: Callable[[Path], object],
    *,
    allowed: bool,
    needed: str,
    sources: Sequence[str],
) -> Path:
    """Return the folder of a set below `root`; download it, in one process of a machine at a time, if it is missing.

    find: returns the folder, or None.
    download: puts the files below `root`.
    needed, sources: the missing files and their addresses, for the message.
    """
    folder = find(root)
    reason = "no such file" if allowed else "no such file, and data.download=false"
    if folder is None and allowed:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / ".download.lock"), timeout():
                download(root)
            folder = find(root)
        except (OSError, RuntimeError, ValueError, tarfile.TarError) as error:
            last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
            reason = f"no such file, and the download failed ({last_line})"
    if folder is None:
        raise UserError(
            f"{needed} (data.path={root})",
            reason,
            "add data.download=true on a machine with a network, or put the files there from "
            + ", ".join(sources),
        )
    return folder


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock `file`, which one process of a machine can hold at a time."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
