"""Fetching a public set with its library, or one error that says which file is expected where."""

import fcntl
import socket
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from consistency.errors import UserError

PATIENCE = 30.0
"""Seconds without an answer after which a server is given up."""


@contextmanager
def timeout() -> Iterator[None]:
    """Let connections in the body fail after `PATIENCE` seconds without an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def fetched(
    root: Path,
    fetch: Callable[[Path], object],
    *,
    allowed: bool,
    needed: str,
    sources: Sequence[str],
) -> None:
    """Lets `fetch` put its files below `root`, one process of a machine at a time; it does nothing where they are.

    needed: the files that are missing; sources: the addresses they come from.
    """
    reason = "no such file, and data.download=false"
    if allowed:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with (root / ".download.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with timeout():
                    fetch(root)
            return
        except (OSError, RuntimeError, ValueError, tarfile.TarError) as error:
            reason = (
                f"no such file, and the download failed ({str(error).strip().splitlines()[-1]})"
            )
    raise UserError(
        f"expected {needed} (data.path={root})\n  got: {reason}\n"
        f"  do: add data.download=true on a machine with a network, or put there what is at {', '.join(sources)}"
    )
