"""Sets in the form of NVlabs' dataset_tool: a zip file, or a folder, of images with labels in dataset.json."""

import json
import re
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

from consistency.data.cropping import Crop, halving
from consistency.data.decoding import MOST_BYTES, bad_image
from consistency.data.encoded import Encoded, OnBad, PerProcess
from consistency.data.folder import file_stamp, read_file
from consistency.data.listing import LABELS, UNREADABLE, Listing, in_folder, in_zip
from consistency.errors import UserError, require
from consistency.paths import path_of

MOST_LABEL_BYTES = 1 << 28
MOST_NAMED = 3
CHUNKED = re.compile(r"(^|/)\d{5}/img\d{8}\.\w+$")
"""Names that dataset_tool gives: such folders are no classes."""


class Archive(Encoded):
    """The images of a zip or folder as dataset_tool or `prepare.py` make it, sorted by name [NVlabs/edm, stylegan3].

    path: the zip, or the folder it was unpacked to; all may lie in one folder below. dataset.json holds
    {"labels": [[name, class index], ...]} or {"labels": null}; with `classes` every image must have its label there, or
    without that file each folder is a class; classes=None takes the labels there are, and without `classes` all class
    indices are 0. See `Encoded` for the rest; an image that has the right size already is not resized.
    """

    def __init__(
        self,
        *,
        path: str | None,
        image_size: int | None,
        channels: int | None,
        classes: bool | None,
        crop: Crop = halving,
        num_classes: int | None = None,
        on_bad: OnBad = "stop",
        background: str | None = None,
    ) -> None:
        require(
            path is not None and path_of(path).exists(),
            f"a zip or folder made by dataset_tool or prepare.py at data.path={path}",
            "nothing there" if path is not None else "data.path=null",
            "add data.path=<file>; make one with `python src/prepare.py source=<images> output=<file>.zip`",
        )
        self.path = path_of(str(path))
        self.zip = None if self.path.is_dir() else PerProcess(partial(opened_zip, self.path))
        found = (
            in_folder(self.path) if self.zip is None else in_zip(self.zip(), where=str(self.path))
        )
        self.entries = found.entries
        table = None if classes is False else self._table(found)
        if classes and table is None:
            self._require_class_folders(found)
            found = in_folder(self.path, classes=True) if self.zip is None else found
        found.tell()
        require(bool(found.names), f"images in data.path={self.path}", "none", "check the path")
        labels: list[int] | None = None
        class_names: list[str] = []
        if table is not None:
            labels = self._labels(found.names, table)
            class_names = [str(i) for i in range(max(labels) + 1)]
        elif classes:
            labels, class_names = found.classes()
        super().__init__(
            found.names,
            labels,
            where=str(self.path),
            class_names=class_names,
            image_size=image_size,
            channels=channels,
            crop=crop,
            num_classes=num_classes,
            on_bad=on_bad,
            background=background,
        )

    def _table(self, found: Listing) -> dict[str, int] | None:
        """Name -> class index as dataset.json says, which lies at the top or in the folder whose images it names."""
        tables = [LABELS] if LABELS in found.tables else sorted(found.tables)
        require(
            len(tables) < 2,
            f"one {LABELS} in {self.path}",
            f"{len(tables)}: {', '.join(tables[:MOST_NAMED])}",
            "give one of these sets alone, or set classes=false (data.source.classes=false)",
        )
        if not tables:
            return None
        above = tables[0].rpartition("/")[0]
        table = labels_in(self._labels_content(tables[0]), self.path)
        return table and {f"{above}/{name}" if above else name: n for name, n in table.items()}

    def _require_class_folders(self, found: Listing) -> None:
        """Folders may be classes where no dataset.json says that there are none, and dataset_tool made no such folders."""
        chunks = all(CHUNKED.search(name) for name in found.names)
        require(
            not found.tables and not chunks and any("/" in name for name in found.names),
            f"class labels in {LABELS} of {self.path}, or a folder a class",
            f"{LABELS} without labels" if found.tables else "neither",
            "set data.source.classes=false and data.num_classes=null (classes=false when preparing)",
        )

    def _labels(self, names: list[str], table: dict[str, int]) -> list[int]:
        without = [name for name in names if name not in table]
        unused = sorted(table.keys() - set(names))
        require(
            not without and not unused,
            f"one label for every image and no other in {LABELS} of {self.path}",
            f"{len(without):,} images without a label {without[:MOST_NAMED]}, "
            f"{len(unused):,} labels without an image {unused[:MOST_NAMED]}",
            "make the set anew, or set data.source.classes=false and data.num_classes=null",
        )
        return [table[name] for name in names]

    def _labels_content(self, name: str) -> bytes:
        if self.zip is None:
            return (self.path / name).read_bytes()
        try:
            entry = self.zip().getinfo(self.entries[name])
            if entry.file_size > MOST_LABEL_BYTES:
                raise ValueError(f"{entry.file_size:,} bytes, more than {MOST_LABEL_BYTES:,}")
            return self.zip().read(entry)
        except UNREADABLE as error:
            raise _bad_labels(self.path, f"an entry that cannot be read ({error})") from error

    def read(self, name: str) -> bytes:
        """The bytes of an image file, checked by the zip's own checksum."""
        if self.zip is None:
            return read_file(self.path, name)
        try:
            entry = self.zip().getinfo(self.entries[name])
            if (
                entry.file_size > MOST_BYTES
            ):  # unpacked: a small zip may hold any amount of the same
                raise ValueError(f"{entry.file_size:,} bytes, more than {MOST_BYTES:,}")
            return self.zip().read(entry)
        except UNREADABLE as error:
            locked = isinstance(
                error, RuntimeError
            )  # with a password, or packed in a way not known here
            kind = "an entry that cannot be opened" if locked else "a damaged entry"
            raise bad_image(f"{self.path}/{name}", f"{kind} ({error})") from error

    def stamp(self, index: int) -> bytes:
        """The checksum of a zip's entry; size and time of a file."""
        if self.zip is None:
            return file_stamp(self.path / self.names[index])
        entry = self.zip().getinfo(self.entries[self.names[index]])
        return f"{entry.CRC} {entry.file_size}".encode()


def opened_zip(path: Path) -> zipfile.ZipFile:
    """An open zip file."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(
            f"expected a zip file at {path}\n  got: one that is damaged, cut short or no zip ({error})\n"
            "  do: copy or download it again, or make it anew with prepare.py"
        ) from error


def labels_in(content: bytes, path: Path) -> dict[str, int] | None:
    """What a dataset.json says: name -> class index; None without classes."""
    try:
        stored: Any = json.loads(content)
        rows = stored["labels"]
        table = None if rows is None else {_slashed(str(name)): label for name, label in rows}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _bad_labels(path, f"something else ({type(error).__name__}: {error})") from error
    if table is None or not table:
        return None
    for name, label in table.items():
        if isinstance(label, list):
            got = f"a vector of {len(label)} numbers, {str(label)[:40]}, for {name}"
            raise _bad_labels(path, got)
        if type(label) is not int or not 0 <= label < 2**31:
            raise _bad_labels(path, f"the label {str(label)[:40]} of {name}")
    if len(table) != len(rows):
        raise _bad_labels(path, "two labels for one image")
    return table


def _slashed(name: str) -> str:
    """A name as `listing` gives it."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _bad_labels(path: Path, got: str) -> UserError:
    return UserError(
        f'expected {{"labels": [["name", class index], ...]}} or {{"labels": null}} in {LABELS} of {path}\n'
        f"  got: {got}\n  do: mend it, or make the set anew with prepare.py"
    )
