"""LSUN in its original form: one LMDB of JPEG files a category and split."""

import io
import os
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image as PILImage

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
        self.database, self.image_size = database, image_size
        self._opened: tuple[int, lmdb.Environment] | None = None
        with self._environment().begin() as read:
            self.keys = list(read.cursor().iternext(values=False))

    def _environment(self) -> lmdb.Environment:
        """The open database, one of its own in every process: LMDB handles do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            opened = lmdb.open(str(self.database), readonly=True, lock=False, readahead=False)
            self._opened = (os.getpid(), opened)
        return self._opened[1]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        with self._environment().begin(buffers=True) as read:
            stored = read.get(self.keys[index])
            assert stored is not None
            jpeg = io.BytesIO(stored)
        image = PILImage.open(jpeg).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize(
            (self.image_size, self.image_size), PILImage.Resampling.BOX
        )
        return torch.from_numpy(np.array(square)).permute(2, 0, 1), 0
