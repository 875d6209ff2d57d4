"""Pickles and torch files, read as data: no name inside them is resolved and nothing inside them is called.

A pickle is a program for a small stack machine. The standard library's interpreter in Python carries out the instructions
that make plain values; `Machine` replaces those that import and call: a name stays a `Name`, the few functions that
checkpoints call are those of `pickle_calls`, and any other name is refused.

Three containers hold such programs: a bare pickle (NVlabs), a zip archive (`torch.save`), and the older torch form,
which is also how a bare pickle stores its tensors. Sizes are checked before memory is taken, the zip checksums (which
torch ignores) are verified, and tensors must lie inside their storages.
"""

import io
import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from torch import Tensor

from consistency.checkpoints import pickle_calls as calls
from consistency.checkpoints.contents import ContentError, check
from consistency.checkpoints.pickle_calls import MAX_ODD_KEYS, Key, Name, Object, brief

MAX_INSTRUCTIONS = 2_000_000
Stream: TypeAlias = IO[bytes] | io.BufferedIOBase
"""An open file, bytes in memory, or a record of an archive."""

CARD, OPENAI = "consistency.json", "OpenAI"
"""The record of a torch archive that holds our card, which torch ignores, and the format of such a file."""

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two values of the older torch form."""

STORAGES = {
    **{"torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64},
    **{"torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16},
    **{"torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32},
    **{"torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8},
    **{"torch.ByteStorage": torch.uint8, "torch.BoolStorage": torch.bool},
}


def _storage_from_bytes(content: Any) -> Any:
    """Return a storage that a bare pickle holds as a file in the older torch form."""
    check(isinstance(content, bytes), "a storage without bytes")
    stream = io.BytesIO(content)
    storage = read_older(stream, len(content))
    check(not stream.read(1), "a storage with more bytes than it declares")
    return storage


COPIES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": calls.ordered_dict,
    "torch.Size": calls.size,
    "torch.storage._load_from_bytes": _storage_from_bytes,
    "_codecs.encode": calls.encoded,
    **{f"{module}.set": calls.set_of_names for module in ("builtins", "__builtin__")},
    **{f"numpy.{core}.numeric._frombuffer": calls.array_from_buffer for core in ("core", "_core")},
}
"""Calls that copy their argument: a short pickle could fill the memory by repeating them."""

CALLS: dict[str, Callable[..., Any]] = COPIES | {
    "collections.defaultdict": lambda *_: {},
    **{name.path: call for name, call in calls.TENSORS.items()},
    "torch._tensor._rebuild_from_type_v2": calls.tensor_with_state,
    "torch.device": lambda *_: Object("setting", None),
    "torch_utils.persistence._reconstruct_persistent_obj": calls.persistent,
    "numpy.dtype": calls.number_type,
    "builtins.getattr": calls.method,
    **{f"{module}.bytes": calls.no_bytes for module in ("builtins", "__builtin__")},
    **{f"numpy.{core}.multiarray.scalar": calls.number for core in ("core", "_core")},
    **{
        f"numpy.{core}.multiarray._reconstruct": lambda *_: Object("numpy.ndarray", None)
        for core in ("core", "_core")
    },
}
MODULES = {f"torch.nn.modules.container.{k}" for k in ("ModuleDict", "ModuleList", "Sequential")}
DICTIONARIES = ("EasyDict", "AttrDict", "AttributeDict", "Namespace")
"""Classes, wherever they come from, that are dictionaries with their keys as attributes."""

SETTINGS = ("omegaconf.", "typing.", "pathlib.")
"""Packages whose objects stand beside weights, as settings: kept unread, whatever they are."""

PLAIN = "dict list int long float str unicode bool tuple".split()
KNOWN = {
    *(*CALLS, *STORAGES, *MODULES, *map(str, STORAGES.values())),
    *("torch.strided", "torch.Tensor", "torch.nn.parameter.Parameter", "numpy.ndarray"),
    *(f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in PLAIN),
}
"""Names that a pickle may hold; those that are not called stand for themselves."""

REFUSED = "PERSID INST OBJ NEWOBJ_EX EXT1 EXT2 EXT4 FROZENSET NEXT_BUFFER READONLY_BUFFER".split()
"""Instructions that no checkpoint needs."""


def _is_dictionary(path: str) -> bool:
    """Return whether a class is a dictionary under another name."""
    return path.rpartition(".")[2] in DICTIONARIES


class Instructions(dict[int, Callable[[Any], None]]):
    """The instructions of one pickle by their codes, counted as they are looked up."""

    count = 0

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.count += 1
        check(self.count <= MAX_INSTRUCTIONS, "a pickle of more parts than any checkpoint has")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable[[Any], None]:
        known = pickletools.code2op.get(chr(code))  # type: ignore[attr-defined]
        raise ContentError(f"a pickle with the instruction {known.name if known else code}")


Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class Machine(Unpickler):
    """The interpreter of one pickle from a source of `total` bytes.

    find_storage: returns the storage that a torch file describes, a tensor of one axis.
    """

    stack: list[Any]

    def __init__(self, total: int, find_storage: Callable[[Any], Tensor] | None = None) -> None:
        self.find_storage = find_storage
        self.odd_keys, self.to_copy = 0, 2 * total
        allowed = [o for o in pickletools.opcodes if o.name not in REFUSED and o.proto <= 5]
        methods = {ord(o.code): Unpickler.dispatch[ord(o.code)].__name__ for o in allowed}
        self.dispatch = Instructions((c, getattr(Machine, name)) for c, name in methods.items())

    def run(self, program: bytes | Stream) -> Any:
        """Return the value of a pickle: bytes, or a stream that stands at its beginning."""
        stream = io.BytesIO(program) if isinstance(program, bytes) else program
        super().__init__(stream, encoding="latin1")
        return self.load()

    def persistent_load(self, description: object) -> Tensor:
        """Return the storage that a torch file describes; a bare pickle has none outside of itself."""
        if self.find_storage is None:
            raise ContentError("a pickle that refers to something outside of it")
        return self.find_storage(description)

    def find_class(self, module: str, name: str) -> Name:
        """Return a name, if it is one of those that checkpoints are made of."""
        path = f"{module}.{name}"
        known = path in KNOWN or path.startswith(SETTINGS) or _is_dictionary(path)
        check(known, f"a pickle that asks for {path[:120]}, which no checkpoint needs")
        return Name(path)

    def load_bytearray8(self) -> None:
        self.stack.append(bytearray(self.read(*struct.unpack("<Q", self.read(8)))))

    def load_additems(self) -> None:
        names = calls.set_of_names(self.pop_mark())
        check(isinstance(self.stack[-1], set), "a pickle that adds to something else than a set")
        self.stack[-1].update(names)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.fill(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key, value])

    def load_setitems(self) -> None:
        self.fill(self.pop_mark())

    def fill(self, items: list[Any]) -> None:
        """Put keys and values, in turn, into the dictionary on top of the stack."""
        target, keys = self.stack[-1], items[::2]
        filled = isinstance(target, dict) and len(items) % 2 == 0
        check(filled, "a pickle that fills something else than a dictionary")
        self.odd_keys += sum(not isinstance(key, str) for key in keys)
        plain = self.odd_keys <= MAX_ODD_KEYS and all(isinstance(key, Key) for key in keys)
        check(plain, "a pickle with keys that no checkpoint has")
        target.update(zip(keys, items[1::2], strict=True))

    def load_reduce(self) -> None:
        """Replace a name and its arguments by the result of the function that stands for it."""
        arguments, function = self.stack.pop(), self.stack.pop()
        path = function.path if isinstance(function, Name) else ""
        if path.startswith(SETTINGS):
            self.stack.append(Object(path, None))
        elif _is_dictionary(path) and arguments == ():
            self.stack.append({})
        else:
            check(path in CALLS, f"a pickle that calls {brief(function)}")
            check(isinstance(arguments, tuple), f"a pickle that calls {path} without arguments")
            if path in COPIES:
                self.count_copy(*arguments[:1])
            self.stack.append(CALLS[path](*arguments))

    def count_copy(self, content: object = None) -> None:
        """Add up the sizes of all that is copied, and refuse more than the file could mean."""
        if isinstance(content, str | bytes | bytearray):
            self.to_copy -= len(content)
        elif isinstance(content, list | tuple):
            self.to_copy -= 100 * len(content)
        check(self.to_copy >= 0, "a pickle that copies its own content over and over")

    def load_newobj(self) -> None:
        """Replace a class and its arguments by an object."""
        arguments, kind = self.stack.pop(), self.stack.pop()
        path = kind.path if isinstance(kind, Name) else ""
        alone = arguments == () and (_is_dictionary(path) or path in MODULES)
        check(
            alone or path.startswith(SETTINGS), f"a pickle that creates an object of {brief(kind)}"
        )
        self.stack.append({} if alone and _is_dictionary(path) else Object(path, {}))

    def load_build(self) -> None:
        """Give an object its state; that of a dictionary is left out, because it holds no weights."""
        state, target = self.stack.pop(), self.stack[-1]
        kind = target.kind if isinstance(target, Object) else None
        if kind == "numpy.dtype":
            order = state[1:2] if isinstance(state, tuple) else None
            ordered = order in (("<",), ("|",), (">",), ("=",))
            check(ordered, "a number whose bytes stand in no order")
            if order == (">",):
                target.state = f">{target.state.lstrip('>')}"
        elif kind == "numpy.ndarray":
            self.count_copy(state[-1] if isinstance(state, tuple) and state else None)
            target.state = calls.array(state)
        elif kind is not None and not kind.startswith(SETTINGS) and isinstance(state, dict):
            target.state = state
        elif not isinstance(target, dict) and (kind is None or not kind.startswith(SETTINGS)):
            raise ContentError(f"a pickle that changes an object of {brief(target)}")


class Storages(dict[str, Tensor]):
    """The storages of a torch file by key.

    make: returns a storage of a key, a type and a length, at its first use.
    """

    def __init__(self, make: Callable[[str, torch.dtype, int], Tensor]) -> None:
        self.make = make

    def find(self, description: Any) -> Tensor:
        """Return the storage that a pickle describes."""
        described = isinstance(description, tuple) and len(description) >= 5
        known = described and description[0] == "storage"
        check(known, "a pickle that refers to something else than a storage")
        _, kind, key, _, length, *view = description
        dtype = STORAGES.get(kind.path) if isinstance(kind, Name) else None
        if dtype is None or any(v is not None for v in view):
            raise ContentError("a storage of an unknown kind")
        sized = isinstance(key, str) and isinstance(length, int) and 0 <= length < 2**48
        check(sized, "a storage without a size")
        storage = self[key] if key in self else self.setdefault(key, self.make(key, dtype, length))
        check((storage.dtype, storage.numel()) == (dtype, length), "a storage of two kinds")
        return storage


def _fill_tensor(tensor: Tensor, stream: Any) -> None:
    """Read exactly the bytes of a tensor of one axis."""
    content: Any = tensor.view(torch.uint8).numpy()
    check(stream.readinto(content) == len(content), "a file that ends early")


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
