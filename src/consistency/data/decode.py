"""One reader for image files: from the bytes of a file to pixels, or one error that names the file."""

import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jaxtyping import UInt8
from PIL import Image as PILImage
from PIL import ImageColor, ImageOps, features
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from consistency.data.source import require_existing
from consistency.errors import UserError

Mode: TypeAlias = Literal["L", "RGB"]
MODES: dict[int, Mode] = {1: "L", 3: "RGB"}
"""Grey or colour of 8 bits a channel, by number of channels."""

MOST_PIXELS = MOST_BYTES = 64 << 20
"""Limits of an image and of its file; larger ones are refused before they are decoded."""

FORMATS = (
    *("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF"),
    *(name for name, part in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if features.check(part)),
)
_KNOWN = {s for s, f in PILImage.registered_extensions().items() if f in (*FORMATS, "MPO")}
EXTENSIONS = tuple(sorted(_KNOWN - {".pfm"} | {".jif", ".jfi", ".pjpeg", ".pjp"}))
"""Suffixes of image files: Pillow's of these formats without the one of floating point, and further ones of JPEG."""

UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, KeyError, zlib.error, zipfile.BadZipFile)
"""Errors of reading a file or an entry of a zip."""

GREY = ("1", "L", "LA", "La")
COLOUR = ("RGB", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr")
PACKED = ("BGR;16", "RGB;16")  # raw data of 16 bits a pixel: 5, 6 and 5 bits a channel

LEAST = dict.fromkeys([*range(0xE0, 0xF0), 0xFE], 1 << 17) | {0xE0: 16, 0xE1: 0, 0xEE: 14}
"""Bytes that JPEG's segments of metadata must have to be read: EXIF any, JFIF and Adobe their full length, others never."""

Colour: TypeAlias = tuple[int, int, int]


class ImageError(UserError):
    """An image that cannot be used: `name`, and the reason in `got`."""

    name: str = ""


def bad_image(name: str, reason: str, remedy: str = "mend it, or save it as PNG") -> ImageError:
    remedy += "; data.on_bad=skip leaves out such images of a set (on_bad=skip when preparing, which lists them)"
    error = ImageError(f"an image of 8 bits a channel, grey or colour, in {name}", reason, remedy)
    error.name = name
    return error


def read_bounded(file: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file of at most `most` bytes."""
    require_size(file.stat().st_size, most)
    return file.read_bytes()


def require_size(size: int, most: int = MOST_BYTES) -> None:
    """Raise one of `UNREADABLE` for a file that is too large."""
    if size > most:
        raise ValueError(f"{size:,} bytes, more than {most:,}")


def read_picture(file: Path, mode: Mode, background: Colour | None = None) -> Image:
    """Return the image in a file as `mode`, by the rules of `decode`."""
    require_existing(file, f"an image file at {file}")
    return read_image(partial(read_bounded, file), str(file), mode, background)


def read_image(
    read: Callable[[], bytes], name: str, mode: Mode | None, background: Colour | None
) -> Image:
    """Return the image whose bytes `read` returns, by the rules of `decode`."""
    try:
        content = read()
    except UNREADABLE as error:
        raise bad_image(name, f"a file that cannot be read ({error})") from error
    return decode(content, name, mode, background)


def to_tensor(image: Image) -> UInt8[Tensor, "c h w"]:
    """Return the grey values of a grey or RGB image; torchvision's `to_pil_image` is the inverse."""
    return pil_to_tensor(image).contiguous()


def colour_of(background: str | None) -> Colour | None:
    """Return the colour of that name, or of that form #rrggbb, to put behind transparent images."""
    if background is None:
        return None
    try:
        red, green, blue = ImageColor.getrgb(str(background))  # type: ignore[misc]  # of three or four
    except ValueError as error:
        expected = "null, the name of a colour or #rrggbb at data.background (background when preparing and editing)"
        remedy = "give white, for example; numbers need quotes, data.background='\"#f0f0f0\"'"
        raise UserError(expected, background, remedy) from error
    return red, green, blue


def is_image(stream: io.BufferedIOBase) -> bool:
    """Return whether a file begins as one of `FORMATS` does, under any name."""
    try:
        with warnings.catch_warnings(action="ignore"), PILImage.open(stream, formats=FORMATS):  # type: ignore[arg-type]
            return True
    except Exception:  # Pillow's decoders raise nearly anything on other files
        return False


def decode(content: bytes, name: str, mode: Mode | None, background: Colour | None = None) -> Image:
    """Return the image in a file's bytes, upright, as `mode`; None keeps grey grey and colour colour.

    Raise `ImageError` for an image that cannot be used. Images other than plain 8-bit grey or RGB:

    - EXIF orientation is applied if it can be read. Other metadata and colour profiles are ignored, of any size,
      damaged or not.
    - Grey becomes three equal channels; colour becomes grey by the luma of ITU-R 601-2. Palettes become RGB.
    - CMYK becomes RGB by the plain formula without a colour profile, as in the published preparations of ImageNet.
    - Opaque alpha is dropped. A transparent image is put on `background`, or refused without one, because the file
      does not hold the colour behind it.
    - More than 8 bits a channel and floating point are refused, because the file does not hold the range of values.
    - Animations and files of several pages are refused. A camera's multi-picture JPEG gives its first picture.
    - More than `MOST_PIXELS` pixels are refused.
    - A PNG is checked against its checksums. A JPEG has none, so damage that its decoder misses stays unseen.
    """
    reason = "" if content else "an empty file (0 bytes)"
    for stored in filter(None, (content, _without_metadata(content))):
        try:
            return _decode(stored, name, mode, background)
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            reason = reason or _reason(error, content)
    raise bad_image(name, reason)


def _decode(content: bytes, name: str, mode: Mode | None, background: Colour | None) -> Image:
    image: Image = PILImage.open(io.BytesIO(content), formats=FORMATS)
    if image.format == "PNG":
        image.verify()
        image = PILImage.open(io.BytesIO(content), formats=FORMATS)
    if objection := _objection(image, content):
        raise bad_image(name, objection)
    grey = image.mode in GREY
    image.load()
    transparent = image.has_transparency_data
    with suppress(Exception):  # unreadable metadata, which is read and changed beside the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if transparent:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            if background is None:
                remedy = "put it on a colour with data.background=white (background=white when preparing and editing)"
                raise bad_image(name, "an image that is transparent in places", remedy)
            grey = grey and len(set(background)) == 1
            ground = PILImage.new("RGBA", image.size, (*background, 255))
            image = PILImage.alpha_composite(ground, image)
        image.info.pop("transparency", None)
    return image.convert(mode or ("L" if grey else "RGB"))


def _reason(error: Exception, content: bytes) -> str:
    """Return why the decoder failed, in words."""
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "a HEIC picture, which cannot be read: save it as JPEG or PNG"
    frames = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
    if any(m in frames and content[at + 4 : at + 5] > b"\x08" for m, at, _ in _segments(content)):
        return "more than 8 bits a channel"
    text = str(error) or type(error).__name__
    if isinstance(error, PILImage.UnidentifiedImageError):
        return "a damaged file, or none of the types " + ", ".join(FORMATS)
    if text.lower().startswith(("unsupported", "unknown")):
        return f"a file of a kind that cannot be read ({text})"
    return f"a damaged file ({text})"


def _objection(image: Image, content: bytes) -> str:
    """Return why an image is refused before it is decoded, or nothing."""
    if image.width * image.height > MOST_PIXELS:
        return f"{image.width}x{image.height} pixels, more than {MOST_PIXELS:,}"
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        return f"an animation or several pages ({frames} frames)"
    # Pillow reads 16-bit colour as 8-bit silently; only the description of the raw data shows it.
    deep = any(is_deep(tile[0], tile[3]) for tile in getattr(image, "tile", ()))
    if deep or image.mode.startswith(("I", "F")) or _stored_deep(image.format, content):
        return "more than 8 bits a channel"
    if image.mode not in GREY + COLOUR:
        return f"an image of mode {image.mode}"
    return ""


def is_deep(codec: str, arguments: Any) -> bool:
    """Return whether raw data, as Pillow describes them, have more than 8 bits a channel."""
    if codec.startswith("ppm") and isinstance(arguments, tuple):  # (mode, highest value)
        return arguments[1] > 255
    raw = str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)
    return raw not in PACKED and (raw.startswith(("I", "F")) or ";16" in raw)


def _stored_deep(kind: str | None, content: bytes) -> bool:
    """Return whether a file has more than 8 bits a channel, in the formats that Pillow always turns into 8."""
    if kind == "AVIF":
        match = re.search(rb"av1C..(.)", content, re.DOTALL)
        return match is not None and bool(match[1][0] & 0x40)  # high_bitdepth
    match = re.search(rb"\xff\x4f\xff\x51.{36}(..)", content, re.DOTALL)
    if kind != "JPEG2000" or match is None:
        return False
    channels = content[match.end() : match.end() + 3 * int.from_bytes(match[1]) : 3]
    return any((bits & 0x7F) >= 8 for bits in channels)


def _without_metadata(content: bytes) -> bytes | None:
    """Return a PNG or JPEG with only its pixels and orientation; None for other files."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content[:8] + b"".join(_chunks(content))
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    parts, end = [content[:2]], 2
    for marker, start, end in _segments(content):
        if end - start >= LEAST.get(marker, 0):
            parts.append(content[start:end])
    return b"".join([*parts, content[end:]])


def _chunks(png: bytes) -> Iterator[bytes]:
    """Yield the chunks of a PNG that hold its pixels, or its orientation with the right checksum."""
    at = 8
    while at + 8 <= len(png):
        kind, end = png[at + 4 : at + 8], at + 12 + int.from_bytes(png[at : at + 4])
        xmp = png.startswith(b"XML:com.adobe.xmp\0\0", at + 8) and end - at < 1 << 20
        whole = zlib.crc32(png[at + 4 : end - 4]) == int.from_bytes(png[end - 4 : end])
        pixels = kind[:1].isupper() or kind in (b"tRNS", b"acTL", b"fcTL", b"fdAT")
        if pixels or (whole and (kind == b"eXIf" or xmp)):
            yield png[at:end]
        at = end


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, begin and end of the segments of a JPEG before its first scan."""
    at = 2 if jpeg.startswith(b"\xff\xd8\xff") else len(jpeg)
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] not in (0xD9, 0xDA):
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        padding = jpeg[at + 1] == 0xFF
        if not padding:
            yield jpeg[at + 1], at, end
        at = at + 1 if padding else end
