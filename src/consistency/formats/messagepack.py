"""MessagePack as flax writes it: maps, lists, plain values and arrays, without JAX and without flax.

[MessagePack specification, https://github.com/msgpack/msgpack; the array extension of `flax.serialization`.] Every
length is held against the bytes that are left before memory is taken for it.
"""

import math
import struct
from typing import Any

import torch
from torch import Tensor

from consistency.formats.opened import ContentError

MAX_DEPTH = 32
MAX_VALUES = 2_000_000
ARRAY, SCALAR = 1, 3
"""Types of flax's extension values; an array and a scalar are stored alike."""

DTYPES = {
    b"float32": torch.float32,
    b"float64": torch.float64,
    b"float16": torch.float16,
    b"bfloat16": torch.bfloat16,
    b"int8": torch.int8,
    b"int16": torch.int16,
    b"int32": torch.int32,
    b"int64": torch.int64,
    b"uint8": torch.uint8,
    b"uint32": torch.uint32,
    b"bool": torch.bool,
}
NUMBERS = dict(zip(range(0xCA, 0xD4), ">f >d >B >H >I >Q >b >h >i >q".split(), strict=True))
"""First byte of a number -> its form in `struct`."""

LENGTHS = dict(zip((0, 1, 2), ">B >H >I".split(), strict=True))
"""How the length of a long value is written, by the last bits of its first byte."""


class Reader:
    """Reads one value after another from bytes. `raw` leaves text as bytes, as flax does inside an array."""

    def __init__(self, content: bytes | memoryview, *, raw: bool = False, depth: int = 0) -> None:
        self.content, self.place = memoryview(content), 0
        self.raw, self.depth, self.values = raw, depth, 0

    def take(self, length: int) -> memoryview:
        """The next `length` bytes."""
        if length > len(self.content) - self.place:
            raise ContentError("a file that ends early")
        self.place += length
        return self.content[self.place - length : self.place]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self) -> Any:
        """The next value, with all that is inside it."""
        self.values += 1
        if self.values > MAX_VALUES or self.depth > MAX_DEPTH:
            raise ContentError("more values, or deeper ones, than any checkpoint has")
        first = self.number(">B")
        if first <= 0x7F or first >= 0xE0:
            return first if first <= 0x7F else first - 0x100
        if first <= 0x8F:
            return self.mapping(first & 0x0F)
        if first <= 0x9F:
            return self.sequence(first & 0x0F)
        if first <= 0xBF:
            return self.text(first & 0x1F)
        if first in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[first]
        if 0xC4 <= first <= 0xC6:
            return self.take(self.number(LENGTHS[first - 0xC4]))
        if 0xC7 <= first <= 0xC9:
            return self.extension(self.number(LENGTHS[first - 0xC7]))
        if first in NUMBERS:
            return self.number(NUMBERS[first])
        if 0xD4 <= first <= 0xD8:
            return self.extension(1 << (first - 0xD4))
        if 0xD9 <= first <= 0xDB:
            return self.text(self.number(LENGTHS[first - 0xD9]))
        if first in (0xDC, 0xDD):
            return self.sequence(self.number(LENGTHS[first - 0xDB]))
        if first in (0xDE, 0xDF):
            return self.mapping(self.number(LENGTHS[first - 0xDD]))
        raise ContentError("a byte that begins no value")

    def text(self, length: int) -> Any:
        content = bytes(self.take(length))
        return content if self.raw else content.decode()

    def inside(self, count: int) -> range:
        """Steps into a container of `count` values, each of which takes at least one byte."""
        if count > len(self.content) - self.place:
            raise ContentError("a file that ends early")
        self.depth += 1
        return range(count)

    def sequence(self, count: int) -> list[Any]:
        items = [self.value() for _ in self.inside(count)]
        self.depth -= 1
        return items

    def mapping(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in self.inside(count):
            key = self.value()
            if not isinstance(key, str) or key in found:
                raise ContentError("a map whose keys are not different names")
            found[key] = self.value()
        self.depth -= 1
        return found

    def extension(self, length: int) -> Tensor:
        """An array: (shape, name of its type, bytes), itself in MessagePack."""
        kind = self.number(">b")
        inner = Reader(self.take(length), raw=True, depth=self.depth + 1)
        if kind not in (ARRAY, SCALAR):
            raise ContentError("a value that is no array")
        parts = inner.value()
        if not isinstance(parts, list) or len(parts) != 3 or inner.place != length:
            raise ContentError("an array without its three parts")
        shape, name, content = parts
        whole = isinstance(shape, list) and len(shape) <= 8
        if not whole or not all(isinstance(n, int) and 0 <= n < 2**40 for n in shape):
            raise ContentError("an array with an impossible shape")
        if not isinstance(name, bytes) or name not in DTYPES:
            raise ContentError("an array of an unknown type")
        dtype = DTYPES[name]
        if (
            not isinstance(content, bytes | memoryview)
            or len(content) != math.prod(shape) * dtype.itemsize
        ):
            raise ContentError("an array of another size than its shape")
        if not len(content):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def read_messagepack(content: bytes | memoryview) -> Any:
    """The one value that `content` consists of."""
    reader = Reader(content)
    found = reader.value()
    if reader.place != len(content):
        raise ContentError("more bytes than the file declares")
    return found
