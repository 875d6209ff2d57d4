"""LSUN in its original form: one LMDB of JPEG files a category and split."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lmdb

from consistency.data.crop import Crop, box
from consistency.data.image_files import ImageFiles, Index, file_stamp
from consistency.data.parallel import PerProcess
from consistency.data.source import required_path
from consistency.errors import require

FILE = "data.mdb"


@dataclass(kw_only=True, eq=False, repr=False)
class Database(ImageFiles):
    """The images of an LMDB, the folder of data.mdb, one file a value, in the order of the keys, without classes."""

    path: str | None

    def open(self) -> Index:
        folder = required_path(self.path, "the folder of an LMDB")
        self.where = str(folder)
        options = {"readonly": True, "lock": False, "readahead": False}
        self.environment = PerProcess(partial(lmdb.open, str(folder), **options))
        names, got = list[str](), "none"
        try:
            with self.environment().begin() as read:
                keys = read.cursor().iternext(values=False)
                names = [bytes(key).decode("latin-1") for key in keys]  # a character a byte
        except lmdb.Error as error:
            got = f"a damaged or other file ({error})"
        require(bool(names), f"an LMDB of images in {folder}", got, "get the database again")
        return Index(names)

    def read(self, name: str) -> bytes:
        try:
            with self.environment().begin() as read:
                return read.get(name.encode("latin-1"), b"")
        except lmdb.Error as error:
            raise OSError(f"damaged entry, {error}") from error

    def stamp(self, index: int) -> bytes:
        return file_stamp(Path(self.where) / FILE)


@dataclass(kw_only=True, eq=False, repr=False)
class LSUN(Database):
    """A category of LSUN [Yu et al. 2015, arXiv:1506.03365], without classes.

    By default the central square is resized with a box filter, as in the published preparation at 256 pixels.
    """

    category: str
    split: str
    channels: int | None = 3
    crop: Crop = box

    def open(self) -> Index:
        name = f"{self.category}_{self.split}_lmdb"
        database = required_path(self.path, f"the folder of LSUN's {name}", exists=False) / name
        expected = f"LSUN's own database {name}/{FILE} in the folder data.path={self.path}"
        remedy = f"get {name}.zip with download.py of github.com/fyu/lsun, -c {self.category}"
        remedy += f", unzip it, and give data.path=<the folder of {name}>"
        require((database / FILE).is_file(), expected, "no such file", remedy)
        self.path = str(database)
        return super().open()
