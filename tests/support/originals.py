"""Writers of small data sets in the exact file formats of the originals."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]


def noise(*shape: int, seed: int = 0) -> Array:
    """Draw random grey values."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# CIFAR-10: what Python 2's pickle wrote, protocol 2, with text for bytes


def _text(value: bytes) -> bytes:
    short = len(value) < 256
    return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value


def _integer(value: int) -> bytes:
    if value < 256:
        return b"K" + bytes([value])
    return b"M" + struct.pack("<H", value) if value < 65536 else b"J" + struct.pack("<i", value)


def cifar_batch(
    rows: Array, labels: Sequence[int], title: bytes = b"training batch 1 of 5"
) -> bytes:
    """Return a pickled batch; rows (n, 3072) hold 1,024 red, then green, then blue values."""
    kind = b"cnumpy\ndtype\n" + _text(b"u1") + b"K\x00K\x01\x87R(K\x03" + _text(b"|") + b"NNN"
    kind += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _text(b"b") + b"\x87R"
    )
    array += (
        b"(K\x01" + _integer(rows.shape[0]) + _integer(rows.shape[1]) + b"\x86" + kind + b"\x89"
    )
    array += _text(rows.tobytes()) + b"tb"
    listed = b"](" + b"".join(_integer(label) for label in labels) + b"e"
    names = b"](" + b"".join(_text(b"image_%d.png" % i) for i in range(len(labels))) + b"e"
    content = _text(b"batch_label") + _text(title) + _text(b"labels") + listed
    return b"\x80\x02}(" + content + _text(b"data") + array + _text(b"filenames") + names + b"u."


def write_cifar(root: Path, per_batch: int = 20) -> tuple[Array, list[int]]:
    """Write cifar-10-batches-py with five training batches and a test batch.

    Return the images (n, 3, 32, 32) and labels in order.
    """
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = noise(6 * per_batch, 3072)
    labels = [i % 10 for i in range(len(rows))]
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(number * per_batch, (number + 1) * per_batch)
        (folder / name).write_bytes(cifar_batch(rows[part], labels[part]))
    return rows.reshape(-1, 3, 32, 32), labels


# (Fashion-)MNIST


def idx(array: Array) -> bytes:
    """Return an array of bytes as an IDX file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(
    folder: Path, counts: tuple[int, int] = (30, 10), packed: bool = True
) -> tuple[Array, Array]:
    """Write the four files; return the images (n, 28, 28) and labels of both splits in order."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = noise(sum(counts), 28, 28), (np.arange(sum(counts)) % 10).astype(np.uint8)
    for prefix, part in (("train", slice(0, counts[0])), ("t10k", slice(counts[0], None))):
        for name, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            content = idx(array)
            file = folder / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(content) if packed else content)
    return images, labels


# LSUN


def write_lmdb(folder: Path, values: Sequence[bytes]) -> None:
    """Write an LMDB with LSUN's keys: 40 hexadecimal digits, in order."""
    size = sum(map(len, values)) + (1 << 20)
    with lmdb.open(str(folder), map_size=size) as database, database.begin(write=True) as write:
        for number, value in enumerate(values):
            write.put(f"{number:040x}".encode(), value)


# NVlabs


def write_archive(target: Path, images: Sequence[tuple[str, bytes]], labels: Any = None) -> None:
    """Write a data set of NVlabs' dataset_tool: a zip or, without the suffix, a folder."""
    entries = [*images, ("dataset.json", json.dumps({"labels": labels}).encode())]
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for name, content in entries:
                archive.writestr(name, content)
        return
    for name, content in entries:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by name."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
