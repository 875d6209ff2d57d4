"""Functions that make a square of size x size pixels of an image: (image, size) -> image."""

from collections.abc import Callable
from typing import TypeAlias

from PIL import Image as PILImage
from PIL import ImageOps

Crop: TypeAlias = Callable[[PILImage.Image, int], PILImage.Image]


def halving(image: PILImage.Image, size: int) -> PILImage.Image:
    """Halve with a box filter while twice too large, then scale bicubically, then cut the central square.

    As in the published training code for ImageNet-64 (guided-diffusion, consistency_models).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PILImage.Resampling.BOX)
    image = ImageOps.scale(image, size / min(image.size), PILImage.Resampling.BICUBIC)
    return _central_square(image)


def box(image: PILImage.Image, size: int) -> PILImage.Image:
    """Scale the central square with a box filter, as in the published preparation of LSUN at 256 pixels."""
    return _central_square(image).resize((size, size), PILImage.Resampling.BOX)


def lanczos(image: PILImage.Image, size: int) -> PILImage.Image:
    """Scale the central square with a Lanczos filter, as NVlabs' dataset_tool prepares FFHQ and AFHQ."""
    return _central_square(image).resize((size, size), PILImage.Resampling.LANCZOS)


def fit(image: PILImage.Image, size: int) -> PILImage.Image:
    """Enlarge a square image by a whole factor pixel by pixel; bring any other to size by `halving`."""
    if image.width == image.height and size % image.width == 0:
        return image.resize((size, size), PILImage.Resampling.NEAREST)
    return halving(image, size)


def _central_square(image: PILImage.Image) -> PILImage.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
