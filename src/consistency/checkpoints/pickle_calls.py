"""Functions that stand for the names which the pickles of checkpoints call: none of those names is looked up.

Their arguments come from the file and may be anything.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency.checkpoints.contents import ContentError, check

MAX_ODD_KEYS = 20_000
"""Dictionary keys that are not strings: their hashes are not random, so many could be made to collide."""

Key = str | int | float | bytes | None
"""Types of keys. None of them nests, because the hash of a deeply nested tuple overflows the stack."""

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


def ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    listed = isinstance(pairs, list | tuple) and len(pairs) <= MAX_ODD_KEYS
    known = listed and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], Key)
        for pair in pairs
    )
    check(known, "an ordered dictionary made of something else than pairs")
    return dict(pairs)


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> Tensor:
    """Return a view of a storage, inside it and without overlap, so that it cannot be larger than the file."""
    check(isinstance(storage, Tensor) and storage.ndim == 1, "a tensor without a storage")
    shaped = isinstance(size, tuple | list) and isinstance(stride, tuple | list)
    possible = (
        shaped
        and len(size) == len(stride) <= 8
        and all(isinstance(n, int) and 0 <= n < 2**48 for n in (offset, *size, *stride))
    )
    check(possible, "a tensor with an impossible shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = not count or max(count, last + 1) <= storage.numel()
    check(inside, "a tensor that reaches out of its storage")
    view: Tensor = storage.as_strided(tuple(size), tuple(stride), offset) if count else storage[:0]
    return view


def parameter(data: Any, *_: object) -> Tensor:
    """Return a parameter's tensor; attributes that somebody gave it are left out."""
    check(isinstance(data, Tensor), "a parameter without a tensor")
    assert isinstance(data, Tensor)
    return data


TENSORS: dict[Name, Callable[..., Tensor]] = {
    Name("torch._utils._rebuild_tensor"): tensor,
    Name("torch._utils._rebuild_tensor_v2"): tensor,
    Name("torch._utils._rebuild_parameter"): parameter,
    Name("torch._utils._rebuild_parameter_with_state"): parameter,
}


def tensor_with_state(function: Any, _: object, arguments: Any, *__: object) -> Tensor:
    """Return a tensor without the attributes that somebody gave it."""
    known = isinstance(function, Name) and function in TENSORS and isinstance(arguments, tuple)
    check(known, f"a tensor made by {brief(function)}")
    return TENSORS[function](*arguments)


def persistent(meta: Any) -> Object:
    """Return an object of NVlabs' `torch_utils.persistence`; the source of its class, stored beside it, is not read."""
    stateful = isinstance(meta, dict) and isinstance(meta.get("state"), dict)
    check(stateful, "a persistent object without a state")
    return Object(brief(meta.get("class_name")).strip("'"), meta["state"])


def number_type(code: object, *_: object) -> Object:
    text = code.decode("latin1") if isinstance(code, bytes) else code
    if not isinstance(text, str) or text.lstrip("<>=|") not in NUMBERS:
        raise ContentError(f"a number of type {brief(code)}")
    return Object("numpy.dtype", text.lstrip("<=|"))


def numbers(kind: object, content: object) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the numbers in bytes, in this machine's order; Python 2 wrote bytes as text."""
    stored = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(kind, Object) or kind.kind != "numpy.dtype" or not isinstance(stored, bytes):
        raise ContentError("a number without a type")
    dtype = np.dtype(kind.state)
    return np.frombuffer(stored, dtype=dtype).astype(dtype.newbyteorder("="))


def number(kind: object, content: object) -> Any:
    values = numbers(kind, content)
    check(values.size == 1, "a number of another length than its type")
    return values.item()


def array(state: Any) -> Tensor:
    """Return the array that numpy describes as (version, shape, type, whether it is stored by columns, bytes)."""
    check(isinstance(state, tuple) and len(state) == 5, "an array without a description")
    _, shape, kind, by_column, content = state
    whole = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    check(whole, "an array without a shape")
    values = numbers(kind, content)
    same = len(shape) <= 8 and math.prod(shape) == values.size
    check(same, "an array of another size than its shape")
    rows = values.reshape(shape, order="F" if by_column else "C")
    return torch.from_numpy(np.ascontiguousarray(rows).reshape(shape))


def array_from_buffer(content: object, kind: object, shape: object, order: object) -> Object:
    """Return an array as protocol 5 writes it."""
    stored = bytes(content) if isinstance(content, bytearray) else content
    return Object("numpy.ndarray", array((1, shape, kind, order == "F", stored)))


def no_bytes(*arguments: object) -> bytes:
    """Return bytes of no length, as protocol 2 writes them."""
    check(not arguments, "bytes made of something else")
    return b""


def size(sides: Any = ()) -> tuple[Any, ...]:
    check(isinstance(sides, tuple | list), "a size that is no row of numbers")
    return tuple(sides)


def encoded(text: Any, encoding: object) -> bytes:
    check(isinstance(text, str) and encoding == "latin1", "bytes in an unknown encoding")
    return bytes(text, "latin1")


def set_of_names(items: Any = ()) -> set[Any]:
    names = isinstance(items, list | tuple) and all(isinstance(i, str) for i in items)
    check(names, "a set of something else than names")
    return set(items)


def method(owner: object, name: object) -> Object:
    """Stand for a method of a persistent object, as the loss of ECT holds one."""
    known = isinstance(owner, Object) and isinstance(name, str)
    check(known, f"a pickle that asks for the attribute {brief(name)} of {brief(owner)}")
    return Object("method", None)
