"""One's own images: a folder of image files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from torchvision.datasets.folder import IMG_EXTENSIONS

from consistency.data.source import Image
from consistency.errors import require


class Folder:
    """Image files under `path`, in sorted order; with `classes`, each folder directly below it is a class.

    Each image is cropped to its central square and resized to image_size x image_size (box filter for shrinking by
    2 and more, then bicubic, as in the published code for ImageNet-64). channels: 1 for grey, 3 for colour.
    """

    def __init__(self, *, path: str | None, image_size: int, channels: int, classes: bool) -> None:
        require(
            path is not None,
            "a folder of images in data.path",
            "data.path=null",
            "add data.path=<folder>; any mix of " + ", ".join(IMG_EXTENSIONS),
        )
        folder = Path(str(path)).expanduser()
        require(
            folder.is_dir(),
            f"a folder of images at data.path={folder}",
            "a file" if folder.exists() else "nothing there",
            "check the path; it is taken relative to the folder the command runs in",
        )
        require(channels in (1, 3), "data.channels of 1 (grey) or 3 (colour)", channels, "set it")
        self.image_size, self.mode = image_size, {1: "L", 3: "RGB"}[channels]
        self.class_names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if classes else []
        self.files = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()
        )
        if classes:
            self.files = [p for p in self.files if p.parent != folder]
        require(
            bool(self.files),
            f"image files under {folder}" + (", in one folder a class" if classes else ""),
            "none",
            "any of these types will do: " + ", ".join(IMG_EXTENSIONS),
        )
        self.labels = [
            self.class_names.index(p.relative_to(folder).parts[0]) if classes else 0
            for p in self.files
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        with PILImage.open(self.files[index]) as opened:
            square = central_square(opened.convert(self.mode), self.image_size)
        pixels = np.atleast_3d(np.asarray(square))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), self.labels[index]


def central_square(image: PILImage.Image, size: int) -> PILImage.Image:
    """The central square of an image at size x size: halved with a box filter while it is twice too large, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PILImage.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), PILImage.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
