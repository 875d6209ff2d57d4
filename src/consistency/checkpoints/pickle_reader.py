"""Pickles and torch files, read as data: no name inside them is resolved and nothing inside them is called.

A pickle is a program for a small stack machine, and the usual reader runs it: it imports the names in it and calls
them. Here the standard library only splits the program into instructions, and `Machine` carries out those that make
plain values. A name stays a `Name`. `pickle_calls` has a function for each of the few names that checkpoints call; a file
with any other name is refused by it.

Three containers hold such programs: a bare pickle (NVlabs), a zip archive (`torch.save`), and the older torch form,
which is also how a bare pickle stores its tensors. Sizes are checked before memory is taken, the zip checksums (which
torch ignores) are verified, and tensors must lie inside their storages.
"""

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import IO, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from consistency.checkpoints.contents import ContentError
from consistency.checkpoints.pickle_calls import (
    CALLS,
    COPIES,
    MAX_ODD_KEYS,
    STORAGES,
    Key,
    Name,
    Object,
    array,
    brief,
    check,
    set_of_names,
)

MAX_INSTRUCTIONS = 2_000_000
Stream: TypeAlias = IO[bytes] | io.BufferedIOBase
"""An open file, bytes in memory, or a record of an archive."""

CARD, OPENAI = "consistency.json", "OpenAI"
"""The record of a torch archive that holds our card, which torch ignores, and the format of such a file."""

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two values of the older torch form."""

MODULES = {f"torch.nn.modules.container.{k}" for k in ("ModuleDict", "ModuleList", "Sequential")}
DICTIONARIES = ("EasyDict", "AttrDict", "AttributeDict", "Namespace")
"""Classes, wherever they come from, that are dictionaries with their keys as attributes."""

SETTINGS = ("omegaconf.", "typing.", "pathlib.")
"""Packages whose objects stand beside weights, as settings: kept unread, whatever they are."""

PLAIN = {
    *(str(dtype) for dtype in STORAGES.values()),
    *("torch.strided", "torch.Tensor", "torch.nn.parameter.Parameter", "numpy.ndarray"),
    *(
        f"{module}.{kind}"
        for module in ("builtins", "__builtin__")
        for kind in ("dict", "list", "int", "long", "float", "str", "unicode", "bool", "tuple")
    ),
}
"""Names that stand for themselves."""

FROM_BYTES = "torch.storage._load_from_bytes"
KNOWN = {*CALLS, FROM_BYTES, *STORAGES, *MODULES, *PLAIN}
"""Names that a pickle may hold."""

LITERALS = {
    o.name
    for o in pickletools.opcodes
    if o.arg and not o.stack_before and o.stack_after and o.stack_after != [pickletools.anyobject]
}
"""Instructions that put their argument, a number, text or bytes, on the stack."""

VALUES: dict[str, Callable[..., Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "TUPLE": tuple,
    "LIST": list,
    **dict.fromkeys(("TUPLE1", "TUPLE2", "TUPLE3"), lambda *items: items),
}
"""Instructions that make a plain value of their operands."""

OPERATIONS = {
    **{"APPEND": "extend", "APPENDS": "extend", "ADDITEMS": "add"},
    **{"DICT": "dictionary", "SETITEM": "fill", "SETITEMS": "fill"},
    **{"STACK_GLOBAL": "name", "REDUCE": "call", "NEWOBJ": "create", "BUILD": "set_state"},
    "BINPERSID": "find_storage",
}
"""Instructions -> methods of `Machine` that take their operands and return the value for the stack."""


def _is_setting(path: str) -> bool:
    """Return whether the result of a class or function is kept unread."""
    return path.startswith(SETTINGS)


def _is_dictionary(path: str) -> bool:
    """Return whether a class is a dictionary under another name."""
    return path.rpartition(".")[2] in DICTIONARIES


def no_storage(description: object) -> Tensor:
    """Refuse a reference: a bare pickle has no storages outside of itself."""
    raise ContentError("a pickle that refers to something outside of it")


def storage_from_bytes(content: object) -> Any:
    """Return a storage that a bare pickle holds as a file in the older torch form."""
    if not isinstance(content, bytes):
        raise ContentError("a storage without bytes")
    stream = io.BytesIO(content)
    storage = read_older(stream, len(content))
    check(not stream.read(1), "a storage with more bytes than it declares")
    return storage


class Machine:
    """The interpreter of one pickle from a source of `total` bytes.

    find_storage: returns the storage that a torch file describes, a tensor of one axis.

    A subclass for other files than checkpoints has its own `calls` and `known`.
    """

    calls: ClassVar[Mapping[str, Callable[..., Any]]] = {**CALLS, FROM_BYTES: storage_from_bytes}
    known: ClassVar[Set[str]] = KNOWN

    def __init__(self, total: int, find_storage: Callable[[Any], Tensor] = no_storage) -> None:
        self.find_storage = find_storage
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.odd_keys = 0
        self.to_copy = 2 * total

    def run(self, program: Any) -> Any:
        """Return the value of a pickle: bytes, or a `Stream` that stands at its beginning."""
        argument: Any
        for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
            name = instruction.name
            check(count <= MAX_INSTRUCTIONS, "a pickle of more parts than any checkpoint has")
            if name == "STOP":
                return self.stack.pop()
            if name == "MARK":
                self.below.append(self.stack)
                self.stack = []
            elif name in LITERALS:
                self.stack.append(argument)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.stack.append(self.name(*argument.split(" ", 1)))
            elif name == "DUP":
                self.stack.append(self.stack[-1])
            elif name == "POP" and self.stack:
                self.stack.pop()
            elif name in ("POP", "POP_MARK"):
                self.stack = self.below.pop()
            elif name in VALUES:
                operands = self.take(instruction.stack_before)
                self.stack.append(VALUES[name](*operands))
            elif name in OPERATIONS:
                operands = self.take(instruction.stack_before)
                self.stack.append(getattr(self, OPERATIONS[name])(*operands))
            elif name not in ("PROTO", "FRAME"):
                raise ContentError(f"a pickle with the instruction {name}")
        raise ContentError("a pickle without an end")

    def take(self, before: list[pickletools.StackObject]) -> list[Any]:
        """Take the operands of an instruction from the stack; items of a container are one list, the last operand."""
        items: list[Any] = []
        if pickletools.markobject in before:
            items, self.stack, before = [self.stack], self.below.pop(), before[:-2]
        first = len(self.stack) - len(before)
        check(first >= 0, "a pickle that takes more values than it has made")
        operands = self.stack[first:]
        del self.stack[first:]
        if not items and before[:1] in ([pickletools.pylist], [pickletools.pydict]):
            return [operands[0], operands[1:]]
        return operands + items

    def extend(self, target: Any, items: list[Any]) -> Any:
        check(isinstance(target, list), "a pickle that appends to something else than a list")
        target.extend(items)
        return target

    def add(self, target: Any, items: list[Any]) -> Any:
        check(isinstance(target, set), "a pickle that adds to something else than a set")
        target.update(set_of_names(items))
        return target

    def dictionary(self, items: list[Any]) -> Any:
        return self.fill({}, items)

    def fill(self, target: Any, items: list[Any]) -> Any:
        """Put keys and values, in turn, into a dictionary."""
        filled = isinstance(target, dict) and len(items) % 2 == 0
        check(filled, "a pickle that fills something else than a dictionary")
        self.odd_keys += sum(not isinstance(key, str) for key in items[::2])
        plain = self.odd_keys <= MAX_ODD_KEYS and all(isinstance(key, Key) for key in items[::2])
        check(plain, "a pickle with keys that no checkpoint has")
        target.update(zip(items[::2], items[1::2], strict=True))
        return target

    def name(self, module: object, name: object) -> Name:
        """Return a name, if it is one of those that checkpoints are made of."""
        path = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        known = path in self.known or _is_setting(path) or _is_dictionary(path)
        check(known, f"a pickle that asks for {path[:120]}, which no checkpoint needs")
        return Name(path)

    def call(self, function: object, arguments: object) -> Any:
        """Return the result of the function that stands for a name."""
        path = function.path if isinstance(function, Name) else ""
        if _is_setting(path):
            return Object(path, None)
        if _is_dictionary(path) and arguments == ():
            return {}
        check(path in self.calls, f"a pickle that calls {brief(function)}")
        if not isinstance(arguments, tuple):
            raise ContentError(f"a pickle that calls {path} without arguments")
        if path in COPIES and arguments:
            self.count_copy(arguments[0])
        return self.calls[path](*arguments)

    def count_copy(self, content: object) -> None:
        """Add up the sizes of all that is copied, and refuse more than the file could mean."""
        if isinstance(content, str | bytes | bytearray):
            self.to_copy -= len(content)
        elif isinstance(content, list | tuple):
            self.to_copy -= 100 * len(content)
        check(self.to_copy >= 0, "a pickle that copies its own content over and over")

    def create(self, kind: object, arguments: object) -> Any:
        """Return an object of a class."""
        path = kind.path if isinstance(kind, Name) else ""
        if _is_dictionary(path) and arguments == ():
            return {}
        known = _is_setting(path) or (path in MODULES and arguments == ())
        check(known, f"a pickle that creates an object of {brief(kind)}")
        return Object(path, {})

    def set_state(self, target: Any, state: Any) -> Any:
        """Give an object its state; that of a dictionary is left out, because it holds no weights."""
        kind = target.kind if isinstance(target, Object) else None
        if kind == "numpy.dtype":
            order = state[1:2] if isinstance(state, tuple) else None
            ordered = order in (("<",), ("|",), (">",), ("=",))
            check(ordered, "a number whose bytes stand in no order")
            if order == (">",):
                target.state = f">{target.state.lstrip('>')}"
        elif kind == "numpy.ndarray":
            self.count_copy(state[-1] if isinstance(state, tuple) and state else None)
            target.state = array(state)
        elif kind is not None and not _is_setting(kind) and isinstance(state, dict):
            target.state = state
        elif not isinstance(target, dict) and (kind is None or not _is_setting(kind)):
            raise ContentError(f"a pickle that changes an object of {brief(target)}")
        return target


class Storages(dict[str, Tensor]):
    """The storages of a torch file by key.

    make: returns a storage of a key, a type and a length, at its first use.
    """

    def __init__(self, make: Callable[[str, torch.dtype, int], Tensor]) -> None:
        self.make = make

    def find(self, description: object) -> Tensor:
        """Return the storage that a pickle describes."""
        if not isinstance(description, tuple) or len(description) < 5:
            raise ContentError("a pickle that refers to something else than a storage")
        word, kind, key, _, length, *view = description
        check(word == "storage", "a pickle that refers to something else than a storage")
        dtype = STORAGES.get(kind.path) if isinstance(kind, Name) else None
        if dtype is None or any(v is not None for v in view):
            raise ContentError("a storage of an unknown kind")
        if not isinstance(key, str) or not isinstance(length, int) or not 0 <= length < 2**48:
            raise ContentError("a storage without a size")
        if key not in self:
            self[key] = self.make(key, dtype, length)
        same = self[key].dtype == dtype and self[key].numel() == length
        check(same, "a storage of two kinds")
        return self[key]


def _fill_tensor(tensor: Tensor, stream: Stream) -> None:
    """Read exactly the bytes of a tensor of one axis."""
    bytes_of: Any = tensor.view(torch.uint8).numpy()
    view = memoryview(bytes_of)
    done = 0
    while done < len(view):
        part = stream.read(min(len(view) - done, 1 << 24))
        check(part, "a file that ends early")
        view[done : done + len(part)] = part
        done += len(part)


def read_zip(path: Path) -> Any:
    """Return the content of a torch archive; `card`, `weights` and `format` if it has the record `CARD`.

    Every record used is checked by its CRC.
    """
    total = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        stored = all(r.compress_type == zipfile.ZIP_STORED for r in records.values())
        inside = sum(r.file_size for r in records.values()) <= total
        check(stored and inside, "a zip archive that is compressed, which torch never writes")
        programs = [name for name in records if name.endswith("data.pkl")]
        check(len(programs) == 1, "a zip archive that torch did not write")
        root = programs[0].removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in records else b"little"
        check(order == b"little", "a torch archive with its bytes in reverse")

        def storage(key: str, dtype: torch.dtype, length: int) -> Tensor:
            record = records.get(f"{root}data/{key}")
            if record is None or record.file_size != length * dtype.itemsize:
                raise ContentError("a storage that is missing or not of its full length")
            tensor = torch.empty(length, dtype=dtype)
            with archive.open(record) as stream:
                _fill_tensor(tensor, stream)
            return tensor

        size = records[programs[0]].file_size
        content = Machine(size, Storages(storage).find).run(archive.read(programs[0]))
        card = archive.read(f"{root}{CARD}") if f"{root}{CARD}" in records else None
    if card is None:
        return content
    return {"card": json.loads(card), "weights": content, "format": OPENAI}


def read_older(stream: Stream, total: int) -> Any:
    """Return the content of a file in the form of torch before 1.6: pickles, then storages.

    total: its size in bytes.
    """
    for expected in (MAGIC, PROTOCOL):
        value = Machine(total).run(stream)
        check(isinstance(value, int) and value == expected, "a pickle that is no checkpoint")
    system = Machine(total).run(stream)
    little = isinstance(system, dict) and system.get("little_endian") is True
    check(little, "a torch file with its bytes in reverse")
    taken = 0

    def storage(key: str, dtype: torch.dtype, length: int) -> Tensor:
        nonlocal taken
        taken += length * dtype.itemsize
        check(taken <= total, "storages larger than the file")
        return torch.empty(length, dtype=dtype)

    storages = Storages(storage)
    content = Machine(total, storages.find).run(stream)
    keys = Machine(total).run(stream)
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    complete = named and sorted(keys) == sorted(storages)
    check(complete, "a torch file without all of its storages")
    for key in keys:
        whole = stream.read(8) == struct.pack("<q", storages[key].numel())
        check(whole, "a storage that is not of its full length")
        _fill_tensor(storages[key], stream)
    return content


def read_pickle(path: Path) -> Any:
    """Return the content of a bare pickle, or of a file in the older torch form."""
    total = path.stat().st_size
    with path.open("rb") as stream:
        content = Machine(total).run(stream)
        if not isinstance(content, int) or content != MAGIC:
            return content
        stream.seek(0)
        return read_older(stream, total)
