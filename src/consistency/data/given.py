"""Images that a person gives to a command: read with care, for they may come from anywhere."""

from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image as PILImage
from torch import Tensor

from consistency.data.cropping import halving
from consistency.data.decoding import (
    EXTENSIONS,
    MODES,
    MOST_BYTES,
    Colour,
    ImageError,
    Mode,
    colour_of,
    decode,
)
from consistency.data.encoded import to_tensor
from consistency.data.folder import read_file
from consistency.data.listing import in_folder
from consistency.errors import UserError, require
from consistency.paths import path_of


def files_at(path: str) -> list[Path]:
    """The image that is meant, or the images below the folder that is meant, in the order of their names."""
    place = path_of(path)
    require(
        place.exists(),
        f"an image or a folder of images at {place}",
        "nothing there",
        "check the path; it is taken relative to the folder the command runs in",
    )
    if not place.is_dir():
        return [place]
    found = in_folder(place)
    found.tell()
    require(
        bool(found.names), f"images in {place}", "none", f"the types are {', '.join(EXTENSIONS)}"
    )
    return [place / name for name in found.names]


def read_picture(file: Path, mode: Mode, background: Colour | None = None) -> PILImage.Image:
    """The image in a file as `mode`, upright; refuses what is too large before its pixels are decoded."""
    require(
        file.is_file(),
        f"an image file at {file}",
        "a folder" if file.is_dir() else "nothing there",
        "check the path; it is taken relative to the folder the command runs in",
    )
    size = file.stat().st_size
    require(
        size <= MOST_BYTES,
        f"an image file of at most {MOST_BYTES >> 20} MiB",
        f"{file}, {size >> 20} MiB",
        "make the image smaller first",
    )
    try:
        return decode(read_file(file.parent, file.name), str(file), mode, background)
    except ImageError as error:
        raise UserError(
            f"expected an image of 8 bits a channel, grey or colour, in {file}\n  got: {error.reason}\n"
            f"  do: {error.remedy}, or save the image anew, for example as a PNG"
        ) from error


def fitted(picture: PILImage.Image, channels: int, size: int) -> UInt8[Tensor, "c h w"]:
    """The central square of a picture at size x size; one smaller by a whole factor is enlarged pixel by pixel."""
    picture = picture.convert(MODES[channels])
    if picture.width == picture.height and size % picture.width == 0:
        square = picture.resize((size, size), PILImage.Resampling.NEAREST)
    else:
        square = halving(picture, size)
    return to_tensor(square)


def read_images(
    path: str, channels: int, size: int, background: str | None = None
) -> UInt8[Tensor, "n c h w"]:
    """The image or all images at a path, for a model of images with so many channels and pixels."""
    require(
        channels in (1, 3),
        "a model of grey or colour images",
        f"one of images with {channels} channels",
        "files hold 1 or 3 channels",
    )
    ground = colour_of(background)
    pictures = (read_picture(file, MODES[channels], ground) for file in files_at(path))
    return torch.stack([fitted(picture, channels, size) for picture in pictures])
