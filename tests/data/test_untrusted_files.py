"""Files from elsewhere stay in their folder and in bounds: archives and images."""

import gzip
import hashlib
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision import datasets

import originals
from conftest import REPORT
from consistency.data import zip_or_folder
from consistency.data.cifar10 import CIFAR10
from consistency.data.decode import MOST_BYTES, ImageError, decode, read_picture
from consistency.data.mnist import MNIST
from consistency.data.zip_or_folder import Archive
from consistency.errors import UserError

Record = Callable[[str, object], None]

# ------------------------------------------------------------------------------- images

SIDE = 8200
"""Of a square of a little more than `MOST_PIXELS`, of which Pillow itself has no objection."""


def png(width: int, height: int, rows: int | None = None) -> bytes:
    """A grey PNG, black throughout, a thousandth of its pixels in bytes; complete, unless it has other `rows`."""

    def part(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    packer, row = zlib.compressobj(1), bytes(width + 1)
    stored = b"".join(packer.compress(row) for _ in range(rows or height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", stored) + part(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6) + b",\0\0\0\0" + struct.pack(
        "<HH", width, height) + b"\0\x02\x02\x44\x01\0;"  # fmt: skip


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)  # fmt: skip


def bombs() -> dict[str, bytes]:
    return {
        "png": png(SIDE, SIDE),
        "wide.png": png(SIDE * 2, SIDE // 2 + 1),
        "gif": gif(SIDE, SIDE),
        "bmp": bmp(SIDE, SIDE),
        "ppm": f"P6 {SIDE} {SIDE} 255\n".encode(),
        "pgm": f"P5 {SIDE} {SIDE} 255\n".encode(),
        "larger.png": png(60_000, 60_000, rows=1),
        "larger.ppm": b"P6 4000000 4000000 255\n",
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: decoded.append("it"))
    found = bombs()
    for name, content in found.items():
        assert len(content) < 400_000
        with pytest.raises(ImageError) as caught:
            decode(content, name, "L")
        assert "pixels" in caught.value.got
        file = tmp_path / (name if "." in name else f"a.{name}")
        file.write_bytes(content)
        with pytest.raises(UserError, match="an image"):
            read_picture(file, "L")
    assert not decoded
    record_property(REPORT, f"images: {2 * len(found)} bombs refused without decoding")


# ------------------------------------------------------------------------------ archives


def tar(*members: tuple[dict[str, Any], bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for attributes, content in members:
            info = tarfile.TarInfo()
            for name, value in {"size": len(content), **attributes}.items():
                setattr(info, name, value)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def tars(outside: Path) -> dict[str, bytes]:
    """Archives that would write to `outside`, which lies beside the folder they are unpacked in."""
    link, hard = {"type": tarfile.SYMTYPE}, {"type": tarfile.LNKTYPE}
    evil = b"evil"
    return {
        "above": tar(({"name": "../outside/evil"}, evil)),
        "above, in the middle": tar(({"name": "cifar-10-batches-py/../../outside/evil"}, evil)),
        "absolute": tar(({"name": str(outside / "evil")}, evil)),
        "through a link": tar(
            ({"name": "way", "linkname": "../outside", **link}, b""), ({"name": "way/evil"}, evil)
        ),
        "through an absolute link": tar(
            ({"name": "way", "linkname": str(outside), **link}, b""), ({"name": "way/evil"}, evil)
        ),
        "through links of links": tar(
            ({"name": "a", "linkname": "..", **link}, b""),
            ({"name": "b", "linkname": "a/outside", **link}, b""),
            ({"name": "b/evil"}, evil),
        ),
        "over a file by its hard link": tar(
            ({"name": "way", "linkname": "../outside/mine", **hard}, b""), ({"name": "way"}, evil)
        ),
        "a device": tar(({"name": "null", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}, b"")),
    }  # fmt: skip


def test_a_downloaded_archive_writes_nothing_outside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    hostile = tars(outside)
    for number, (name, content) in enumerate(hostile.items()):
        inside = tmp_path / f"inside{number}"
        inside.mkdir()
        # as if it had been fetched just now
        (inside / datasets.CIFAR10.filename).write_bytes(content)
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
        with pytest.raises(UserError, match="the download failed"):
            CIFAR10(path=str(inside), split="train", download=True)
        assert [p.name for p in outside.iterdir()] == ["mine"], name
        assert (outside / "mine").read_text() == "mine", name
    record_property(REPORT, f"archives: {len(hostile)} that would write elsewhere refused")


def test_a_small_zip_does_not_become_a_large_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zip_or_folder, "MOST_LABEL_BYTES", 1 << 20)
    image = originals.encoded(Image.fromarray(np.zeros((8, 8), np.uint8)))
    for name in ("b.png", "dataset.json"):
        with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", image)
            archive.writestr(name, bytes(MOST_BYTES + 1))
        assert (tmp_path / "set.zip").stat().st_size < 100_000
        with pytest.raises(UserError, match=r"bytes, more than"):
            Archive(path=str(tmp_path / "set.zip"), classes=name == "dataset.json")[1]


def test_a_packed_file_ends_where_it_says(tmp_path: Path) -> None:
    originals.write_idx(tmp_path)
    labels = originals.idx(np.zeros(30, np.uint8))
    endless = struct.pack(">HBBI", 0, 8, 1, 2**32 - 1)
    for content, reason in (
        (labels + bytes(1 << 26), "more than 30 bytes"),
        (endless, "announces"),
    ):
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content, 1))
        with pytest.raises(UserError, match=reason):
            MNIST(path=str(tmp_path), split="train")
