"""Builders of malformed and hostile checkpoint files."""

import pickle
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import foreign


class Call:
    """An object that pickles as a call of a function by name."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def archive(
    path: Path, program: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes
) -> Path:
    """Write a torch archive with correct checksums around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", program)
        for key, content in records.items():
            file.writestr(f"archive/data/{key.removeprefix('r')}", content)
    return path


def tensor_program(
    length: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> bytes:
    """Return the pickle of a state dict whose one tensor is a view of a storage of `length` numbers."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += number(length) + b"tQ"
    view = b"(" + storage + number(offset) + numbers(size) + numbers(stride) + b"\x89}t"
    names = text("time_embed.0.weight"), text("input_blocks.0.0.weight")
    items = b"".join(name + b"ctorch._utils\n_rebuild_tensor_v2\n" + view + b"R" for name in names)
    return b"\x80\x02}(" + items + b"u."


def nested_pickle(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * (levels + 1) + b"a" * levels + b"."


def doubled(levels: int) -> list[Any]:
    """Return nested lists that each hold the next one twice: short to store, endless to print or compare."""
    inner: list[Any] = []
    for _ in range(levels):
        inner = [inner, inner]
    return inner


def safetensors_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def older_program(length: int) -> bytes:
    """Return a file of torch's older format with a storage that claims `length` numbers."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    program = b"".join(pickle.dumps(part, 2) for part in parts)
    return program + tensor_program(length, 0, (4,), (1,)) + pickle.dumps(["0"], 2) + b"\x00" * 8


def nvlabs_meta(class_name: str, state: dict[str, Any]) -> foreign.PlainPersistent:
    made = foreign.PlainPersistent(class_name)
    made.attributes = state
    return made


def write_persistent(path: Path, ema: Any) -> Path:
    with foreign.persistence():
        path.write_bytes(pickle.dumps({"ema": ema}))
    return path


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail if reading a file takes more seconds of processor time."""

    def stop(*_: object) -> None:
        raise BaseException("a checkpoint made its reader hang")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
