"""Ways to make a square of size x size pixels of an image: (image, size) -> image. conf/crop names each."""

from collections.abc import Callable
from typing import TypeAlias

from PIL import Image as PILImage

Crop: TypeAlias = Callable[[PILImage.Image, int], PILImage.Image]


def halving(image: PILImage.Image, size: int) -> PILImage.Image:
    """Halved with a box filter while it is twice too large, then bicubic, then the central square.

    As in the published training code for ImageNet-64 (guided-diffusion, consistency_models).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PILImage.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), PILImage.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def box(image: PILImage.Image, size: int) -> PILImage.Image:
    """The central square with a box filter, as in the published preparation of LSUN at 256 pixels."""
    return _central_square(image).resize((size, size), PILImage.Resampling.BOX)


def lanczos(image: PILImage.Image, size: int) -> PILImage.Image:
    """The central square with a Lanczos filter, as NVlabs' dataset_tool prepares FFHQ and AFHQ."""
    return _central_square(image).resize((size, size), PILImage.Resampling.LANCZOS)


def _central_square(image: PILImage.Image) -> PILImage.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
