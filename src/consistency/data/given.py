"""Images that a person gives to a command: read with care, for they may come from anywhere."""

import warnings
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor

from consistency.data.cropping import halving
from consistency.data.decoding import MODES, MOST_BYTES, MOST_PIXELS
from consistency.data.encoded import to_tensor
from consistency.errors import require
from consistency.paths import path_of

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""The types of file that are opened, by ending."""


def files_at(path: str) -> list[Path]:
    """The image that is meant, or the images directly in the folder that is meant, in the order of their names."""
    place = path_of(path)
    require(
        place.exists(),
        f"an image or a folder of images at {place}",
        "nothing there",
        "check the path; it is taken relative to the folder the command runs in",
    )
    if not place.is_dir():
        return [place]
    found = sorted(p for p in place.iterdir() if p.suffix.lower() in FORMATS and p.is_file())
    require(bool(found), f"images in {place}", "none", f"the types are {', '.join(FORMATS)}")
    return found


def read_picture(file: Path, mode: str) -> PILImage.Image:
    """The image in a file as `mode`, upright; refuses what is too large before its pixels are decoded."""
    require(
        file.suffix.lower() in FORMATS and file.is_file(),
        f"an image file of type {', '.join(FORMATS)} at {file}",
        "a folder" if file.is_dir() else "nothing there" if not file.exists() else file.suffix,
        "check the path, or save the image as a PNG",
    )
    bytes_there = file.stat().st_size
    require(
        bytes_there <= MOST_BYTES,
        f"an image file of at most {MOST_BYTES >> 20} MiB",
        f"{file}, {bytes_there >> 20} MiB",
        "make the image smaller first",
    )
    reason, picture = "", None
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            PILImage.open(file, formats=sorted(set(FORMATS.values()))) as opened,
        ):
            pixels = opened.width * opened.height
            if 0 < pixels <= MOST_PIXELS:
                picture = ImageOps.exif_transpose(opened).convert(mode)
            else:
                reason = f"{opened.width}x{opened.height} pixels, more than {MOST_PIXELS}"
    except Exception as error:  # decoders of damaged files fail in any way
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    require(
        picture is not None,
        f"an image that can be read at {file}",
        reason[:200],
        "save the image anew, for example as a PNG",
    )
    assert picture is not None
    return picture


def fitted(picture: PILImage.Image, channels: int, size: int) -> UInt8[Tensor, "c h w"]:
    """The central square of a picture at size x size; one smaller by a whole factor is enlarged pixel by pixel."""
    picture = picture.convert(MODES[channels])
    if picture.width == picture.height and size % picture.width == 0:
        square = picture.resize((size, size), PILImage.Resampling.NEAREST)
    else:
        square = halving(picture, size)
    return to_tensor(square)


def read_images(path: str, channels: int, size: int) -> UInt8[Tensor, "n c h w"]:
    """The image or all images at a path, for a model of images with so many channels and pixels."""
    require(
        channels in (1, 3),
        "a model of grey or colour images",
        f"one of images with {channels} channels",
        "files hold 1 or 3 channels",
    )
    return torch.stack(
        [fitted(read_picture(file, MODES[channels]), channels, size) for file in files_at(path)]
    )
