"""Functions that stand for the names which the pickles of checkpoints call: none of those names is looked up."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency.checkpoints.contents import ContentError

MAX_ODD_KEYS = 20_000
"""Dictionary keys that are not strings: their hashes are not random, so many could be made to collide."""

Key = str | int | float | bytes | None
"""Types of keys. None of them nests, because the hash of a deeply nested tuple overflows the stack."""

STORAGES = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
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


def brief(value: object) -> str:
    """Return a value from a file, short enough for a message; never a container, which could be endless."""
    if isinstance(value, Name):
        return value.path
    if isinstance(value, str):
        return repr(value[:80])
    short = value is None or isinstance(value, float | bool)
    if short or (isinstance(value, int) and abs(value) < 1 << 63):
        return str(value)
    return type(value).__name__


def check(holds: object, fault: str) -> None:
    """Raise `ContentError` for a fault of the content."""
    if not holds:
        raise ContentError(fault)


def _ordered_dict(pairs: object = ()) -> dict[Any, Any]:
    items: list[Any] = list(pairs) if isinstance(pairs, list | tuple) else [None]
    paired = all(isinstance(i, list | tuple) and len(i) == 2 for i in items)
    known = paired and len(items) <= MAX_ODD_KEYS and all(isinstance(i[0], Key) for i in items)
    check(known, "an ordered dictionary made of something else than pairs")
    return {key: value for key, value in items}


def _tensor(storage: object, offset: Any, size: object, stride: object, *_: object) -> Tensor:
    """Return a view of a storage, inside it and without overlap, so that it cannot be larger than the file."""
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise ContentError("a tensor without a storage")
    if not isinstance(size, tuple | list) or not isinstance(stride, tuple | list):
        raise ContentError("a tensor without a shape")
    whole = all(isinstance(n, int) and 0 <= n < 2**48 for n in (offset, *size, *stride))
    possible = whole and len(size) == len(stride) and len(size) <= 8
    check(possible, "a tensor with an impossible shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = not count or (count <= storage.numel() and last < storage.numel())
    check(inside, "a tensor that reaches out of its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset) if count else storage[:0]


def _parameter(data: object, *_: object) -> Tensor:
    """Return a parameter's tensor; attributes that somebody gave it are left out."""
    if not isinstance(data, Tensor):
        raise ContentError("a parameter without a tensor")
    return data


def _tensor_with_state(function: object, _: object, arguments: object, *__: object) -> Any:
    """Return a tensor without the attributes that somebody gave it."""
    call = CALLS.get(function.path) if isinstance(function, Name) else None
    if call not in (_tensor, _parameter) or not isinstance(arguments, tuple):
        raise ContentError(f"a tensor made by {brief(function)}")
    return call(*arguments)


def _persistent(meta: object) -> Object:
    """Return an object of NVlabs' `torch_utils.persistence`; the source of its class, stored beside it, is not read."""
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise ContentError("a persistent object without a state")
    return Object(brief(meta.get("class_name")).strip("'"), meta["state"])


def _number_type(code: object, *_: object) -> Object:
    text = code.decode("latin1") if isinstance(code, bytes) else code
    if not isinstance(text, str) or text.lstrip("<>=|") not in NUMBERS:
        raise ContentError(f"a number of type {brief(code)}")
    return Object("numpy.dtype", text.lstrip("<=|"))


def _numbers(kind: object, content: object) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the numbers in bytes, in this machine's order; Python 2 wrote bytes as text."""
    stored = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(kind, Object) or kind.kind != "numpy.dtype" or not isinstance(stored, bytes):
        raise ContentError("a number without a type")
    dtype = np.dtype(kind.state)
    return np.frombuffer(stored, dtype=dtype).astype(dtype.newbyteorder("="))


def _number(kind: object, content: object) -> Any:
    numbers = _numbers(kind, content)
    check(numbers.size == 1, "a number of another length than its type")
    return numbers.item()


def array(state: object) -> Tensor:
    """Return the array that numpy describes as (version, shape, type, whether it is stored by columns, bytes)."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise ContentError("an array without a description")
    _, shape, kind, by_column, content = state
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ContentError("an array without a shape")
    numbers = _numbers(kind, content)
    same = len(shape) <= 8 and math.prod(shape) == numbers.size
    check(same, "an array of another size than its shape")
    rows = numbers.reshape(shape, order="F" if by_column else "C")
    return torch.from_numpy(np.ascontiguousarray(rows).reshape(shape))


def _blank_array(*_: object) -> Object:
    """Stand for an array whose content comes later, as its state."""
    return Object("numpy.ndarray", None)


def _array_from_buffer(content: object, kind: object, shape: object, order: object) -> Object:
    """Return an array as protocol 5 writes it."""
    stored = bytes(content) if isinstance(content, bytearray) else content
    return Object("numpy.ndarray", array((1, shape, kind, order == "F", stored)))


def _no_bytes(*arguments: object) -> bytes:
    """Return bytes of no length, as protocol 2 writes them."""
    check(not arguments, "bytes made of something else")
    return b""


def _size(numbers: object = ()) -> tuple[Any, ...]:
    if not isinstance(numbers, tuple | list):
        raise ContentError("a size that is no row of numbers")
    return tuple(numbers)


def _encoded(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise ContentError("bytes in an unknown encoding")
    return text.encode("latin1")


def set_of_names(items: object = ()) -> set[Any]:
    if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
        raise ContentError("a set of something else than names")
    return set(items)


def _method(owner: object, name: object) -> Object:
    """Stand for a method of a persistent object, as the loss of ECT holds one."""
    if not isinstance(owner, Object) or not isinstance(name, str):
        raise ContentError(f"a pickle that asks for the attribute {brief(name)} of {brief(owner)}")
    return Object("method", None)


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda *_: {},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_state,
    "torch.Size": _size,
    "torch.device": lambda *_: Object("setting", None),
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "numpy.dtype": _number_type,
    "_codecs.encode": _encoded,
    "builtins.getattr": _method,
    **{f"{module}.set": set_of_names for module in ("builtins", "__builtin__")},
    **{f"{module}.bytes": _no_bytes for module in ("builtins", "__builtin__")},
    **{f"numpy.{core}.multiarray.scalar": _number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _blank_array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
}
COPIES = {
    *(
        name
        for name, call in CALLS.items()
        if call in (_ordered_dict, _encoded, set_of_names, _size)
    ),
    *("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
    "torch.storage._load_from_bytes",
}
"""Calls that copy their argument: a short pickle could fill the memory by repeating them."""
