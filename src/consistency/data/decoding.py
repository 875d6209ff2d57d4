"""From the bytes of one image file to its pixels, by rules that are written down, or one error that names the file."""

import io
from typing import Any, Literal, TypeAlias

from PIL import Image as PILImage
from PIL import ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

from consistency.errors import UserError

Mode: TypeAlias = Literal["L", "RGB"]
"""Grey or colour, 8 bits a channel."""

MODES: dict[int, Mode] = {1: "L", 3: "RGB"}
"""By number of channels."""

MOST_PIXELS = 64 << 20
MOST_BYTES = 64 << 20
"""What an image may have, and its file: more is refused before it is decoded."""

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
GREY = ("1", "L", "LA", "La")
COLOUR = ("RGB", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr")


class ImageError(UserError):
    """An image that cannot be used. `name` says which, `reason` why."""

    name: str = ""
    reason: str = ""


def bad_image(name: str, reason: str) -> ImageError:
    """The error, in the form of the house."""
    error = ImageError(
        f"expected an image of 8 bits a channel, grey or colour, in {name}\n  got: {reason}\n"
        "  do: mend or remove the file, or leave out all such images with data.on_bad=skip "
        "(on_bad=skip when preparing, which lists them)"
    )
    error.name, error.reason = name, reason
    return error


def decode(content: bytes, name: str, mode: Mode | None) -> PILImage.Image:
    """The image in a file's bytes, upright, as `mode`; None keeps grey grey and colour colour. Raises `ImageError`.

    What is not plain 8-bit grey or RGB:

    - EXIF orientation is applied.
    - Grey among colour becomes three equal channels; colour as grey is the luma of ITU-R 601-2. Palettes become RGB.
    - CMYK becomes RGB by the plain formula without a colour profile, as in the published preparations of ImageNet.
    - Alpha is dropped where it is opaque everywhere. An image that is transparent somewhere is refused: what would be
      seen there is not in the file.
    - 16 bits and floating point are refused: which range of the values is meant is not in the file.
    - Animations and files of several pages are refused; of the pictures in a camera's multi-picture JPEG, the first is
      the photograph.
    - More than `MOST_PIXELS` pixels are refused.
    - A PNG is checked against its checksums. A JPEG has none: what its decoder does not notice stays unnoticed.
    """
    if not content:
        raise bad_image(name, "an empty file (0 bytes)")
    try:
        image = _opened(content)
        reason = _obstacle(image)
        if reason is None:
            return _plain(image, mode)
    except PILImage.UnidentifiedImageError:
        reason = "a damaged file, or none of the types " + ", ".join(FORMATS)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = f"a damaged file ({error or type(error).__name__})"
    raise bad_image(name, reason)


def _opened(content: bytes) -> PILImage.Image:
    image = PILImage.open(io.BytesIO(content), formats=FORMATS)
    if image.format == "PNG":
        image.verify()
        image = PILImage.open(io.BytesIO(content), formats=FORMATS)
    return image


def _obstacle(image: PILImage.Image) -> str | None:
    """Why an opened image, not yet decoded, is refused."""
    if image.width * image.height > MOST_PIXELS:
        return f"{image.width}x{image.height} pixels, more than {MOST_PIXELS:,}"
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        return f"an animation or several pages ({frames} frames)"
    # Pillow reads 16-bit colour as 8-bit without a word; only the description of the raw data tells.
    if any(_deep(*tile) for tile in getattr(image, "tile", ())) or image.mode.startswith(
        ("I", "F")
    ):
        return "more than 8 bits a channel"
    if image.mode not in GREY + COLOUR:
        return f"an image of mode {image.mode}"
    return None


def _deep(codec: str, _: object, __: object, arguments: Any) -> bool:
    """Whether the raw data of a part of an image, as Pillow describes them, have more than 8 bits a channel."""
    if codec.startswith("ppm"):  # (mode, highest value)
        return arguments[1] > 255
    return ";16" in str(arguments)


def _plain(image: PILImage.Image, mode: Mode | None) -> PILImage.Image:
    grey = image.mode in GREY
    image.load()
    if image.has_transparency_data:
        image = _upright(image).convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise ValueError("it is transparent in places: put it on a background")
        image.info.pop("transparency", None)
    else:
        image = _upright(image)
    return image.convert(mode or ("L" if grey else "RGB"))


def _upright(image: PILImage.Image) -> PILImage.Image:
    return ImageOps.exif_transpose(image)
