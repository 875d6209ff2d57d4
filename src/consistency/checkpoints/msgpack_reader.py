"""MessagePack as flax writes it: maps, lists, plain values and arrays, without JAX and without flax.

[MessagePack specification, https://github.com/msgpack/msgpack; the array extension of `flax.serialization`.] Every
length is held against the bytes that are left before memory is taken for it.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints.contents import ContentError, check

MAX_DEPTH = 32
MAX_VALUES = 2_000_000
EXTENSIONS = (1, 3)
"""Types of flax's arrays and scalars, which are stored alike."""

DTYPES: dict[object, torch.dtype] = {
    name.encode(): getattr(torch, name)
    for name in "float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 uint32 bool".split()
}
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
NUMBERS = dict(zip(range(0xCA, 0xD4), ">f >d >B >H >I >Q >b >h >i >q".split(), strict=True))
"""First byte of a number -> its form in `struct`."""

SHORT = ((0x80, 0x8F, "mapping"), (0x90, 0x9F, "sequence"), (0xA0, 0xBF, "text"))
"""Ranges of first bytes that hold a short length -> the method that reads the rest."""

LONG = {
    first + i: (method, form)
    for first, method, forms in (
        (0xC4, "take", (">B", ">H", ">I")),
        (0xC7, "extension", (">B", ">H", ">I")),
        (0xD9, "text", (">B", ">H", ">I")),
        (0xDC, "sequence", (">H", ">I")),
        (0xDE, "mapping", (">H", ">I")),
    )
    for i, form in enumerate(forms)
}
"""First byte of a long value -> the method that reads it, and the form of the length that follows."""


class Reader:
    """A reader of one value after another from bytes. `raw` leaves text as bytes, as flax does inside an array."""

    def __init__(self, content: bytes | memoryview, *, raw: bool = False, depth: int = 0) -> None:
        self.content, self.offset = memoryview(content), 0
        self.raw, self.depth, self.values = raw, depth, 0

    def take(self, length: int) -> memoryview:
        """Return the next `length` bytes."""
        self.require(length)
        self.offset += length
        return self.content[self.offset - length : self.offset]

    def require(self, length: int) -> None:
        check(length <= len(self.content) - self.offset, "a file that ends early")

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self) -> Any:
        """Return the next value, with all that is inside it."""
        self.values += 1
        few = self.values <= MAX_VALUES and self.depth <= MAX_DEPTH
        check(few, "more values, or deeper ones, than any checkpoint has")
        first = self.number(">B")
        if first <= 0x7F or first >= 0xE0:
            return first if first <= 0x7F else first - 0x100
        for low, high, method in SHORT:
            if low <= first <= high:
                return getattr(self, method)(first - low)
        if first in CONSTANTS:
            return CONSTANTS[first]
        if first in NUMBERS:
            return self.number(NUMBERS[first])
        if first in LONG:
            method, form = LONG[first]
            return getattr(self, method)(self.number(form))
        if 0xD4 <= first <= 0xD8:
            return self.extension(1 << (first - 0xD4))
        raise ContentError("a byte that begins no value")

    def text(self, length: int) -> Any:
        content = bytes(self.take(length))
        return content if self.raw else content.decode()

    def sequence(self, count: int) -> list[Any]:
        self.require(count)  # every value takes at least one byte
        self.depth += 1
        items = [self.value() for _ in range(count)]
        self.depth -= 1
        return items

    def mapping(self, count: int) -> dict[str, Any]:
        self.require(count)
        self.depth += 1
        items: dict[str, Any] = {}
        for _ in range(count):
            key = self.value()
            new = isinstance(key, str) and key not in items
            check(new, "a map whose keys are not different names")
            items[key] = self.value()
        self.depth -= 1
        return items

    def extension(self, length: int) -> Tensor:
        """Return an array: (shape, name of its type, bytes), itself in MessagePack."""
        kind = self.number(">b")
        inner = Reader(self.take(length), raw=True, depth=self.depth + 1)
        check(kind in EXTENSIONS, "a value that is no array")
        parts = inner.value()
        whole = isinstance(parts, list) and len(parts) == 3 and inner.offset == length
        check(whole, "an array without its three parts")
        shape, name, content = parts
        sides = shape if isinstance(shape, list) and len(shape) <= 8 else [None]
        possible = all(isinstance(n, int) and 0 <= n < 2**40 for n in sides)
        check(possible, "an array with an impossible shape")
        dtype = DTYPES.get(name) if isinstance(name, bytes) else None
        if dtype is None:
            raise ContentError("an array of an unknown type")
        size = math.prod(shape) * dtype.itemsize
        full = isinstance(content, bytes | memoryview) and len(content) == size
        check(full, "an array of another size than its shape")
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def read_messagepack(path: Path) -> Any:
    """Return the one value that a file consists of."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = Reader(memoryview(content))
    value = reader.value()
    check(reader.offset == len(content), "more bytes than the file declares")
    return value
