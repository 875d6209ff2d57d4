"""LSUN in its original form: one LMDB of JPEG files a category and split."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from torchvision.datasets.lsun import LSUNClass

from consistency.data.source import Image
from consistency.errors import require


class LSUN:
    """A category of LSUN [Yu et al. 2015, arXiv:1506.03365], one image a sample, without classes.

    path: the folder that holds `<category>_<split>_lmdb`. The central square is resized to image_size x image_size with
    a box filter, as in the published preparation of the 256-pixel sets.
    """

    def __init__(self, *, path: str | None, category: str, split: str, image_size: int) -> None:
        name = f"{category}_{split}_lmdb"
        database = Path(str(path)).expanduser() / name
        require(
            path is not None and (database / "data.mdb").is_file(),
            f"LSUN's own database {name}/data.mdb in the folder data.path={path}",
            "no such file" if path is not None else "data.path=null",
            f"get {name}.zip with the download script of github.com/fyu/lsun "
            f"(`python download.py -c {category}`), unzip it, and give data.path=<the folder that holds {name}>",
        )
        self.images, self.image_size = LSUNClass(str(database)), image_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        image: PILImage.Image = self.images[index][0]
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize(
            (self.image_size, self.image_size), PILImage.Resampling.BOX
        )
        return torch.from_numpy(np.array(square)).permute(2, 0, 1), 0
