"""Image files in a folder, and sets in the form of NVlabs' dataset_tool: a zip or folder with labels in dataset.json."""

import json
import re
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from consistency.data.decode import MOST_BYTES, UNREADABLE, read_bounded, require_size
from consistency.data.image_files import ImageFiles, Index
from consistency.data.listing import LABELS, Listing, in_folder, in_zip, slashed
from consistency.data.parallel import PerProcess
from consistency.data.source import required_path
from consistency.errors import UserError, require

MOST_LABEL_BYTES = 1 << 28
MOST_NAMED = 3
CHUNKED = re.compile(r"(^|/)\d{5}/img\d{8}\.\w+$")
"""Names that dataset_tool gives: these folders are not classes."""


class FolderFiles:
    """The files below a folder, by names relative to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def listing(self, *, classes: bool = False) -> Listing:
        """List the folder."""
        return in_folder(self.path, classes=classes)

    def read(self, name: str, most: int = MOST_BYTES) -> bytes:
        """Return the content of a file of at most `most` bytes."""
        return read_bounded(self.path / name, most)

    def stamp(self, name: str) -> bytes:
        """Return size and time of a file."""
        status = (self.path / name).stat()
        return f"{status.st_size} {status.st_mtime_ns}".encode()


class ZipFiles:
    """The files in a zip, by names with slashes. Their content is checked by the zip's own checksums."""

    def __init__(self, path: Path) -> None:
        self.path, self.zip = path, PerProcess(partial(_open_zip, path))
        self.entries: dict[str, str] = {}

    def listing(self, *, classes: bool = False) -> Listing:
        """List the zip, the same with classes and without."""
        listing = in_zip(self.zip(), where=str(self.path))
        self.entries = listing.entries
        return listing

    def read(self, name: str, most: int = MOST_BYTES) -> bytes:
        """Return the content of a file of at most `most` bytes."""
        entry = self.zip().getinfo(self.entries[name])
        require_size(entry.file_size, most)
        return self.zip().read(entry)

    def stamp(self, name: str) -> bytes:
        """Return checksum and size of a file."""
        entry = self.zip().getinfo(self.entries[name])
        return f"{entry.CRC} {entry.file_size}".encode()


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        got = f"a damaged, incomplete or other file ({error})"
        remedy = "copy or download it again, or make it anew with prepare.py"
        raise UserError(f"a zip file at {path}", got, remedy) from error


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
        self.where, self.files = str(path), FolderFiles(path)
        listing = self.files.listing(classes=self.classes)
        listing.others += listing.tables  # which data=zip reads
        listing.require_images()
        return Index(listing.names, *(listing.classes() if self.classes else ()))

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
        self.files = FolderFiles(path) if path.is_dir() else ZipFiles(path)  # type: ignore[assignment]
        listing = self.files.listing()
        table = None if self.classes is False else self._label_table(listing)
        if self.classes and table is None:
            self._require_class_folders(listing)
            listing = self.files.listing(classes=True)
        listing.require_images()
        if table is not None:
            without = [name for name in listing.names if name not in table]
            unused = sorted(table.keys() - set(listing.names))
            expected = f"one label for every image and no other in {LABELS} of {self.where}"
            got = f"{len(without):,} images without a label {without[:MOST_NAMED]}"
            got += f", {len(unused):,} labels without an image {unused[:MOST_NAMED]}"
            remedy = "make the set anew, or set data.source.classes=false and data.num_classes=null"
            require(not without and not unused, expected, got, remedy)
            labels = [table[name] for name in listing.names]
            return Index(listing.names, labels, [str(i) for i in range(max(labels) + 1)])
        return Index(listing.names, *(listing.classes() if self.classes else ()))

    def _label_table(self, listing: Listing) -> dict[str, int] | None:
        """Read dataset.json, at the top or in the folder of its images: name -> class index."""
        tables = [LABELS] if LABELS in listing.tables else sorted(listing.tables)
        got = f"{len(tables)}: {', '.join(tables[:MOST_NAMED])}"
        remedy = "give one of these sets alone, or set classes=false (data.source.classes=false)"
        require(len(tables) < 2, f"one {LABELS} in {self.where}", got, remedy)
        if not tables:
            return None
        try:
            content = self.files.read(tables[0], MOST_LABEL_BYTES)
        except UNREADABLE as error:
            raise _bad_labels(self.where, f"a file that cannot be read ({error})") from error
        above = tables[0].removesuffix(LABELS)
        table = labels_in(content, self.where)
        return table and {above + name: label for name, label in table.items()}

    def _require_class_folders(self, listing: Listing) -> None:
        """Refuse folders as classes if a dataset.json has none, or if dataset_tool made the folders."""
        chunks = all(CHUNKED.search(name) for name in listing.names)
        fits = not listing.tables and not chunks and any("/" in name for name in listing.names)
        expected = f"class labels in {LABELS} of {self.where}, or a folder a class"
        got = f"{LABELS} without labels" if listing.tables else "neither"
        remedy = "set data.source.classes=false data.num_classes=null (preparing: classes=false)"
        require(fits, expected, got, remedy)


def labels_in(content: bytes, where: str) -> dict[str, int] | None:
    """Parse a dataset.json: name -> class index; None without classes. where: the set, for messages."""
    try:
        rows: Any = json.loads(content)["labels"]
        table = None if rows is None else {slashed(str(name)): label for name, label in rows}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _bad_labels(where, f"something else ({type(error).__name__}: {error})") from error
    if not table:
        return None
    for name, label in table.items():
        if type(label) is not int or not 0 <= label < 2**31:
            kind = f"a vector of {len(label)} numbers," if isinstance(label, list) else "the label"
            raise _bad_labels(where, f"{kind} {str(label)[:40]}, for {name}")
    if len(table) != len(rows):
        raise _bad_labels(where, "two labels for one image")
    return table


def _bad_labels(where: str, got: str) -> UserError:
    expected = '{"labels": [["name", class index], ...]} or {"labels": null}'
    remedy = "mend it, or make the set anew with prepare.py"
    return UserError(f"{expected} in {LABELS} of {where}", got, remedy)
