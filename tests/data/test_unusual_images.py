"""Whole files that other readers stumble over are read; what is refused is refused for what it is."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import BmpImagePlugin, Image, PngImagePlugin, TiffImagePlugin

import originals
from conftest import Run
from consistency.commands.edit import MaskFile
from consistency.data.decode import (
    ImageError,
    _stored_deep,
    colour_of,
    decode,
    is_deep,
    read_picture,
)
from consistency.data.listing import read_images
from consistency.data.zip_or_folder import Folder
from consistency.errors import UserError
from consistency.randomness import generator
from originals import encoded, noise

pytestmark = pytest.mark.filterwarnings("ignore")

COLOUR = noise(9, 7, 3)
WHOLE = encoded(Image.fromarray(COLOUR))
JPEG = encoded(Image.fromarray(COLOUR), "JPEG", quality=95)


def read(content: bytes, mode: Any = None, background: str | None = None) -> np.ndarray[Any, Any]:
    return np.asarray(decode(content, "it", mode, colour_of(background)))


def chunk(kind: bytes, content: bytes, crc: bytes | None = None) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content)) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + check


LARGE = zlib.compress(bytes(3_000_000))
METADATA = {
    "compressed text": chunk(b"zTXt", b"workflow\0\0" + LARGE),
    "international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LARGE),
    "80 texts": b"".join(chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(10**6))) for i in range(80)),
    "a large profile": chunk(b"iCCP", b"p\0\0" + LARGE),
    "a broken profile": chunk(b"iCCP", b"p\0\0no profile"),
    "an empty profile": chunk(b"iCCP", b""),
    "text with a wrong checksum": chunk(b"tEXt", b"a\0b", b"1234"),
    "cut resolution": chunk(b"pHYs", b"\1"),
    "cut gamma": chunk(b"gAMA", b""),
    "cut EXIF": chunk(b"eXIf", b"II*\0\x08"),
    "no EXIF": chunk(b"eXIf", b"nothing of the kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("place", [33, -12])
def test_of_a_png_the_pixels_count_whatever_is_said_beside(name: str, place: int) -> None:
    at = place % len(WHOLE)
    assert np.array_equal(read(WHOLE[:at] + METADATA[name] + WHOLE[at:] + b"more"), COLOUR)


def test_a_png_is_turned_upright_though_its_text_is_too_large() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = encoded(Image.fromarray(COLOUR), exif=exif)
    whole = turned[:33] + METADATA["compressed text"] + turned[33:]
    assert np.array_equal(read(whole), COLOUR[::-1, ::-1])


def test_pixels_with_a_wrong_checksum_stay_refused_beside_a_large_text() -> None:
    damaged = bytearray(WHOLE[:33] + METADATA["compressed text"] + WHOLE[33:])
    damaged[damaged.rindex(b"IDAT") + 8] ^= 1
    with pytest.raises(ImageError, match="damaged"):
        read(bytes(damaged))


def segment(number: int, content: bytes) -> bytes:
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(content) + 2) + content


TURNED = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHH", 1, 0x0112, 3, 1, 6, 0) + bytes(4)
GPS = (
    b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHHHII", 2, 0x0112, 3, 1, 6, 0, 0x8825, 4, 1, 38) + bytes(4)
    + struct.pack("<HHHII", 1, 2, 5, 3, 56) + bytes(28)
)  # fmt: skip
SEGMENTS = {
    "the header of EXIF twice": segment(1, b"Exif\0\0Exif\0\0" + TURNED),
    "places of 0/0": segment(1, b"Exif\0\0" + GPS),
    "cut EXIF": segment(1, b"Exif\0\0" + TURNED[:14]),
    "junk for EXIF": segment(1, b"Exif\0\0" + b"\7" * 40),
    "an empty profile": segment(2, b"ICC_PROFILE\0"),
    "junk for a profile": segment(2, b"ICC_PROFILE\0\1\1" + b"\7" * 40),
    "cut Photoshop": segment(13, b"Photoshop 3.0\0008BIM\4\4"),
    "cut Adobe": segment(14, b"Adobe"),
    "cut JFIF": segment(0, b"JFIF\0\1"),
    "junk for several pictures": segment(2, b"MPF\0junk"),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_of_a_jpeg_the_pixels_count_whatever_is_said_beside(name: str) -> None:
    found, plain = read(JPEG[:2] + SEGMENTS[name] + JPEG[2:] + b"more"), read(JPEG)
    turned = name in ("the header of EXIF twice", "places of 0/0")
    assert np.array_equal(found, np.rot90(plain, -1) if turned else plain)


def bmp(bits: int, rows: bytes, masks: tuple[int, ...] = ()) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, bits, 3 if masks else 0, len(rows), 0, 0, 0, 0)
    head += struct.pack(f"<{len(masks)}I", *masks)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(head)) + head + rows


def test_bitmaps_of_16_bits_a_pixel_are_read() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 16, (4, 4), dtype=np.uint16)
    for masks, shifts in (((0xF800, 0x7E0, 0x1F), (11, 5, 0)), ((0x7C00, 0x3E0, 0x1F), (10, 5, 0)), ((), (10, 5, 0))):  # fmt: skip
        found = read(bmp(16, words.tobytes(), masks)).astype(int)
        for channel, (shift, mask) in enumerate(zip(shifts, masks or (0x7C00, 0x3E0, 0x1F), strict=True)):  # fmt: skip
            most = mask >> shift
            exact = (words.astype(int) >> shift & most)[::-1] * 255 / most
            assert np.abs(found[..., channel] - exact).max() <= 1


def test_a_layout_that_is_not_read_is_not_called_damaged() -> None:
    for content in (bmp(16, bytes(32), (0xF00, 0xF0, 0xF)), bmp(16, bytes(32), (1, 2, 4))):
        with pytest.raises(ImageError) as caught:
            read(content)
        assert "cannot be read" in caught.value.got
        assert "damaged" not in caught.value.got


def test_deep_raw_data_are_those_of_more_than_8_bits_a_channel() -> None:
    """Over all that Pillow knows of TIFF, BMP and PNG."""
    known = {raw for _, raw in TiffImagePlugin.OPEN_INFO.values()}
    known |= {raw for _, raw in BmpImagePlugin.BIT2MODE.values()} | {
        "BGR;16",
        "BGR;15",
        "BGRA",
        "XBGR",
    }
    known |= {raw for _, raw in PngImagePlugin._MODES.values()}
    deep = {
        raw for raw in known
        if raw.startswith(("I;", "F;")) or raw.endswith((";16L", ";16B", ";16N"))
    }  # fmt: skip
    assert len(known) > 60
    assert {raw for raw in known if is_deep("raw", raw)} == deep
    assert {raw for raw in known if is_deep("raw", (raw, 0, 1))} == deep


def test_more_than_8_bits_that_pillow_would_cut_off_are_refused() -> None:
    picture = Image.fromarray(noise(16, 16, 3))
    avif, jp2 = bytearray(encoded(picture, "AVIF")), bytearray(encoded(picture, "JPEG2000"))
    twelve = bytearray(JPEG)
    avif[avif.index(b"av1C") + 6] |= 0x40
    jp2[jp2.index(b"\xff\x4f\xff\x51") + 42] = 11
    twelve[twelve.index(b"\xff\xc0") + 4] = 12
    assert _stored_deep(
        "AVIF", bytes(avif)
    )  # which the data in it are not, so that it does not open
    for content in (jp2, twelve):
        with pytest.raises(ImageError, match="more than 8 bits a channel"):
            read(bytes(content))


def test_plain_kinds_of_old_are_read() -> None:
    grey = noise(8, 8)
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        picture = Image.fromarray(COLOUR).convert(mode)
        for kind in ("PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP"):
            try:
                stored = encoded(picture, kind)
            except (OSError, ValueError):
                continue  # which the format does not have
            if (mode, kind) != ("YCbCr", "TIFF"):  # Pillow writes it, and cannot read it
                assert read(stored, "RGB").shape == (9, 7, 3), (mode, kind)
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        assert np.array_equal(read(encoded(Image.fromarray(grey), "TIFF", compression=packing)), grey)  # fmt: skip
    values = " ".join(map(str, grey.ravel())).encode()
    assert np.array_equal(read(b"P2\n8 8\n255\n" + values), grey)
    assert read(b"P1\n2 2\n1 0 0 1").tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize("number", range(1, 9))
def test_a_tiff_is_turned_once(number: int) -> None:
    stored = encoded(Image.fromarray(COLOUR), "TIFF", tiffinfo={274: number})
    exif = Image.Exif()
    exif[0x0112] = number
    assert np.array_equal(read(stored), read(encoded(Image.fromarray(COLOUR), exif=exif)))


def test_a_heic_picture_is_called_so() -> None:
    with pytest.raises(ImageError, match="HEIC"):
        read(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))


# ------------------------------------------------------------------------------- transparency


def icon() -> Image.Image:
    """Red, half of it transparent."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[:, :4, 3] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("colour", ["white", "#204060", "rgb(1,2,3)"])
def test_a_transparent_image_is_put_on_a_colour(colour: str) -> None:
    found, ground = read(encoded(icon()), background=colour), colour_of(colour)
    assert (found[:, :4] == (255, 0, 0)).all()
    assert (found[:, 4:] == ground).all()
    pair = Image.merge("LA", (Image.new("L", (8, 8), 9), icon().getchannel("A")))
    assert read(encoded(pair), background="white").tolist() == [[9] * 4 + [255] * 4] * 8
    assert read(encoded(pair), background="red").shape == (8, 8, 3)
    keyed = encoded(Image.fromarray(COLOUR), transparency=tuple(COLOUR[0, 0].tolist()))
    assert (read(keyed, background=colour)[0, 0] == ground).all()
    assert np.array_equal(read(WHOLE, background=colour), COLOUR)


def test_what_is_transparent_is_not_called_damaged_and_the_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        read(encoded(icon()))
    assert "transparent" in caught.value.got
    assert "damaged" not in str(caught.value)
    assert "data.background=white" in str(caught.value)
    originals.write_files(tmp_path, {"icon.png": encoded(icon())})
    for wrong in ("whitish", "#ff00ff80", ""):
        with pytest.raises(UserError, match="background"):
            Folder(path=str(tmp_path), classes=False, background=wrong)


def test_every_command_reads_and_refuses_the_same_files_in_the_same_words(tmp_path: Path) -> None:
    deep = encoded(Image.fromarray(noise(8, 8).astype(np.uint16) * 257))
    moving = encoded(icon().convert("RGB"), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))])  # fmt: skip
    bad = {"icon.png": encoded(icon()), "deep.png": deep, "cut.png": WHOLE[:-30], "moving.gif": moving, "x.png": b"x"}  # fmt: skip
    originals.write_files(tmp_path, bad)
    source = Folder(path=str(tmp_path), classes=False)
    for index, name in enumerate(source.names):
        with pytest.raises(ImageError) as theirs:
            source[index]
        with pytest.raises(ImageError) as ours:
            read_picture(tmp_path / name, "RGB")
        assert str(ours.value) == str(theirs.value)
    white = read_images(str(tmp_path / "icon.png"), 3, 8, "white")
    assert white[0, :, 0, -1].tolist() == [255] * 3


def test_of_a_mask_the_transparent_part_is_black(tmp_path: Path) -> None:
    painted = np.zeros((8, 8, 4), np.uint8)
    painted[:3] = 255
    Image.fromarray(painted).save(tmp_path / "mask.png")
    omega = MaskFile(path=str(tmp_path / "mask.png"))(8, 8, generator(0, "edit"))
    assert omega[:, 0].tolist() == [1.0] * 3 + [0.0] * 5


def test_the_background_belongs_to_what_is_prepared(verb: Run, tmp_path: Path) -> None:
    for number in range(3):
        originals.write_files(tmp_path / "set", {f"{number}.png": encoded(icon())})
    options = [f"source={tmp_path / 'set'}", f"output={tmp_path / 'a.zip'}"]
    refused = verb("prepare", *options)
    assert refused.status == 2
    assert "transparent" in refused.out
    done = verb("prepare", *options, "background=white")
    assert done.status == 0, done.err
    again = verb("prepare", *options, "background=black")
    assert again.status == 2
    assert "choose another output=" in again.err
    same = verb("prepare", *options, "background=white")
    assert "nothing to do" in same.out
    with Image.open(io.BytesIO(Folder(path=str(tmp_path / "set"), classes=False).read("0.png"))) as stored:  # fmt: skip
        assert stored.mode == "RGBA"
