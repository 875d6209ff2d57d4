"""LSUN in its original form: one LMDB of JPEG files a category and split."""

from functools import partial
from pathlib import Path

import lmdb

from consistency.data.cropping import Crop, box, halving
from consistency.data.decoding import bad_image
from consistency.data.encoded import Encoded, OnBad, PerProcess
from consistency.data.folder import file_stamp
from consistency.errors import UserError, require
from consistency.paths import path_of

FILE = "data.mdb"


class Database(Encoded):
    """Every value of an LMDB is an image file, in the order of the keys; there are no classes.

    path: the folder that holds data.mdb. See `Encoded` for the rest.
    """

    def __init__(
        self,
        *,
        path: str,
        image_size: int | None,
        channels: int | None,
        crop: Crop = halving,
        num_classes: int | None = None,
        on_bad: OnBad = "stop",
        background: str | None = None,
    ) -> None:
        self.folder = path_of(path)
        self.environment = PerProcess(partial(_opened, self.folder))
        with self.environment().begin() as read:
            # latin-1 maps every byte to a character and back
            keys = [bytes(key).decode("latin-1") for key in read.cursor().iternext(values=False)]
        require(bool(keys), f"images in {self.folder / FILE}", "none", "get the database again")
        super().__init__(
            keys,
            None,
            where=str(self.folder),
            class_names=[],
            image_size=image_size,
            channels=channels,
            crop=crop,
            num_classes=num_classes,
            on_bad=on_bad,
            background=background,
        )

    def read(self, name: str) -> bytes:
        """The bytes of an image file."""
        try:
            with self.environment().begin(buffers=True) as read:
                stored = read.get(name.encode("latin-1"))
                return b"" if stored is None else bytes(stored)
        except lmdb.Error as error:
            raise bad_image(f"{self.folder}/{name}", f"a damaged entry ({error})") from error

    def stamp(self, index: int) -> bytes:
        """Size and time of the database."""
        return file_stamp(self.folder / FILE)


class LSUN(Database):
    """A category of LSUN [Yu et al. 2015, arXiv:1506.03365], one image a sample, without classes.

    path: the folder that holds `<category>_<split>_lmdb`. The central square is resized to image_size x image_size with
    a box filter, as in the published preparation of the 256-pixel sets.
    """

    def __init__(
        self,
        *,
        path: str | None,
        category: str,
        split: str,
        image_size: int | None,
        channels: int | None = 3,
        crop: Crop = box,
        num_classes: int | None = None,
        on_bad: OnBad = "stop",
        background: str | None = None,
    ) -> None:
        name = f"{category}_{split}_lmdb"
        database = path_of(str(path)) / name
        require(
            path is not None and (database / FILE).is_file(),
            f"LSUN's own database {name}/{FILE} in the folder data.path={path}",
            "no such file" if path is not None else "data.path=null",
            f"get {name}.zip with the download script of github.com/fyu/lsun "
            f"(`python download.py -c {category}`), unzip it, and give data.path=<the folder that holds {name}>",
        )
        super().__init__(
            path=str(database),
            image_size=image_size,
            channels=channels,
            crop=crop,
            num_classes=num_classes,
            on_bad=on_bad,
            background=background,
        )


def _opened(folder: Path) -> lmdb.Environment:
    try:
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(
            f"expected an LMDB in {folder}\n  got: a file that is damaged or none ({error})\n"
            "  do: get the database again"
        ) from error
