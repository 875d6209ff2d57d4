"""What Ctrl-C does to a command: the first ends it in good order, the second at once, neither with a stack trace.

Processes that a command starts by multiprocessing leave Ctrl-C to it, and it ends them. A rank that another process has
started ends without a line: that one speaks for it.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from consistency.runtime.ranks import is_started_here

STOPPED = 130
"""The status of a command that Ctrl-C has ended."""

SAME = 0.3
"""Seconds in which a launcher passes on what the terminal has sent already: that is one Ctrl-C."""

DEAF = 2.0
"""Seconds after which a process that cannot notice, because it waits in other code than Python's, is ended."""


AGAIN = "stopped at once by another Ctrl-C"


class Interrupted(SystemExit):
    """The end of a command by Ctrl-C."""


def _nothing() -> None:
    pass


class _Listener:
    """What has come, and what is to be done about it."""

    def __init__(self) -> None:
        self.first = 0.0
        self.noticed = threading.Event()
        self.raises = False
        self.note: Callable[[], None] | None = None
        self.last_words: Callable[[], None] = _nothing

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.noticed.set()
        now = time.monotonic()
        if self.first:
            if now - self.first > SAME:
                self.exit(AGAIN)
            return
        self.first = now
        if self.note is not None:
            self.note()
        elif self.raises:
            for child in multiprocessing.active_children():
                child.kill()
            raise Interrupted(STOPPED)
        else:
            self.exit("stopped by Ctrl-C")

    def watch(self, signals: int) -> None:
        """Sees every signal as it comes, whatever the main thread does."""
        first = 0.0
        while content := os.read(signals, 64):
            for _ in range(content.count(signal.SIGINT)):
                now = time.monotonic()
                if first and now - first > SAME:
                    self.exit(AGAIN)
                first = first or now
                if self.note is None:
                    threading.Thread(target=self._end_if_deaf, daemon=True).start()
        os.close(signals)

    def _end_if_deaf(self) -> None:
        if not self.noticed.wait(DEAF):
            self.exit("stopped by Ctrl-C")

    def exit(self, words: str) -> None:
        """Ends the process at once."""
        say(words)
        self.last_words()
        os._exit(STOPPED)


_listener = _Listener()


def say(text: str) -> None:
    """One line to the person who watches. Python's own streams refuse what a signal's handler writes while they write."""
    if not is_started_here():
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


def is_worker() -> bool:
    """Whether multiprocessing has started this process; also true while it still imports the script of the command."""
    return multiprocessing.current_process().name != "MainProcess"


def listen() -> None:
    """Takes Ctrl-C over, for a process that is nothing but a command."""
    if is_worker():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _listener.handle)
        # The first to be registered is the last to be called: from there on Python itself ends.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextmanager
def stoppable(last_words: Callable[[], None]) -> Iterator[None]:
    """Around a command: the first Ctrl-C raises `Interrupted` in it, the second ends the process; before one ends it
    otherwise than by `Interrupted`, it calls `last_words`.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is signal.SIG_IGN:
        yield
        return
    _listener.first = 0.0
    _listener.noticed.clear()
    _listener.raises, _listener.last_words = True, last_words
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGINT, _listener.handle)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listener.watch, args=(reading,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGINT, before)
        os.close(writing)
        _listener.raises, _listener.note, _listener.last_words = False, None, _nothing


def hold() -> None:
    """Keeps Ctrl-C back until `let_go`, here and in the processes that are started meanwhile: a new one would answer with
    a stack trace, before it has imported anything of ours.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def let_go() -> None:
    """Lets Ctrl-C come, also one that was kept back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def held() -> Iterator[None]:
    """Around what starts processes by multiprocessing."""
    hold()
    try:
        yield
    finally:
        let_go()


def call_instead(note: Callable[[], None] | None) -> None:
    """From now on the first Ctrl-C calls `note` and raises nothing, for who acts on it later; None: as before."""
    _listener.note = note


def _leave_it_to_the_parent() -> None:
    if signal.getsignal(signal.SIGINT) == _listener.handle:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


os.register_at_fork(after_in_child=_leave_it_to_the_parent)
