"""Pickles and torch files, read as data: no name inside them is resolved and nothing inside them is called.

A pickle is a program for a small stack machine. The standard library's interpreter in Python carries out the instructions
that make plain values; `Machine` replaces those that import and call: a name stays a `Name`, functions of `CALLS` stand for
those that checkpoints call, and any other name is refused. The arguments come from the file and may be anything.

Three containers hold such programs: a bare pickle (NVlabs), a zip archive (`torch.save`), and the older torch form,
which is also how a bare pickle stores its tensors. Sizes are checked before memory is taken, the zip checksums (which
torch ignores) are verified, and tensors must lie inside their storages.
"""

import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
import torch
from torch import Tensor

from consistency.checkpoints.contents import ContentError, Name, Object, brief, check

CARD, OPENAI = "consistency.json", "OpenAI"
"""The record of a torch archive that holds our card, which torch ignores, and the format of such a file."""

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two values of the older torch form."""

MAX_INSTRUCTIONS, MAX_ODD_KEYS = 2_000_000, 20_000
"""Odd keys of dictionaries are not strings: their hashes are not random, so many could be made to collide."""

Key = str | int | float | bytes | None
"""Types of keys. None of them nests, because the hash of a deeply nested tuple overflows the stack."""

ARRAY = "numpy.ndarray"
NUMBERS = {f"{kind}{size}" for kind in "fiu" for size in (1, 2, 4, 8)} - {"f1"} | {"b1"}
"""numpy types of numbers, by kind and bytes."""

STORAGES = {
    **{"torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64},
    **{"torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16},
    **{"torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32},
    **{"torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8},
    **{"torch.ByteStorage": torch.uint8, "torch.BoolStorage": torch.bool},
}


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    known = len(pairs) <= MAX_ODD_KEYS and all(isinstance(key, Key) for key, _ in pairs)
    check(known, "an ordered dictionary with keys that no checkpoint has")
    return dict(pairs)


def _set_of_names(items: Any = ()) -> set[str]:
    check(all(isinstance(item, str) for item in items), "a set of something else than names")
    return set(items)


def _encoded(text: str, encoding: object) -> bytes:
    check(encoding == "latin1", "bytes in an unknown encoding")
    return bytes(text, "latin1")


def _method(owner: object, name: object) -> Object:
    """Stand for a method of a persistent object, as the loss of ECT holds one."""
    known = isinstance(owner, Object) and isinstance(name, str)
    check(known, f"a pickle that asks for the attribute {brief(name)} of {brief(owner)}")
    return Object("method")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> Tensor:
    """Return a view of a storage, inside it and without overlap, so that it cannot be larger than the file."""
    check(isinstance(storage, Tensor) and storage.ndim == 1, "a tensor without a storage")
    sides = (offset, *size, *stride)
    whole = all(isinstance(n, int) and 0 <= n < 2**48 for n in sides)
    check(whole and len(size) == len(stride) <= 8, "a tensor with an impossible shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = not count or max(count, last + 1) <= storage.numel()
    check(inside, "a tensor that reaches out of its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset) if count else storage[:0]


def _storage_from_bytes(content: bytes) -> Any:
    """Return a storage that a bare pickle holds as a file in the older torch form."""
    stream = io.BytesIO(content)
    storage = read_older(stream, len(content))
    check(not stream.read(1), "a storage with more bytes than it declares")
    return storage


def _number_type(code: object, *_: object) -> Object:
    text = code.decode("latin1") if isinstance(code, bytes) else code
    if not isinstance(text, str) or text.lstrip("<>=|") not in NUMBERS:
        raise ContentError(f"a number of type {brief(code)}")
    return Object("numpy.dtype", np.dtype(text))


def _numbers(kind: Any, content: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the numbers in bytes, in this machine's order; Python 2 wrote bytes as text."""
    stored = content.encode("latin1") if isinstance(content, str) else content
    check(isinstance(kind.state, np.dtype), "a number without a type")
    return np.frombuffer(stored, kind.state).astype(kind.state.newbyteorder("="))


def _array(shape: Any, kind: object, by_column: object, content: object) -> Tensor:
    whole = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    check(whole, "an array without a shape")
    values = _numbers(kind, content)
    same = len(shape) <= 8 and math.prod(shape) == values.size
    check(same, "an array of another size than its shape")
    rows = values.reshape(shape, order="F" if by_column else "C")
    return torch.from_numpy(np.ascontiguousarray(rows).reshape(shape))


TENSORS: dict[str, Callable[..., Tensor]] = {
    **{f"torch._utils._rebuild_{name}": _tensor for name in ("tensor", "tensor_v2")},
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}
COPIES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": tuple,
    "torch.storage._load_from_bytes": _storage_from_bytes,
    "_codecs.encode": _encoded,
    "builtins.set": _set_of_names,
    "numpy.core.numeric._frombuffer": lambda content, kind, shape, order: Object(
        ARRAY, _array(shape, kind, order == "F", content)
    ),
}
"""Calls that copy their argument: a short pickle could fill the memory by repeating them."""

MODULES = [f"torch.nn.modules.container.{k}" for k in ("ModuleDict", "ModuleList", "Sequential")]
CALLS: dict[str, Callable[..., Any]] = {
    **COPIES,
    **TENSORS,
    **{path: partial(Object, path) for path in MODULES},
    "collections.defaultdict": lambda *_: {},
    "torch._tensor._rebuild_from_type_v2": lambda name, _, arguments, *__: TENSORS[name.path](
        *arguments
    ),
    "torch.device": lambda *_: Object("setting"),
    "torch_utils.persistence._reconstruct_persistent_obj": lambda meta: Object(
        brief(meta["class_name"]).strip("'"), meta["state"]
    ),
    "builtins.bytes": lambda: b"",
    "builtins.getattr": _method,
    "numpy.dtype": _number_type,
    "numpy.core.multiarray.scalar": lambda kind, content: _numbers(kind, content).item(),
    "numpy.core.multiarray._reconstruct": lambda *_: Object(ARRAY),
}
"""Functions that stand for those which checkpoints call; a persistent object's source, beside its state, is not read."""

DICTIONARIES = (".EasyDict", ".AttrDict", ".AttributeDict", ".Namespace")
"""Classes, wherever they come from, that are dictionaries with their keys as attributes."""

SETTINGS = ("omegaconf.", "typing.", "pathlib.")
"""Packages whose objects stand beside weights, as settings: kept unread, whatever they are."""

KNOWN = {
    *(*CALLS, *STORAGES, *map(str, STORAGES.values()), ARRAY),
    *("torch.strided", "torch.Tensor", "torch.nn.parameter.Parameter"),
    *(f"builtins.{kind}" for kind in "dict list int long float str unicode bool tuple".split()),
}
"""Names that a pickle may hold; those that are not called stand for themselves."""

REFUSED = "persid inst obj newobj_ex ext1 ext2 ext4 frozenset next_buffer readonly_buffer"
"""Instructions that no checkpoint needs."""

Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class Instructions(dict[int, Callable[[Any], None]]):
    """The methods of `Machine` by the codes of instructions, counted as they are looked up."""

    count = 0

    @no_type_check  # a checkpoint has tens of thousands of instructions
    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.count += 1
        if self.count > MAX_INSTRUCTIONS:
            raise ContentError("a pickle of more parts than any checkpoint has")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable[[Any], None]:
        method = Unpickler.dispatch[code].__name__
        name = method.removeprefix("load_")
        if name in REFUSED.split():
            raise ContentError(f"a pickle with the instruction {name.upper()}")
        return self.setdefault(code, getattr(Machine, method))


class Machine(Unpickler):
    """The interpreter of one pickle from a source of `total` bytes.

    make_storage: makes a storage of a torch file, a tensor of one axis, by key, type and length.
    """

    def __init__(self, total: int, make_storage: Callable[..., Tensor] | None = None) -> None:
        self.make_storage, self.storages = make_storage, dict[str, Tensor]()
        self.odd_keys, self.to_copy = 0, 2 * total
        self.dispatch = Instructions()

    def run(self, program: bytes | io.BufferedIOBase) -> Any:
        """Return the value of a pickle: bytes, or a stream that stands at its beginning."""
        stream = io.BytesIO(program) if isinstance(program, bytes) else program
        super().__init__(stream, encoding="latin1")
        return self.load()

    def persistent_load(self, description: Any) -> Tensor:
        """Return the storage that a torch file describes, made at its first use."""
        if self.make_storage is None:
            raise ContentError("a pickle that refers to something outside of it")
        word, kind, key, _, length, *view = description
        dtype = STORAGES.get(kind.path)
        if word != "storage" or dtype is None or any(v is not None for v in view):
            raise ContentError("a storage of an unknown kind")
        sized = isinstance(key, str) and isinstance(length, int) and 0 <= length < 2**48
        check(sized, "a storage without a size")
        if key not in self.storages:
            self.storages[key] = self.make_storage(key, dtype, length)
        storage = self.storages[key]
        check((storage.dtype, storage.numel()) == (dtype, length), "a storage of two kinds")
        return storage

    def find_class(self, module: str, name: str) -> Name:
        """Return a name, if it is one of those that checkpoints are made of."""
        path = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        path = path.replace("__builtin__.", "builtins.")
        known = path in KNOWN or path.startswith(SETTINGS) or path.endswith(DICTIONARIES)
        check(known, f"a pickle that asks for {path[:120]}, which no checkpoint needs")
        return Name(path)

    def load_bytearray8(self) -> None:
        self.stack.append(bytearray(self.read(*struct.unpack("<Q", self.read(8)))))

    def load_additems(self) -> None:
        names = _set_of_names(self.pop_mark())
        check(isinstance(self.stack[-1], set), "a pickle that adds to something else than a set")
        self.stack[-1].update(names)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.fill(items)

    def load_setitem(self) -> None:
        self.fill([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self.fill(self.pop_mark())

    def fill(self, items: list[Any]) -> None:
        """Put keys and values, in turn, into the dictionary on top of the stack."""
        target, keys = self.stack[-1], items[::2]
        check(isinstance(target, dict), "a pickle that fills something else than a dictionary")
        self.odd_keys += sum(not isinstance(key, str) for key in keys)
        plain = self.odd_keys <= MAX_ODD_KEYS and all(isinstance(key, Key) for key in keys)
        check(plain, "a pickle with keys that no checkpoint has")
        target.update(zip(keys, items[1::2], strict=True))

    def load_reduce(self) -> None:
        """Replace a class or function and its arguments by the result of the function that stands for it."""
        arguments, function = self.stack.pop(), self.stack.pop()
        path = function.path if isinstance(function, Name) else ""
        if path.startswith(SETTINGS):
            self.stack.append(Object(path))
        elif path.endswith(DICTIONARIES) and arguments == ():
            self.stack.append({})
        else:
            if path not in CALLS:
                raise ContentError(f"a pickle that calls {brief(function)}")
            check(isinstance(arguments, tuple), f"a pickle that calls {path} without arguments")
            if path in COPIES:
                self.count_copy(*arguments[:1])
            self.stack.append(CALLS[path](*arguments))

    load_newobj = load_reduce

    def count_copy(self, content: Any = ()) -> None:
        """Add up the sizes of all that is copied, and refuse more than the file could mean."""
        self.to_copy -= len(content) * (1 if isinstance(content, str | bytes | bytearray) else 100)
        check(self.to_copy >= 0, "a pickle that copies its own content over and over")

    def load_build(self) -> None:
        """Give an object its state; that of a dictionary is left out, because it holds no weights."""
        state, target = self.stack.pop(), self.stack[-1]
        kind = target.kind if isinstance(target, Object) else None
        if kind == "numpy.dtype":
            target.state = target.state.newbyteorder(state[1])
        elif kind == ARRAY:
            check(isinstance(state, tuple) and len(state) == 5, "an array without a description")
            self.count_copy(state[4])
            target.state = _array(*state[1:])
        elif kind is not None:
            target.state = state
        elif not isinstance(target, dict):
            raise ContentError(f"a pickle that changes an object of {brief(target)}")


def _fill_tensor(tensor: Tensor, stream: Any) -> None:
    """Read exactly the bytes of a tensor of one axis."""
    content: Any = tensor.view(torch.uint8).numpy()
    check(stream.readinto(content) == len(content), "a file that ends early")


def read_zip(path: Path) -> Any:
    """Return the content of a torch archive; `card`, `weights` and `format` if it has the record `CARD`.

    Every record used is checked by its CRC.
    """
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        stored = all(r.compress_type == zipfile.ZIP_STORED for r in records.values())
        inside = sum(r.file_size for r in records.values()) <= path.stat().st_size
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

        content = Machine(records[programs[0]].file_size, storage).run(archive.read(programs[0]))
        if f"{root}{CARD}" not in records:
            return content
        card = json.loads(archive.read(f"{root}{CARD}"))
        return {"card": card, "weights": content, "format": OPENAI}


def read_older(stream: io.BufferedIOBase, total: int) -> Any:
    """Return the content of a file of `total` bytes in the form of torch before 1.6: pickles, then storages."""
    for expected in (MAGIC, PROTOCOL):
        check(Machine(total).run(stream) == expected, "a pickle that is no checkpoint")
    little = Machine(total).run(stream)["little_endian"] is True
    check(little, "a torch file with its bytes in reverse")
    taken = 0

    def storage(key: str, dtype: torch.dtype, length: int) -> Tensor:
        nonlocal taken
        taken += length * dtype.itemsize
        check(taken <= total, "storages larger than the file")
        return torch.empty(length, dtype=dtype)

    machine = Machine(total, storage)
    content, keys = machine.run(stream), Machine(total).run(stream)
    named = all(isinstance(key, str) for key in keys)
    complete = named and sorted(keys) == sorted(machine.storages)
    check(complete, "a torch file without all of its storages")
    for key in keys:
        tensor = machine.storages[key]
        whole = stream.read(8) == struct.pack("<q", tensor.numel())
        check(whole, "a storage that is not of its full length")
        _fill_tensor(tensor, stream)
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
