"""MessagePack as flax writes it: maps, lists, plain values and arrays, without JAX and without flax.

`msgpack` holds every length against that of the file before it takes memory. Arrays are the extension of `flax.serialization`.
"""

import math
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints.contents import ContentError, check

MOST_ITEMS = 100_000
"""Items of a list or a map, of which no checkpoint has as many."""

DTYPES: dict[bytes, torch.dtype] = {
    name.encode(): getattr(torch, name)
    for name in "float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 uint32 bool".split()
}


def read_messagepack(path: Path) -> Any:
    """Return the one value that a file consists of."""
    import msgpack  # needed for this format alone

    hooks = {"object_pairs_hook": _mapping, "ext_hook": _array, "strict_map_key": False}
    most = {"max_array_len": MOST_ITEMS, "max_map_len": MOST_ITEMS}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return msgpack.unpackb(content, **hooks, **most)
        except ContentError:
            raise
        except ValueError as error:
            reason = f"{type(error).__name__} {error}".strip()
            fault = "ends early or late, or holds more values, or deeper ones, than any checkpoint"
            raise ContentError(f"a MessagePack file that {fault} ({reason[:120]})") from error


def _mapping(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    named = all(isinstance(key, str) for key, _ in pairs) and len(dict(pairs)) == len(pairs)
    check(named, "a map whose keys are not different names")
    return dict(pairs)


def _array(kind: int, content: bytes) -> Tensor:
    """Return an array (kind 1) or a scalar (3) of flax: (shape, name of its type, bytes), itself in MessagePack."""
    import msgpack

    check(kind in (1, 3), "a value that is no array")
    shape, name, values = msgpack.unpackb(content, raw=True)
    sides = shape if isinstance(shape, list) and len(shape) <= 8 else [None]
    possible = all(isinstance(n, int) and 0 <= n < 2**40 for n in sides)
    check(possible, "an array with an impossible shape")
    check(name in DTYPES, "an array of an unknown type")
    dtype = DTYPES[name]
    size = math.prod(shape) * dtype.itemsize
    check(len(values) == size, "an array of another size than its shape")
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(values), dtype=dtype).reshape(shape)
