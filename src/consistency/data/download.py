"""Downloads: a limit of patience, and a lock for the processes of a machine."""

import fcntl
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock `file`, which one process of a machine can hold at a time."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
