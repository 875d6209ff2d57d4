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
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from queue import Empty, Queue
from typing import Any, cast

from consistency.errors import UserError, require
from consistency.runtime.ranks import Launch, T, is_started_here, require_launched, this_launch
from consistency.runtime.redaction import masked_text
from consistency.runtime.signals import STOPPED, Interrupted

# The variable with address, port and token of the first process, for processes started from inside the job.
ADDRESS = "_CONSISTENCY_RENDEZVOUS"
# A machine that is gone is noticed after two minutes; the kernel answers for a process that hangs.
KEEP_ALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
# Seconds:
NOTICE = 5.0  # until a process that has not noticed the end of its job is ended
GRACE = 40.0  # until a process that has noticed it is ended; W&B may take most of them
EARLY = 30.0  # that a process that fails before the rendezvous waits to report its error
WAITING = 10.0  # until the first process prints that it waits
SILENT = """ended without a word, killed or lost
  do: look at its log and at the memory of its machine; resume= continues the last checkpoint"""


class EndedError(UserError):
    """The end of a job: the process that caused it, its message and its exit status.

    near: whether that process prints to the same terminal; a message from another one comes on one line.
    """

    def __init__(self, name: str, message: str, cause: int, *, near: bool = False) -> None:
        text = f"{name}{' ' if message == SILENT else ': '}{message}"
        super().__init__(message if near else "; ".join(map(str.strip, text.splitlines())))
        self.name, self.message, self.cause = name, message, cause
        self.status = STOPPED if cause == STOPPED else 2

    def __reduce__(self) -> tuple[type["EndedError"], tuple[str, str, int]]:
        return EndedError, (self.name, self.message, self.cause)


class Rendezvous:
    """The rendezvous of a job's first process, which decides; without an interface it is the only process."""

    name = "rank 0"
    store: Any = None  # torch's, which lives as long as the rendezvous

    def __init__(self, interface: str | None = None) -> None:
        self.end: EndedError | None = None
        self.ended, self.leaving = threading.Event(), threading.Event()
        self.links: dict[str, Connection] = {}
        self.explain: Callable[[EndedError], EndedError] = lambda end: end
        self.cleanup: Callable[[], None] = lambda: None
        self._others, self._closed = 0, False
        self._sent: list[object] = []
        self._inbox: Queue[Any] = Queue()
        self._lock = threading.RLock()
        self._server: socket.socket | None = None
        if interface is not None:
            self._server = socket.create_server((interface, 0), backlog=128)
            self.port, self.token = int(self._server.getsockname()[1]), secrets.token_hex(16)
            threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
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

    def gather(self, others: int, seconds: float) -> None:
        """Wait until so many other processes are connected."""
        self._others = others
        start, printed = time.monotonic(), False
        while (missing := others - len(self.links)) > 0 and not self.ended.wait(0.05):
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
        if self.end is not None:
            raise self.end

    def decided(self, decide: Callable[[], T]) -> T:
        """Return the decision of the job's first process. Collective: all call, in the same order."""
        value = decide()
        self._send((value,))
        return value

    def confirm(self) -> None:
        """Agree with the decisions so far; the first process waits until all have agreed."""
        for _ in range(self._others):
            self._next()

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
        self.report(EndedError(self.name, masked_text(text), status))

    def report(self, end: EndedError) -> None:
        """Tell all others that the job is over, and see that this process ends as well."""
        with self._lock:
            if self.end is not None:
                return
            self.end = end
            self._send(end)
        self._inbox.put(end)
        self.ended.set()
        if end.name != self.name:
            threading.Thread(target=self._end_process, daemon=True).start()

    def close(self) -> None:
        """Leave: from now on the end of a process is no error."""
        self._closed = True
        self._send(None)
        if self._server is not None:
            with suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)  # ends `accept`
            self._server.close()

    def forget(self) -> None:
        """Close all connections, in a process that was forked off."""
        for connection in (*self.links.values(), self._server):
            if connection is not None:
                connection.close()

    def _send(self, message: object) -> None:
        with self._lock:
            self._sent.append(message)
            for link in self.links.values():
                with suppress(OSError):
                    link.send(message)

    def _listen(self, name: str, link: Connection) -> None:
        try:
            while (message := link.recv()) is not None and not isinstance(message, EndedError):
                self._inbox.put(message)
        except (EOFError, OSError):
            message = EndedError(name, SILENT, 1)
        with self._lock:
            self.links.pop(name, None)
            link.close()
        if isinstance(message, EndedError) and self.end is None and not self._closed:
            self.report(self.explain(message))

    def _next(self, seconds: float | None = None) -> Any:
        """Wait for a message; raise the error of one that is the end."""
        try:
            message = self._inbox.get(timeout=seconds)
        except Empty:
            got = f"none in {seconds:.0f} s"
            raise UserError("a decision of rank 0", got, "look what it waits for") from None
        if isinstance(message, EndedError):
            self.leaving.set()
            raise message
        return message

    def _end_process(self) -> None:
        """End this process, if it does not notice by itself that the job is over."""
        assert self.end is not None
        if self.leaving.wait(NOTICE):
            time.sleep(GRACE)
        elif not is_started_here():
            print(f"\nerror: {self.end}", file=sys.stderr, flush=True)  # behind a progress bar
        self.cleanup()
        os._exit(self.end.status)


class Guest(Rendezvous):
    """The rendezvous of any other process."""

    def __init__(self, name: str, host: Sequence[Any], seconds: float) -> None:
        super().__init__()
        address, port, token = host
        self.name, self._seconds = name, seconds
        self.links["rank 0"] = link = _link(_connected(address, port))
        try:
            if not link.poll(seconds):
                raise TimeoutError
            answer_challenge(link, token.encode())
            deliver_challenge(link, token.encode())
            link.send(name)
        except (OSError, EOFError, AuthenticationError) as error:
            raise EndedError("rank 0", SILENT, 1) from error
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


def _connected(address: str, port: int, seconds: float = 0.0) -> socket.socket:
    """Connect to a port of the first process; try again for `seconds`."""
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), timeout=30.0)
        except OSError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.2)


current = Rendezvous()  # of this process's job
tried = False  # whether this process has looked for the others

if hasattr(os, "register_at_fork"):  # where processes fork
    os.register_at_fork(after_in_child=lambda: current.forget())


@contextmanager
def joined(devices: int | None, nodes: int, seconds: float, option: str = "") -> Iterator[None]:
    """Join the processes of a job for the time of the body, and report an error that ends it.

    devices: of a machine, None if not known yet; option: the prefix of `devices` and `num_nodes` on the command line.
    seconds: how long the processes wait for each other.
    """
    global current, tried
    tried, launch = True, this_launch()
    require_launched(devices, nodes, option)
    alone = launch.processes == 1 or (launch.launcher == "" and devices == nodes == 1)
    current = Rendezvous() if alone else _met(launch, devices, nodes, seconds)
    # Without a launcher, the other ranks of this machine are started later, from inside the job.
    processes = nodes if launch.launcher == "" else launch.processes or (devices or 1) * nodes
    try:
        if not isinstance(current, Guest):
            current.gather(processes - 1, seconds)
        yield
    except BaseException as error:
        current.failed(error)
        raise
    finally:
        current.close()
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
    local = launch.launcher == "" and nodes == 1
    address, port = ("127.0.0.1", 0) if local else launch.first_address()
    try:
        if not (is_started_here() and ADDRESS in os.environ):
            store: Any = None if local else _store(launch, address, port, seconds)
            key = f"consistency/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/first"
            if local or launch.first:
                host = Rendezvous("127.0.0.1" if local else "")
                os.environ[ADDRESS] = json.dumps([address, host.port, host.token])
                if store is not None:
                    host.store = store
                    store.set(key, os.environ[ADDRESS])
                return host
            os.environ[ADDRESS] = store.get(key).decode()
        return Guest(name, json.loads(os.environ[ADDRESS]), seconds)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the first process of this job at {address}:{port}, with a free port",
            f"none in {seconds:.0f} s ({str(error).splitlines()[0][:300]})",
            "start it, or look into its log; set MASTER_ADDR and MASTER_PORT to where it is and a free port, "
            "the same on every machine, and open the ports between the machines",
        ) from error


def _store(launch: Launch, address: str, port: int, seconds: float) -> Any:
    """Return torch's store at the first process, or in torchrun; wait `seconds` for it, and for each value."""
    from torch.distributed import TCPStore

    serve = launch.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    if not serve:  # torch prints a stack trace while it waits
        _connected(address, port, seconds).close()
    wait = timedelta(seconds=seconds)
    return TCPStore(address, port, None, serve, wait, wait_for_workers=False, multi_tenant=True)
