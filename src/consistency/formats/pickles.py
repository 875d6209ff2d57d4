"""Pickles and torch files, read as data: no name inside them is resolved and nothing inside them is called.

A pickle is a program for a small stack machine, and the usual reader runs it: it imports the names it finds and calls
them. Here the standard library only splits the program into instructions, and `Machine` carries out those that make
plain values. A name stays a `Name`. The few calls and classes that checkpoints are made of have a function of this
module in their place; a file that asks for any other is refused with the name it asked for.

Three containers hold such programs: a bare pickle (NVlabs), a zip archive (`torch.save`), and the older torch form,
which is also how a bare pickle stores its tensors. Sizes are checked before memory is taken, the zip checksums (which
torch ignores) are verified, and tensors must lie inside their storages.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from consistency.formats.opened import ContentError

MAX_INSTRUCTIONS = 2_000_000
MAX_ODD_KEYS = 20_000
"""Dictionary keys that are not strings: their hashes are not random, so many could be made to collide."""

Stream: TypeAlias = IO[bytes] | io.BufferedIOBase
"""An open file, bytes in memory, or a record of an archive."""

Key = str | int | float | bytes | None
"""What may be a key: nothing that nests, because the hash of a deeply nested tuple overflows the stack."""

CARD = "consistency.json"
"""The record of a torch archive in which we keep the card; torch ignores it."""

STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
MODULES = {
    f"torch.nn.modules.container.{kind}" for kind in ("ModuleDict", "ModuleList", "Sequential")
}
DICTIONARIES = ("EasyDict", "AttrDict", "AttributeDict", "Namespace")
"""Classes, wherever they come from, that are dictionaries with their keys as attributes."""

SETTINGS = ("omegaconf.", "typing.", "pathlib.")
"""Packages whose objects stand beside weights, as settings: kept unread, whatever they are."""

PLAIN = {
    *(f"torch.{kind}" for kind in ("float16", "float32", "float64", "bfloat16", "uint8", "bool")),
    *(f"torch.{kind}" for kind in ("int8", "int16", "int32", "int64")),
    *("torch.strided", "torch.Tensor", "torch.nn.parameter.Parameter", "numpy.ndarray"),
    *(
        f"{module}.{kind}"
        for module in ("builtins", "__builtin__")
        for kind in ("dict", "list", "int", "long", "float", "str", "unicode", "bool", "tuple")
    ),
}
"""Names that stand for themselves."""

NUMBERS = {f"{kind}{size}" for kind in "fiu" for size in (1, 2, 4, 8)} - {"f1"} | {"b1"}
"""numpy types of numbers, by kind and bytes."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    path: str


@dataclass
class Object:
    """An object of a class that a pickle names; its class is not looked up and its state stays as it is stored."""

    kind: str
    state: Any


def told(value: object) -> str:
    """A value from a file, short enough for a message and never a container, which could be endless."""
    if isinstance(value, Name):
        return value.path
    if isinstance(value, str):
        return repr(value[:80])
    short = value is None or isinstance(value, float | bool)
    if short or (isinstance(value, int) and abs(value) < 1 << 63):
        return str(value)
    return type(value).__name__


# ----------------------------------------------------------- what the known names stand for


def _ordered_dict(pairs: object = ()) -> dict[Any, Any]:
    items: list[Any] = list(pairs) if isinstance(pairs, list | tuple) else [None]
    paired = all(isinstance(i, list | tuple) and len(i) == 2 for i in items)
    if not paired or len(items) > MAX_ODD_KEYS or not all(isinstance(i[0], Key) for i in items):
        raise ContentError("an ordered dictionary made of something else than pairs")
    return {key: value for key, value in items}


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Tensor:
    """A view of a storage, inside it and without overlap, so that it cannot be larger than the file."""
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise ContentError("a tensor without a storage")
    if not isinstance(size, tuple | list) or not isinstance(stride, tuple | list):
        raise ContentError("a tensor without a shape")
    numbers = [offset, *size, *stride]
    whole = all(isinstance(n, int) and 0 <= n < 2**48 for n in numbers)
    if not whole or len(size) != len(stride) or len(size) > 8:
        raise ContentError("a tensor with an impossible shape")
    assert isinstance(offset, int)
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and not (count <= storage.numel() and last < storage.numel()):
        raise ContentError("a tensor that reaches out of its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset) if count else storage[:0]


def _parameter(data: object, *_: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise ContentError("a parameter without a tensor")
    return data


def _storage_from_bytes(content: object) -> Any:
    if not isinstance(content, bytes):
        raise ContentError("a storage without bytes")
    stream = io.BytesIO(content)
    found = read_older(stream, len(content))
    if stream.read(1):
        raise ContentError("a storage with more bytes than it declares")
    return found


def _persistent(meta: object) -> Object:
    """What NVlabs' `torch_utils.persistence` stores: the source of a class, which is left unread, and its state."""
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise ContentError("a persistent object without a state")
    return Object(told(meta.get("class_name")).strip("'"), meta["state"])


def _parameter_with_state(data: object, *_: object) -> Tensor:
    """A parameter that somebody gave attributes, which are left out."""
    return _parameter(data)


def _tensor_with_state(function: object, _: object, arguments: object, *__: object) -> Tensor:
    """A tensor that somebody gave attributes, which are left out."""
    known = isinstance(function, Name) and CALLS.get(function.path) in (_tensor, _parameter)
    if not known or not isinstance(arguments, tuple):
        raise ContentError(f"a tensor made by {told(function)}")
    assert isinstance(function, Name)
    found: Tensor = CALLS[function.path](*arguments)
    return found


def _number_type(code: object, *_: object) -> Object:
    text = code.decode("latin1") if isinstance(code, bytes) else code
    if not isinstance(text, str) or text.lstrip("<>=|") not in NUMBERS:
        raise ContentError(f"a number of type {told(code)}")
    return Object("numpy.dtype", text.lstrip("<=|"))


def _number(kind: object, content: object) -> Any:
    found = _numbers(kind, content)
    if found.size != 1:
        raise ContentError("a number of another length than its type")
    return found.item()


def _numbers(kind: object, content: object) -> np.ndarray[Any, np.dtype[Any]]:
    """The numbers in bytes, in this machine's order; Python 2 wrote bytes as text."""
    stored = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(kind, Object) or kind.kind != "numpy.dtype" or not isinstance(stored, bytes):
        raise ContentError("a number without a type")
    given = np.dtype(kind.state)
    return np.frombuffer(stored, dtype=given).astype(given.newbyteorder("="))


def _blank_array(*_: object) -> Object:
    """Stands for an array of numpy; its content comes later, as its state, a tensor."""
    return Object("numpy.ndarray", None)


def array_of(state: object) -> Tensor:
    """The array that numpy describes as (version, shape, type, whether it is stored by columns, bytes)."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise ContentError("an array without a description")
    _, shape, kind, by_column, content = state
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ContentError("an array without a shape")
    numbers = _numbers(kind, content)
    if len(shape) > 8 or math.prod(shape) != numbers.size:
        raise ContentError("an array of another size than its shape")
    laid = numbers.reshape(shape, order="F" if by_column else "C")
    return torch.from_numpy(np.ascontiguousarray(laid).reshape(shape))


def _array_from_buffer(content: object, kind: object, shape: object, order: object) -> Object:
    """An array as protocol 5 writes it."""
    stored = bytes(content) if isinstance(content, bytearray) else content
    return Object("numpy.ndarray", array_of((1, shape, kind, order == "F", stored)))


def _no_bytes(*arguments: object) -> bytes:
    """What protocol 2 writes for bytes of no length."""
    if arguments:
        raise ContentError("bytes made of something else")
    return b""


def _size(numbers: object = ()) -> tuple[Any, ...]:
    if not isinstance(numbers, tuple | list):
        raise ContentError("a size that is no row of numbers")
    return tuple(numbers)


def _unread(*_: object) -> Object:
    """A device, a path and the like: only that there is one is kept."""
    return Object("setting", None)


def _dictionary(*_: object) -> dict[Any, Any]:
    """A dictionary with a default; its content comes later."""
    return {}


def _encoded(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise ContentError("bytes in an unknown encoding")
    return text.encode("latin1")


def _set(items: object = ()) -> set[Any]:
    if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
        raise ContentError("a set of something else than names")
    return set(items)


def _method(owner: object, name: object) -> Object:
    """A method of a persistent object, as the loss of ECT holds one: only that there is one is kept."""
    if not isinstance(owner, Object) or not isinstance(name, str):
        raise ContentError(f"a pickle that asks for the attribute {told(name)} of {told(owner)}")
    return Object("method", None)


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _dictionary,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_state,
    "torch.Size": _size,
    "torch.device": _unread,
    "torch.storage._load_from_bytes": _storage_from_bytes,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.core.multiarray._reconstruct": _blank_array,
    "numpy._core.multiarray._reconstruct": _blank_array,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "numpy._core.numeric._frombuffer": _array_from_buffer,
    "numpy.dtype": _number_type,
    "__builtin__.bytes": _no_bytes,
    "builtins.bytes": _no_bytes,
    "_codecs.encode": _encoded,
    "builtins.getattr": _method,
    "builtins.set": _set,
    "__builtin__.set": _set,
}
KNOWN = {*CALLS, *STORAGES, *MODULES, *PLAIN}
COPYING = {
    name
    for name, call in CALLS.items()
    if call in (_ordered_dict, _storage_from_bytes, _encoded, _set, _size, _array_from_buffer)
}
"""Calls that copy their argument, so that a short pickle could fill the memory by repeating them."""


# --------------------------------------------------------------------------- the stack machine


LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
FRESH: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
SKIPPED = {"PROTO", "FRAME"}

FindStorage = Callable[[Any], Tensor]
"""What a torch file says of a storage -> its content, a tensor of one axis."""


def no_storage(description: object) -> Tensor:
    """A bare pickle has no storages outside of itself."""
    raise ContentError("a pickle that refers to something outside of it")


class Machine:
    """Carries out one pickle from a source of `total` bytes. Its op_ methods are named as in `pickletools`.

    A subclass for other files than checkpoints gives its own `calls` and `known`.
    """

    calls: ClassVar[Mapping[str, Callable[..., Any]]] = CALLS
    known: ClassVar[Set[str]] = KNOWN
    settings: ClassVar[tuple[str, ...]] = SETTINGS
    dictionaries: ClassVar[tuple[str, ...]] = DICTIONARIES

    def __init__(self, total: int, find_storage: FindStorage = no_storage) -> None:
        self.find_storage = find_storage
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.odd_keys = 0
        self.to_copy = 2 * total

    def run(self, program: Any) -> Any:
        """The value that a pickle, bytes or a `Stream` that stands at it, makes."""
        for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
            name = instruction.name
            if count > MAX_INSTRUCTIONS:
                raise ContentError("a pickle of more parts than any checkpoint has")
            if name == "STOP":
                return self.stack.pop()
            if name in LITERALS:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in FRESH:
                self.stack.append(FRESH[name]())
            elif name not in SKIPPED:
                step = getattr(self, f"op_{name.lower()}", None)
                if step is None:
                    raise ContentError(f"a pickle with the instruction {name}")
                step(argument)
        raise ContentError("a pickle without an end")

    def since_mark(self) -> list[Any]:
        """The values since the last mark, taken from the stack."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def fill(self, items: list[Any]) -> None:
        """Puts keys and values, in turn, into the dictionary on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ContentError("a pickle that fills something else than a dictionary")
        self.odd_keys += sum(not isinstance(key, str) for key in items[::2])
        if self.odd_keys > MAX_ODD_KEYS or not all(isinstance(key, Key) for key in items[::2]):
            raise ContentError("a pickle with keys that no checkpoint has")
        target.update(zip(items[::2], items[1::2], strict=True))

    # The stack and the memory

    def op_mark(self, _: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def op_pop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def op_pop_mark(self, _: None) -> None:
        self.since_mark()

    def op_dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def op_put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    op_binput = op_long_binput = op_put

    def op_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    op_binget = op_long_binget = op_get

    # Containers

    def op_list(self, _: None) -> None:
        items = self.since_mark()
        self.stack.append(items)

    def op_append(self, _: None) -> None:
        item = self.stack.pop()
        self.extend([item])

    def op_appends(self, _: None) -> None:
        self.extend(self.since_mark())

    def extend(self, items: list[Any]) -> None:
        """Appends to the list on top of the stack."""
        if not isinstance(self.stack[-1], list):
            raise ContentError("a pickle that appends to something else than a list")
        self.stack[-1].extend(items)

    def op_tuple(self, _: None) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def op_tuple1(self, _: None) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def op_tuple2(self, _: None) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def op_tuple3(self, _: None) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def op_dict(self, _: None) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.fill(items)

    def op_setitem(self, _: None) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self.fill(items)

    def op_setitems(self, _: None) -> None:
        self.fill(self.since_mark())

    def op_additems(self, _: None) -> None:
        items = self.since_mark()
        if not isinstance(self.stack[-1], set):
            raise ContentError("a pickle that adds to something else than a set")
        self.stack[-1].update(_set(items))

    # Names, calls, objects

    def named(self, path: str) -> None:
        """Puts a name on the stack, if it is one of those that checkpoints are made of."""
        if path not in self.known and not self.is_setting(path) and not self.is_dictionary(path):
            raise ContentError(f"a pickle that asks for {path[:120]}, which no checkpoint needs")
        self.stack.append(Name(path))

    def is_setting(self, path: str) -> bool:
        """Whether a class or function makes what is kept unread."""
        return path.startswith(self.settings)

    def is_dictionary(self, path: str) -> bool:
        """Whether a class is a dictionary under another name."""
        return path.rpartition(".")[2] in self.dictionaries

    def op_global(self, module_and_name: str) -> None:
        self.named(module_and_name.replace(" ", "."))

    def op_stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.named(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?")

    def op_reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, Name) and self.is_setting(function.path):
            self.stack.append(Object(function.path, None))
            return
        if isinstance(function, Name) and self.is_dictionary(function.path) and arguments == ():
            self.stack.append({})
            return
        if not isinstance(function, Name) or function.path not in self.calls:
            raise ContentError(f"a pickle that calls {told(function)}")
        if not isinstance(arguments, tuple):
            raise ContentError(f"a pickle that calls {function.path} without arguments")
        if function.path in COPYING and arguments:
            self.copies(arguments[0])
        self.stack.append(self.calls[function.path](*arguments))

    def copies(self, content: object) -> None:
        """Keeps account of what is copied, and refuses more of it than the file could mean."""
        if isinstance(content, str | bytes | bytearray | list | tuple):
            flat = isinstance(content, str | bytes | bytearray)
            self.to_copy -= len(content) * (1 if flat else 100)
        if self.to_copy < 0:
            raise ContentError("a pickle that copies its own content over and over")

    def op_newobj(self, _: None) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Name):
            raise ContentError(f"a pickle that creates an object of {told(kind)}")
        if self.is_dictionary(kind.path) and arguments == ():
            self.stack.append({})
        elif self.is_setting(kind.path) or (kind.path in MODULES and arguments == ()):
            self.stack.append(Object(kind.path, {}))
        else:
            raise ContentError(f"a pickle that creates an object of {told(kind)}")

    def op_build(self, _: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Object) and target.kind == "numpy.dtype":
            order = state[1:2] if isinstance(state, tuple) else None
            if order not in (("<",), ("|",), (">",), ("=",)):
                raise ContentError("a number whose bytes stand in no order")
            if order == (">",):
                target.state = f">{target.state.lstrip('>')}"
        elif isinstance(target, Object) and target.kind == "numpy.ndarray":
            self.copies(state[-1] if isinstance(state, tuple) and state else None)
            target.state = array_of(state)
        elif isinstance(target, Object) and self.is_setting(target.kind):
            pass
        elif isinstance(target, Object) and isinstance(state, dict):
            target.state = state
        elif not isinstance(target, dict):  # an ordered dictionary's attributes hold no weights
            raise ContentError(f"a pickle that changes an object of {told(target)}")

    def op_binpersid(self, _: None) -> None:
        self.stack.append(self.find_storage(self.stack.pop()))


# ------------------------------------------------------------------------------ the containers


def described(description: object) -> tuple[torch.dtype, str, int]:
    """Type, key and length of a storage from what torch writes of it."""
    if not isinstance(description, tuple) or len(description) < 5 or description[0] != "storage":
        raise ContentError("a pickle that refers to something else than a storage")
    _, kind, key, _, length, *view = description
    if not isinstance(kind, Name) or kind.path not in STORAGES or any(v is not None for v in view):
        raise ContentError("a storage of an unknown kind")
    if not isinstance(key, str) or not isinstance(length, int) or not 0 <= length < 2**48:
        raise ContentError("a storage without a size")
    return STORAGES[kind.path], key, length


def fill_tensor(tensor: Tensor, stream: Stream) -> None:
    """Reads exactly the bytes of a tensor of one axis."""
    bytes_of: Any = tensor.view(torch.uint8).numpy()
    view = memoryview(bytes_of)
    done = 0
    while done < len(view):
        part = stream.read(min(len(view) - done, 1 << 24))
        if not part:
            raise ContentError("a file that ends early")
        view[done : done + len(part)] = part
        done += len(part)


def read_zip(path: Path) -> tuple[Any, bytes | None]:
    """The content of a torch archive, and its record `CARD` if there is one. Every record used is checked by its CRC."""
    total = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        stored = all(r.compress_type == zipfile.ZIP_STORED for r in records.values())
        if not stored or sum(r.file_size for r in records.values()) > total:
            raise ContentError("a zip archive that is compressed, which torch never writes")
        programs = [name for name in records if name.endswith("data.pkl")]
        if len(programs) != 1:
            raise ContentError("a zip archive that torch did not write")
        root = programs[0].removesuffix("data.pkl")
        if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
            raise ContentError("a torch archive with its bytes in reverse")
        found: dict[str, Tensor] = {}

        def storage(description: object) -> Tensor:
            dtype, key, length = described(description)
            if key not in found:
                record = records.get(f"{root}data/{key}")
                if record is None or record.file_size != length * dtype.itemsize:
                    raise ContentError("a storage that is not there in its full length")
                found[key] = torch.empty(length, dtype=dtype)
                with archive.open(record) as stream:
                    fill_tensor(found[key], stream)
            if found[key].dtype != dtype or found[key].numel() != length:
                raise ContentError("a storage of two kinds")
            return found[key]

        content = Machine(records[programs[0]].file_size, storage).run(archive.read(programs[0]))
        card = archive.read(f"{root}{CARD}") if f"{root}{CARD}" in records else None
    return content, card


MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two values of the older torch form."""


def read_older(stream: Stream, total: int) -> Any:
    """The content of a file in the form of torch before 1.6: pickles, then storages; `total` is its size in bytes."""
    for expected in (MAGIC, PROTOCOL):
        found_value = Machine(total).run(stream)
        if not isinstance(found_value, int) or found_value != expected:
            raise ContentError("a pickle that is no checkpoint")
    system = Machine(total).run(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ContentError("a torch file with its bytes in reverse")
    found: dict[str, Tensor] = {}
    taken = 0

    def storage(description: object) -> Tensor:
        nonlocal taken
        dtype, key, length = described(description)
        if key not in found:
            taken += length * dtype.itemsize
            if taken > total:
                raise ContentError("storages larger than the file")
            found[key] = torch.empty(length, dtype=dtype)
        if found[key].dtype != dtype or found[key].numel() != length:
            raise ContentError("a storage of two kinds")
        return found[key]

    content = Machine(total, storage).run(stream)
    keys = Machine(total).run(stream)
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or sorted(keys) != sorted(found):
        raise ContentError("a torch file without all of its storages")
    for key in keys:
        if stream.read(8) != struct.pack("<q", found[key].numel()):
            raise ContentError("a storage that is not there in its full length")
        fill_tensor(found[key], stream)
    return content


def read_pickle(path: Path) -> Any:
    """The content of a bare pickle, or of a file in the older torch form."""
    total = path.stat().st_size
    with path.open("rb") as stream:
        content = Machine(total).run(stream)
        if not isinstance(content, int) or content != MAGIC:
            return content
        stream.seek(0)
        return read_older(stream, total)
