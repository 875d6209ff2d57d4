"""Where the processes of a job meet: the first decides, the others are told, and the end of one is known to all.

Every process holds a connection to the first. It carries what was decided and the words of a process that has to end; a
connection that ends without words is a process that was killed or lost. One that stands still keeps its connection, and
is not taken for dead. How the first is found: processes that a launcher has started by torch's store at
MASTER_ADDR:MASTER_PORT, which torch itself uses later; those that another process of the job has started by a variable.
"""

import json
import os
import secrets
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from hashlib import blake2b
from queue import Empty, Queue
from typing import Any, Protocol, TypeVar, cast

from consistency.errors import UserError, require
from consistency.output import remove_unused
from consistency.runtime.interrupt import STOPPED, Interrupted
from consistency.runtime.ranks import Place, here, is_started_here, require_launched

T = TypeVar("T")

ADDRESS = "_CONSISTENCY_MEETING"
"""Where the first process listens, for those that are started from inside the job."""

NOTICE = 5.0
"""Seconds in which a process whose job has ended is to notice it by itself, before it is ended."""

GRACE = 40.0
"""Seconds that a process then has to end by itself; W&B may take most of them."""

EARLY = 30.0
"""Seconds that a process waits for the others to tell them that it ends before they met."""

WAITING = 10.0
"""Seconds after which the first process says for whom it waits."""

SILENT = (
    "ended without a word, killed or lost\n"
    "  do: look at its log and at the memory of its machine; resume= continues the last checkpoint"
)


@dataclass(frozen=True)
class End:
    """Why the job is over: which process ended it, with what words and which status."""

    who: str
    why: str
    status: int
    near: bool = False
    """Whether the process wrote to the same terminal as the one that tells it."""

    @property
    def text(self) -> str:
        """The words, on one line where they come from another log."""
        if self.near:
            return self.why
        if self.why == SILENT:
            words = f"{self.who} {self.why}"
        else:
            words = f"{self.who}: {self.why}"
        return "; ".join(line.strip() for line in words.splitlines())


class EndedError(UserError):
    """Another process has ended the job; the message has its words."""

    def __init__(self, end: End) -> None:
        super().__init__(end.text)
        self.status = STOPPED if end.status == STOPPED else 2


class Meeting:
    """What a process knows of the others; as it stands, of those alone that it has started itself."""

    patience = NOTICE
    """Seconds that it waits for the reason, where a connection of torch was lost."""

    def __init__(self, name: str = "rank 0") -> None:
        self.name = name
        self.words: Callable[[BaseException], str] = str
        self.end: End | None = None
        self.ended, self.leaving = threading.Event(), threading.Event()
        self._lock = threading.RLock()

    def decided(self, decide: Callable[[], T]) -> T:
        """What the first process decides, on every process; all call, in the same order. Plain values only."""
        return decide()

    def confirm(self) -> None:
        """Agrees with what was decided; the first goes on when all that it has waited for do."""

    def failed(self, error: BaseException) -> None:
        """Tells all others of an error that ends this process, unless they know it or end at the same step."""
        self.leaving.set()
        if isinstance(error, Interrupted):
            self.report(End(self.name, "stopped by Ctrl-C", STOPPED))
        elif isinstance(error, UserError) and not isinstance(error, EndedError):
            self.report(End(self.name, self.words(error), 2))
        elif isinstance(error, Exception) and not isinstance(error, EndedError):
            first = str(error).strip().partition("\n")[0]
            self.report(End(self.name, f"{type(error).__name__}: {first}", 1))

    def report(self, end: End) -> None:
        """Tells all others that the job is over, and why."""
        self.conclude(end)

    def conclude(self, end: End) -> None:
        """Takes in that the job is over; where this process does not notice it in a while, ends it."""
        with self._lock:
            if self.end is not None:
                return
            self.end = end
        self.ended.set()
        if end.who != self.name:
            threading.Thread(target=self._end_of_process, daemon=True).start()

    def _end_of_process(self) -> None:
        assert self.end is not None
        if self.leaving.wait(NOTICE):
            time.sleep(GRACE)
        elif not is_started_here():
            print(f"error: {self.end.text}", file=sys.stderr, flush=True)
        remove_unused()
        os._exit(EndedError(self.end).status)

    def account(self, otherwise: str) -> UserError:
        """Why a connection to another process was lost, in its own words; `otherwise` where none come."""
        if self.ended.wait(self.patience) and self.end is not None:
            return EndedError(self.end)
        return UserError(otherwise)

    def close(self) -> None:
        """Leaves; that this process is gone means nothing from now on."""


current: Meeting = Meeting()
"""The meeting of this process's job."""

tried = False
"""Whether this process has looked for the others."""


def decided(decide: Callable[[], T]) -> T:
    """What the first process of the job decides, on every process; all call, in the same order. Plain values only."""
    return current.decided(decide)


# ------------------------------------------------------------------------ the first process


class _Guest(socketserver.StreamRequestHandler):
    """One connection to the first process, as that one sees it."""

    def handle(self) -> None:
        host: Host = cast(_Server, self.server).host
        with suppress(OSError, ValueError):
            hello = json.loads(self.rfile.readline(10_000))
            if not secrets.compare_digest(str(hello["token"]), host.token):
                return
            _keep_alive(self.request)
            host.attend(str(hello["name"]), self.request, self.rfile)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    host: "Host"


class Near(Protocol):
    """The ranks that this process has started, which write to the same terminal."""

    def has(self, name: str) -> bool:
        """Whether it is one of them."""

    def account(self, name: str) -> str:
        """A message with what became of it."""

    def expected(self, got: str) -> str:
        """The message about ranks that do not work together any more."""


class Host(Meeting):
    """The meeting as the first process holds it."""

    def __init__(self, interface: str) -> None:
        super().__init__()
        self.token = secrets.token_hex(16)
        self._told: list[bytes] = []
        self.guests: dict[str, socket.socket] = {}
        self._awaited = 0
        self._agreed: set[str] = set()
        self.near: Near | None = None
        self._server = _Server((interface, 0), _Guest)
        self._server.host = self
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def attend(self, name: str, connection: socket.socket, words: Any) -> None:
        """Listens to one of the others until it is gone."""
        with self._lock:
            self.guests[name] = connection
            for line in self._told:
                connection.sendall(line)
        gone = False
        with suppress(OSError):
            for line in words:
                word = json.loads(line)
                gone = gone or "bye" in word
                if "agrees" in word:
                    self._agreed.add(name)
                if "end" in word:
                    gone = True
                    self._over(End(**word["end"]))
        with self._lock:
            self.guests.pop(name, None)
        if not gone:
            self._over(End(name, SILENT, 1))

    def _over(self, end: End) -> None:
        if self.near is not None and self.near.has(end.who):
            if end.why == SILENT:
                why = self.near.account(end.who)
            elif end.status == 1:  # its trace stands above
                why = self.near.expected(f"{end.who} ended with status 1")
            else:
                why = f"{end.why}\n  on: {end.who}"
            end = End(end.who, why, end.status, near=True)
        self.report(end)

    def decided(self, decide: Callable[[], T]) -> T:
        value = decide()
        self._tell({"decided": value})
        return value

    def report(self, end: End) -> None:
        if self.end is None:
            self._tell({"end": asdict(End(end.who, end.why, end.status))})
        self.conclude(end)

    def _tell(self, word: dict[str, Any]) -> None:
        line = json.dumps(word).encode() + b"\n"
        with self._lock:
            self._told.append(line)
            for connection in self.guests.values():
                with suppress(OSError):
                    connection.sendall(line)

    def gather(self, count: int, seconds: float) -> None:
        """Waits until so many others are there."""
        self._awaited = count
        start, said = time.monotonic(), False
        while len(self.guests) < count and self.end is None:
            waited = time.monotonic() - start
            if waited > WAITING and not said:
                said = True
                print(
                    f"Waiting for {count - len(self.guests)} of the {count} other processes of this job, "
                    f"at most {seconds:.0f} s ...",
                    flush=True,
                )
            require(
                waited < seconds,
                f"{count + 1} processes of this job",
                f"{len(self.guests) + 1} after {seconds:.0f} s",
                "start all of them: with srun before python, or on every machine; or ask for fewer devices and nodes",
            )
            time.sleep(0.05)
        if self.end is not None:
            raise EndedError(self.end)

    def confirm(self) -> None:
        while len(self._agreed) < self._awaited:
            if self.ended.wait(0.02) and self.end is not None:
                raise EndedError(self.end)

    def close(self) -> None:
        self._tell({"bye": True})
        with self._lock:
            for connection in self.guests.values():
                _end(connection)
        self._server.shutdown()
        self._server.server_close()

    def forget(self) -> None:
        """In a process that was forked off: holds no connection open that is not its own."""
        for connection in (*self.guests.values(), self._server.socket):
            _drop(connection)


# ------------------------------------------------------------------------ the others


class Visitor(Meeting):
    """The meeting as the other processes see it."""

    patience = GRACE

    def __init__(self, name: str, address: str, port: int, token: str, seconds: float) -> None:
        super().__init__(name)
        self._seconds = seconds
        try:
            self._connection = socket.create_connection((address, port), timeout=min(60.0, seconds))
        except OSError as error:
            raise UserError(
                f"expected to reach the first process of this job at {address}:{port}\n  got: {error}\n"
                "  do: open the ports between the machines"
            ) from error
        self._connection.settimeout(None)
        _keep_alive(self._connection)
        self._values: Queue[Any] = Queue()
        self._bye = False
        self._say({"name": name, "token": token})
        threading.Thread(target=self._listen, daemon=True).start()

    def _say(self, word: dict[str, Any]) -> None:
        with suppress(OSError):
            self._connection.sendall(json.dumps(word).encode() + b"\n")

    def _listen(self) -> None:
        with suppress(OSError), self._connection.makefile("rb") as words:
            for line in words:
                word = json.loads(line)
                if "decided" in word:
                    self._values.put(word["decided"])
                elif "end" in word:
                    self.conclude(End(**word["end"]))
                else:
                    self._bye = True
        if not self._bye:
            self.conclude(End("rank 0", SILENT, 1))
        self._connection.close()

    def decided(self, decide: Callable[[], T]) -> T:
        until = time.monotonic() + self._seconds
        while time.monotonic() < until:
            with suppress(Empty):
                return cast(T, self._values.get(timeout=0.1))
            if self.end is not None:
                self.leaving.set()
                raise EndedError(self.end)
        raise UserError(
            f"expected a decision of rank 0\n  got: none in {self._seconds:.0f} s\n  do: look what it waits for"
        )

    def confirm(self) -> None:
        self._say({"agrees": True})

    def report(self, end: End) -> None:
        if self.end is None:
            self._say({"end": asdict(End(end.who, end.why, end.status))})
        self.conclude(end)

    def close(self) -> None:
        self._bye = True
        self._say({"bye": True})
        _end(self._connection)

    def forget(self) -> None:
        """In a process that was forked off: holds no connection open that is not its own."""
        _drop(self._connection)


def _end(connection: socket.socket) -> None:
    """Nothing more comes from here; what was sent arrives."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


def _drop(connection: socket.socket) -> None:
    with suppress(OSError):
        os.close(connection.detach())


def _forget() -> None:
    if isinstance(current, Host | Visitor):
        current.forget()


os.register_at_fork(after_in_child=_forget)


def _keep_alive(connection: socket.socket) -> None:
    """Has a machine that is gone noticed after two minutes; the kernel answers for a process that stands still."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# ------------------------------------------------------------------------ how they meet


@contextmanager
def together(
    devices: int | None,
    nodes: int,
    seconds: float,
    words: Callable[[BaseException], str],
    option: str = "",
) -> Iterator[None]:
    """Has the processes of a job meet for the time of the body, and tells the others where it ends with an error.

    devices, nodes: the processes of a machine, None where that is not known yet, and the machines; seconds: how long
    they wait for each other; words: what an error says to a person; option: as of `require_launched`.
    """
    global current, tried
    tried, place = True, here()
    require_launched(devices, nodes, option)
    alone = place.launcher == "" and nodes == 1 and devices == 1
    if (alone and ADDRESS not in os.environ) or (not alone and place.processes == 1):
        yield
        return
    current = meeting = _met(place, devices, nodes, seconds)
    meeting.words = words
    before = os.environ.get(ADDRESS)
    try:
        if isinstance(meeting, Host):
            meeting.gather(_others(place, devices, nodes), seconds)
        yield
    except BaseException as error:
        meeting.failed(error)
        raise
    finally:
        meeting.close()
        current = Meeting()
        os.environ.pop(ADDRESS, None)
        if before is not None:
            os.environ[ADDRESS] = before


def tell_early(error: BaseException, text: str) -> None:
    """Tells the others of an error that came before they met, as far as they are there."""
    place = here()
    known = place.rank is not None and (place.processes or 1) > 1
    machine = place.launcher == "" and place.node > 0 and "MASTER_PORT" in os.environ
    if tried or is_started_here() or not (known or machine):
        return
    with suppress(UserError), together(None, place.nodes or place.node + 1, EARLY, str):
        raise UserError(text) from error


def _others(place: Place, devices: int | None, nodes: int) -> int:
    """How many the first waits for, before it decides; those that are started from inside the job come later."""
    if place.launcher == "":
        return nodes - 1
    return (place.processes or (devices or 1) * nodes) - 1


def _name(place: Place, devices: int | None) -> str:
    if devices is None and place.rank is None and place.node > 0:
        return f"process {place.local} of machine {place.node}"
    return f"rank {place.number(devices or 1)}"


def _met(place: Place, devices: int | None, nodes: int, seconds: float) -> Meeting:
    if is_started_here() and ADDRESS in os.environ:
        address, port, token = json.loads(os.environ[ADDRESS])
        return Visitor(_name(place, devices), address, port, token, seconds)
    if place.launcher == "" and nodes == 1:
        host = Host("127.0.0.1")
        os.environ[ADDRESS] = json.dumps(["127.0.0.1", host.port, host.token])
        return host
    return _met_outside(place, devices, seconds)


def _met_outside(place: Place, devices: int | None, seconds: float) -> Meeting:
    from torch.distributed import PrefixStore, TCPStore

    address, port = _first_machine(place)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if not (place.first and not agent):
        _wait_for(address, port, seconds)
    limit = timedelta(seconds=seconds)
    try:
        store = TCPStore(
            address,
            port,
            is_master=place.first and not agent,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"expected a free port at MASTER_PORT={port} of this machine, {address}\n  got: {reason[:300]}\n"
            "  do: choose another MASTER_PORT"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = PrefixStore(f"consistency/{attempt}", store)
    if place.first:
        host = Host("")
        host.store = store  # type: ignore[attr-defined]  # it lives as long as the meeting
        keys.set("first", json.dumps([host.port, host.token]))
        os.environ[ADDRESS] = json.dumps([address, host.port, host.token])
        return host
    until = time.monotonic() + seconds
    try:
        while not keys.check(["first"]):
            require(
                time.monotonic() < until,
                "the first process of this job",
                f"none in {seconds:.0f} s at {address}:{port}",
                "start it, or look into its log",
            )
            time.sleep(0.1)
        listening, token = json.loads(keys.get("first"))
    except RuntimeError as error:
        raise EndedError(End("rank 0", SILENT, 1)) from error
    os.environ[ADDRESS] = json.dumps([address, listening, token])
    return Visitor(_name(place, devices), address, listening, token, seconds)


def _first_machine(place: Place) -> tuple[str, int]:
    """Where the first process is, as Lightning finds it."""
    from lightning.fabric.plugins.environments import (
        LSFEnvironment,
        MPIEnvironment,
        SLURMEnvironment,
    )

    kinds = {"srun": SLURMEnvironment, "jsrun": LSFEnvironment, "mpirun": MPIEnvironment}
    if place.launcher in kinds:
        environment = kinds[place.launcher]()
        return environment.main_address, environment.main_port
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))


def _wait_for(address: str, port: int, seconds: float) -> None:
    """Waits until somebody listens there."""
    until, reason = time.monotonic() + seconds, ""
    while time.monotonic() < until:
        try:
            socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            reason = str(error)
            time.sleep(0.2)
        else:
            return
    raise UserError(
        f"expected the first process of this job at {address}:{port}\n  got: none in {seconds:.0f} s ({reason})\n"
        "  do: start it, or set MASTER_ADDR and MASTER_PORT to where it is, the same on every machine"
    )


# ------------------------------------------------------------------------ the same settings on every process


def agreed(settings: Mapping[str, Any]) -> None:
    """Refuses settings of this process that are not those of the first, before that one decides anything else.

    A process that was started from inside the job has its command from there, with all values filled in.
    """
    values = dict(_leaves("", settings))
    mine = {place: _digest(value) for place, value in values.items()}
    first = decided(lambda: mine)
    places = [] if is_started_here() else dict.fromkeys([*mine, *first])
    other = [place for place in places if mine.get(place) != first.get(place)]
    require(
        not other,
        "the same settings on every process of the job",
        ", ".join(f"{place}={values.get(place, 'nothing')}" for place in other[:4])
        + f" on {current.name}, and something else on rank 0",
        "give every process the same command",
    )
    current.confirm()


def _leaves(place: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(f"{place}.{key}" if place else str(key), value)
    else:
        yield place, node


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, default=str).encode(), digest_size=8).hexdigest()
