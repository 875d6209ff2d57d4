"""Image sets of the Hugging Face hub, by name; needs the extra `huggingface`."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consistency.data.decode import read_bounded
from consistency.data.image_files import ImageFiles, Index
from consistency.errors import UserError, require


@dataclass(kw_only=True, eq=False, repr=False)
class HuggingFace(ImageFiles):
    """A set of the hub, or a folder that `datasets` can read. Images are decoded by our own rules.

    name, subset, split, cache: as in `datasets.load_dataset`.
    images, labels: the columns; None for the only one of images, or of class labels.
    """

    name: str | None
    split: str
    classes: bool
    subset: str | None = None
    images: str | None = None
    labels: Any = None  # in an open set, the class indices
    cache: str | None = None

    def open(self) -> Index:
        require(bool(self.name), "the name of a set", "data.path=null", "add data.path=<name>")
        try:
            library = importlib.import_module("datasets")
            options = {"split": self.split, "cache_dir": self.cache}
            table = library.load_dataset(self.name, self.subset, **options)
        except Exception as error:  # of the library, its network and its file systems
            expected = f"the set data.path={self.name} (subset {self.subset}, split {self.split})"
            got = f"{type(error).__name__}: {str(error)[:300]}"
            remedy = "check the name; without a network, fill the library's cache beforehand"
            if isinstance(error, ImportError):
                remedy = "pip install 'consistency[huggingface]', or in this repository datasets"
            raise UserError(expected, got, remedy) from error
        self.where = str(self.name)
        self.column = _only(table.features, library.Image, self.images, "images")
        files = table.select_columns([self.column])
        self.table = files.cast_column(self.column, library.Image(decode=False))
        names = [str(i) for i in range(len(table))]
        if not self.classes:
            return Index(names)
        label = _only(table.features, library.ClassLabel, self.labels, "labels")
        return Index(names, list(table[label]), table.features[label].names)

    def read(self, name: str) -> bytes:
        stored: dict[str, Any] = self.table[int(name)][self.column]
        return read_bounded(Path(stored["path"])) if stored["bytes"] is None else stored["bytes"]

    def stamp(self, index: int) -> bytes:
        """Return the library's fingerprint of the whole set."""
        return str(self.table._fingerprint).encode()


def _only(features: Any, kind: type, chosen: str | None, option: str) -> str:
    """Return the chosen column, or the only one of its type."""
    fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
    columns = fitting if chosen is None else [chosen]
    without = "" if option == "images" else ", or data.source.classes=false"
    expected = f"one column of type {kind.__name__}, or data.source.{option}=<column>"
    got, remedy = f"{chosen or fitting} of {list(features)}", f"name one with data.source.{option}="
    require(len(columns) == 1 and columns[0] in fitting, expected, got, remedy + without)
    return columns[0]
