"""Rendezvous: the processes of a job meet, the first decides, and the end of one is known to all.

Every process holds a connection to the first, which it finds by torch's store at MASTER_ADDR:MASTER_PORT, or by a variable
if another process of the job started it. A connection that closes without a message belongs to a process that was killed.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from queue import Empty, Queue
from typing import Any, TypeVar, cast

from consistency.errors import UserError, require
from consistency.runtime import ranks
from consistency.runtime.ranks import Launch, connected, is_started_here, this_launch
from consistency.runtime.redaction import masked_text
from consistency.runtime.signals import STOPPED, Interrupted

T = TypeVar("T")

ADDRESS = "_CONSISTENCY_RENDEZVOUS"
"""The variable with address, port and token of the first process, for processes started from inside the job."""

# Seconds:
NOTICE = 5.0  # until a process that has not noticed the end of its job is ended
GRACE = 40.0  # until a process that has noticed it is ended; W&B may take most of them
EARLY = 30.0  # that a process that fails before the rendezvous waits to report its error
WAITING = 10.0  # until the first process prints that it waits

# A machine that is gone is noticed after two minutes; the kernel answers for a process that hangs.
KEEP_ALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}

BYE = "bye"
SILENT = """ended without a word, killed or lost
  do: look at its log and at the memory of its machine; resume= continues the last checkpoint"""


@dataclass(frozen=True)
class End:
    """The end of a job: the process that caused it, its message and its exit status."""

    name: str
    message: str
    status: int
    near: bool = False  # whether that process prints to the same terminal

    @property
    def text(self) -> str:
        """The message, on one line if it comes from another terminal."""
        if self.near:
            return self.message
        text = f"{self.name}{' ' if self.message == SILENT else ': '}{self.message}"
        return "; ".join(line.strip() for line in text.splitlines())


class EndedError(UserError):
    """Another process has ended the job; the error has its message."""

    def __init__(self, end: End) -> None:
        super().__init__(end.text)
        self.args = (end,)  # an error is pickled by its arguments
        self.status = STOPPED if end.status == STOPPED else 2


class Rendezvous:
    """The rendezvous of a process that has not met others."""

    patience = NOTICE  # for the reason of a connection that torch has lost

    def __init__(self, name: str = "rank 0") -> None:
        self.name = name
        self.end: End | None = None
        self.ended, self.leaving = threading.Event(), threading.Event()
        self.links: dict[str, Connection] = {}
        self.explain: Callable[[End], End] = lambda end: end
        self.cleanup: Callable[[], None] = lambda: None
        self._closed = False
        self._inbox: Queue[Any] = Queue()
        self._lock = threading.RLock()

    def decided(self, decide: Callable[[], T]) -> T:
        """Return the decision of the first process. Collective: all call, in the same order."""
        return decide()

    def confirm(self) -> None:
        """Agree with the decisions so far; the first process waits until all have agreed."""

    def failed(self, error: BaseException) -> None:
        """Report an error that ends this process, unless it comes from another one or ends all at the same step."""
        self.leaving.set()
        if isinstance(error, EndedError) or not isinstance(error, Interrupted | Exception):
            return
        first = str(error).strip().partition("\n")[0]
        text, status = f"{type(error).__name__}: {first}", 1
        if isinstance(error, UserError):
            text, status = str(error), 2
        elif isinstance(error, Interrupted):
            text, status = "stopped by Ctrl-C", STOPPED
        self.report(End(self.name, masked_text(text), status))

    def report(self, end: End) -> None:
        """Tell all others that the job is over, and see that this process ends as well."""
        with self._lock:
            if self.end is not None:
                return
            self.end = end
            self._send(replace(end, near=False))
        self._inbox.put(end)
        self.ended.set()
        if end.name != self.name:
            threading.Thread(target=self._end_process, daemon=True).start()

    def reason(self, otherwise: UserError) -> UserError:
        """Return the error of the process whose connection was lost, or `otherwise` if it sent none."""
        self.ended.wait(self.patience)
        return otherwise if self.end is None else EndedError(self.end)

    def close(self) -> None:
        """Leave: from now on the end of a process is no error."""
        self._closed = True
        self._send(BYE)

    def forget(self) -> None:
        """Close all connections, in a process that was forked off."""
        for link in self.links.values():
            link.close()

    def _send(self, message: object) -> None:
        with self._lock:
            for link in self.links.values():
                with suppress(OSError):
                    link.send(message)

    def _listen(self, name: str, link: Connection) -> None:
        try:
            while not isinstance(message := link.recv(), End) and message != BYE:
                self._inbox.put(message)
        except (EOFError, OSError):
            message = End(name, SILENT, 1)
        with self._lock:
            self.links.pop(name, None)
            link.close()
        if isinstance(message, End) and self.end is None and not self._closed:
            self.report(self.explain(message))

    def _next(self, seconds: float | None = None) -> Any:
        """Wait for a message; raise the error of one that is the end."""
        try:
            message = self._inbox.get(timeout=seconds)
        except Empty:
            got = f"none in {seconds:.0f} s"
            raise UserError("a decision of rank 0", got, "look what it waits for") from None
        if isinstance(message, End):
            self.leaving.set()
            raise EndedError(message)
        return message

    def _end_process(self) -> None:
        """End this process, if it does not notice by itself that the job is over."""
        assert self.end is not None
        if self.leaving.wait(NOTICE):
            time.sleep(GRACE)
        elif not is_started_here():
            print(f"error: {self.end.text}", file=sys.stderr, flush=True)
        self.cleanup()
        os._exit(EndedError(self.end).status)


class Host(Rendezvous):
    """The rendezvous of the first process."""

    store: Any = None  # torch's, which lives as long as the rendezvous

    def __init__(self, interface: str) -> None:
        super().__init__()
        self.token = secrets.token_hex(16)
        self._others = 0
        self._sent: list[object] = []
        self._server = socket.create_server((interface, 0), backlog=128)
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._admit, args=(connection,), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        with suppress(OSError, EOFError, AuthenticationError), _link(connection) as link:
            deliver_challenge(link, self.token.encode())
            answer_challenge(link, self.token.encode())
            name = link.recv()
            with self._lock:
                for message in self._sent:
                    link.send(message)
                self.links[name] = link
            self._listen(name, link)

    def _send(self, message: object) -> None:
        with self._lock:
            self._sent.append(message)
            super()._send(message)

    def decided(self, decide: Callable[[], T]) -> T:
        value = decide()
        self._send((value,))
        return value

    def gather(self, others: int, seconds: float) -> None:
        """Wait until so many other processes are connected."""
        self._others = others
        start, printed = time.monotonic(), False
        while (missing := others - len(self.links)) > 0 and self.end is None:
            waited = time.monotonic() - start
            if waited > WAITING and not printed:
                printed = True
                text = f"Waiting for {missing} of the {others} other processes of this job, at most"
                print(f"{text} {seconds:.0f} s ...", flush=True)
            require(
                waited < seconds,
                f"{others + 1} processes of this job",
                f"{others + 1 - missing} after {seconds:.0f} s",
                "start all of them: with srun before python, or on every machine; or ask for fewer devices and nodes",
            )
            time.sleep(0.05)
        if self.end is not None:
            raise EndedError(self.end)

    def confirm(self) -> None:
        for _ in range(self._others):
            self._next()

    def close(self) -> None:
        super().close()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # ends `accept`
        self._server.close()

    def forget(self) -> None:
        super().forget()
        self._server.close()


class Guest(Rendezvous):
    """The rendezvous of any other process."""

    patience = GRACE

    def __init__(self, name: str, host: Sequence[Any], seconds: float) -> None:
        super().__init__(name)
        address, port, token = host
        self._seconds = seconds
        self.links["rank 0"] = link = _link(connected(address, port, 0.0))
        try:
            if not link.poll(seconds):
                raise TimeoutError
            answer_challenge(link, token.encode())
            deliver_challenge(link, token.encode())
            link.send(name)
        except (OSError, EOFError, AuthenticationError) as error:
            raise EndedError(End("rank 0", SILENT, 1)) from error
        threading.Thread(target=self._listen, args=("rank 0", link), daemon=True).start()

    def decided(self, decide: Callable[[], T]) -> T:
        return cast(T, self._next(self._seconds)[0])

    def confirm(self) -> None:
        self._send("agreed")


def _link(connection: socket.socket) -> Connection:
    connection.settimeout(None)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
            connection.setsockopt(level, getattr(socket, name), value)
    return Connection(connection.detach())


current = Rendezvous()  # of this process's job
tried = False  # whether this process has looked for the others

os.register_at_fork(after_in_child=lambda: current.forget())


def decided(decide: Callable[[], T]) -> T:
    """Return the decision of the job's first process. Collective: all call, in the same order."""
    return current.decided(decide)


@contextmanager
def joined(devices: int | None, nodes: int, seconds: float, option: str = "") -> Iterator[None]:
    """Join the processes of a job for the time of the body, and report an error that ends it.

    devices, nodes, option: as of `require_launched`.
    seconds: how long the processes wait for each other.
    """
    global current, tried
    tried, launch = True, this_launch()
    ranks.require_launched(devices, nodes, option)
    alone = launch.launcher == "" and nodes == 1 and devices == 1
    if (alone and ADDRESS not in os.environ) or (not alone and launch.processes == 1):
        yield
        return
    current = rendezvous = _met(launch, devices, nodes, seconds)
    try:
        if isinstance(rendezvous, Host):
            # Without a launcher, the other ranks of this machine are started later, from inside the job.
            processes = nodes if launch.launcher == "" else launch.processes
            rendezvous.gather((processes or (devices or 1) * nodes) - 1, seconds)
        yield
    except BaseException as error:
        rendezvous.failed(error)
        raise
    finally:
        rendezvous.close()
        current = Rendezvous()
        if not is_started_here():
            os.environ.pop(ADDRESS, None)


def report_early(error: BaseException, text: str) -> None:
    """Report an error that came before the rendezvous, if others are started that wait for this process."""
    launch = this_launch()
    known = launch.rank is not None and (launch.processes or 1) > 1
    machine = launch.launcher == "" and launch.node > 0 and "MASTER_PORT" in os.environ
    if (known or machine) and not tried and not is_started_here():
        with suppress(UserError), joined(None, launch.nodes or launch.node + 1, EARLY):
            raise UserError(text) from error


def _met(launch: Launch, devices: int | None, nodes: int, seconds: float) -> Rendezvous:
    name = f"rank {launch.global_rank(devices or 1)}"
    if devices is None and launch.rank is None and launch.node > 0:
        name = f"process {launch.local} of machine {launch.node}"
    alone = launch.launcher == "" and nodes == 1
    if not (is_started_here() and ADDRESS in os.environ):
        address, port = ("127.0.0.1", 0) if alone else launch.first_address()
        store: Any = None if alone else launch.store(seconds)
        if alone or launch.first:
            host = Host("127.0.0.1" if alone else "")
            os.environ[ADDRESS] = json.dumps([address, host.port, host.token])
            if store is not None:
                host.store = store
                store.set("first", os.environ[ADDRESS])
            return host
        try:
            os.environ[ADDRESS] = store.get("first").decode()
        except RuntimeError as error:
            lost = str(error).splitlines()[0][:300]
            raise UserError(
                f"the first process of this job at {address}:{port}",
                f"none in {seconds:.0f} s, or a lost connection ({lost})",
                "start it, or look into its log",
            ) from error
    return Guest(name, json.loads(os.environ[ADDRESS]), seconds)
