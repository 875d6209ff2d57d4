"""The first Ctrl-C ends a command in good order, the second at once, neither with a traceback.

Processes that a command starts by multiprocessing ignore Ctrl-C; the command ends them.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from consistency.runtime.ranks import PARENT, is_started_here

STOPPED = 130  # exit status of a command that Ctrl-C has ended
SAME_SECONDS = 0.3  # within them a launcher repeats the Ctrl-C of the terminal: both are one
STUCK_SECONDS = 2.0  # after them a process is ended whose main thread is stuck in native code
FIRST, SECOND = "stopped by Ctrl-C", "stopped at once by another Ctrl-C"
PR_SET_PDEATHSIG = 1
MASKS = hasattr(signal, "pthread_sigmask")  # whether signals can be held back: not on Windows


class Interrupted(SystemExit):
    """The end of a command by Ctrl-C."""


def _interrupt() -> None:
    for child in multiprocessing.active_children():
        child.kill()
    raise Interrupted(STOPPED)


class _Handler:
    """The handler of SIGINT and its state."""

    def __init__(self) -> None:
        self.first = 0.0
        self.handled, self.ending = threading.Event(), threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.action: Callable[[], None] = lambda: self.exit(FIRST)
        self.cleanup: Callable[[], None] = lambda: None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.handled.set()
        if not self.first:
            self.first = time.monotonic()
            self.action()
        elif time.monotonic() - self.first > SAME_SECONDS:
            self.exit(SECOND)

    def watch(self, signals: int) -> None:
        """Read every signal from a pipe as it comes, also while the main thread is stuck."""
        first = 0.0
        while content := os.read(signals, 64):
            if signal.SIGINT not in content:
                continue
            now = time.monotonic()
            if not first:
                first = now
                threading.Thread(target=self._end_if_stuck, daemon=True).start()
            elif now - first > SAME_SECONDS:
                self.exit(SECOND)
        os.close(signals)

    def _end_if_stuck(self) -> None:
        if self.action is _interrupt and not self.handled.wait(STUCK_SECONDS):
            self.exit(FIRST)

    def exit(self, text: str) -> None:
        """End the process at once. `watch` and the main thread may both come here: the first one ends it."""
        if self.ending.acquire(blocking=False):
            print_line(text)
            self.cleanup()
            os._exit(STOPPED)


_handler = _Handler()


def print_line(text: str) -> None:
    """Print a line to stderr. Python's own streams refuse it in a handler that interrupts their writing."""
    if not is_started_here():
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


def take_over() -> None:
    """Handle Ctrl-C in a process that is nothing but a command, and end a rank with the process that started it."""
    if multiprocessing.current_process().name != "MainProcess":  # true while a worker imports
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _handler)
            # Registered first, called last: Python itself ends next.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        if is_started_here():
            die_with(int(os.environ[PARENT]))
    unblock()


@contextmanager
def stoppable(cleanup: Callable[[], None]) -> Iterator[None]:
    """Raise `Interrupted` in the body at the first Ctrl-C, and end the process at the second.

    cleanup: called before the process is ended otherwise than by `Interrupted`.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    _handler.handled.clear()
    _handler.first, _handler.action, _handler.cleanup = 0.0, _interrupt, cleanup
    reading, writing = os.pipe()
    if hasattr(os, "set_blocking"):  # Windows, before Python 3.12, needs none
        os.set_blocking(writing, False)
    signal.signal(signal.SIGINT, _handler)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_handler.watch, args=(reading,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGINT, before)
        os.close(writing)
        _handler.reset()


def call_instead(function: Callable[[], None] | None) -> None:
    """Let the first Ctrl-C call a function instead of raising; None restores the exception."""
    _handler.action = function or _interrupt


def block() -> None:
    """Hold Ctrl-C back until `unblock`, here and in new processes, which would print a traceback before `take_over`."""
    if MASKS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def unblock() -> None:
    """Deliver Ctrl-C again, also one that was held back."""
    if MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def blocked() -> Iterator[None]:
    """Hold Ctrl-C back while the body starts processes by multiprocessing."""
    block()
    try:
        yield
    finally:
        unblock()


def die_with(parent: int) -> None:
    """Kill this process when `parent`, which started it, dies (PR_SET_PDEATHSIG; Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _ignore_in_child() -> None:
    if signal.getsignal(signal.SIGINT) is _handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if hasattr(os, "register_at_fork"):  # where processes fork
    os.register_at_fork(after_in_child=_ignore_in_child)
