"""Image files in a folder, and sets in the form of NVlabs' dataset_tool: a zip or folder with labels in dataset.json."""

import json
import re
from dataclasses import dataclass

from consistency.data.decode import UNREADABLE
from consistency.data.image_files import ImageFiles, Index
from consistency.data.listing import LABELS, FolderFiles, ZipFiles, slashed
from consistency.data.source import required_path
from consistency.errors import UserError, require

MOST_LABEL_BYTES = 1 << 28
MOST_NAMED = 3
CHUNKED = re.compile(r"(^|/)\d{5}/img\d{8}\.\w+$")
"""Names that dataset_tool gives: these folders are not classes."""


@dataclass(kw_only=True, eq=False, repr=False)
class Folder(ImageFiles):
    """Image files below a folder, by name, each folder directly below it a class if there are `classes`.

    `consistency.data.listing` has the rules of what is an image or a class.
    """

    path: str | None
    classes: bool

    def open(self) -> Index:
        path = required_path(self.path, "a folder of images")
        expected = f"a folder of images at data.path={path}"
        require(path.is_dir(), expected, "a file", "try data=zip")
        self.where = str(path)
        self.files: FolderFiles | ZipFiles = FolderFiles(path, classes=self.classes)
        self.files.others += self.files.tables  # which data=zip reads
        return self.files.index(classes=self.classes)

    def read(self, name: str) -> bytes:
        return self.files.read(name)

    def stamp(self, index: int) -> bytes:
        return self.files.stamp(self.names[index])


@dataclass(kw_only=True, eq=False, repr=False)
class Archive(Folder):
    """The images of a zip or folder as dataset_tool or `prepare.py` make it, by name [NVlabs/edm, stylegan3].

    dataset.json holds {"labels": [[name, class index], ...]} or {"labels": null}. An image of the right size is not
    resized.

    path: the zip, or the folder it was unpacked to; all may lie in one folder below.
    classes: True takes the classes of dataset.json, or without that file a folder a class; None takes the labels
        of dataset.json if there are any; False takes none.
    """

    classes: bool | None  # type: ignore[assignment]

    def open(self) -> Index:
        path = required_path(self.path, "a zip or folder made by dataset_tool or prepare.py")
        self.where = str(path)
        self.files = FolderFiles(path) if path.is_dir() else ZipFiles(path)
        table = None if self.classes is False else self._label_table()
        if table is None and self.classes:
            names, tables = self.files.names, self.files.tables
            chunks = all(CHUNKED.search(name) for name in names)
            fits = not tables and not chunks and any("/" in name for name in names)
            expected = f"class labels in {LABELS} of {path}, or a folder a class"
            got = f"{LABELS} without labels" if tables else "neither"
            remedy = (
                "set data.source.classes=false data.num_classes=null (preparing: classes=false)"
            )
            require(fits, expected, got, remedy)
            if path.is_dir():
                self.files = FolderFiles(path, classes=True)
        if table is None:
            return self.files.index(classes=bool(self.classes))
        names = list(self.files.index().names)
        without = [name for name in names if name not in table]
        unused = sorted(table.keys() - set(names))
        expected = f"one label for every image and no other in {LABELS} of {path}"
        got = f"{len(without):,} images without a label {without[:MOST_NAMED]}"
        got += f", {len(unused):,} labels without an image {unused[:MOST_NAMED]}"
        remedy = "make the set anew, or set data.source.classes=false and data.num_classes=null"
        require(not without and not unused, expected, got, remedy)
        labels = [table[name] for name in names]
        return Index(names, labels, [str(i) for i in range(max(labels) + 1)])

    def _label_table(self) -> dict[str, int] | None:
        """Read dataset.json, at the top or in the folder of its images: name -> class index; None without classes."""
        tables = self.files.tables
        tables = [LABELS] if LABELS in tables else sorted(tables)
        got = f"{len(tables)}: {', '.join(tables[:MOST_NAMED])}"
        remedy = "give one of these sets alone, or set classes=false (data.source.classes=false)"
        require(len(tables) < 2, f"one {LABELS} in {self.where}", got, remedy)
        if not tables:
            return None
        expected = f'{{"labels": [["name", class index], ...]}} or {{"labels": null}} in {LABELS} of {self.where}'
        remedy = "mend it, or make the set anew with prepare.py"
        try:
            rows = json.loads(self.files.read(tables[0], MOST_LABEL_BYTES))["labels"]
            rows = [] if rows is None else rows
            table = {slashed(str(name)): label for name, label in rows}
        except (*UNREADABLE, TypeError, RecursionError) as error:
            got = f"other or unreadable content ({type(error).__name__}: {error})"
            raise UserError(expected, got, remedy) from error
        got = "" if len(table) == len(rows) else "two labels for one image"
        wrong = [n for n, x in table.items() if type(x) is not int or not 0 <= x < 2**31]
        if wrong:
            label = table[wrong[0]]
            kind = f"a vector of {len(label)} numbers," if type(label) is list else "the label"
            got = f"{kind} {str(label)[:40]}, for {wrong[0]}"
        require(not got, expected, got, remedy)
        above = tables[0].removesuffix(LABELS)
        return {above + name: label for name, label in table.items()} or None
