"""Sets in the form of NVlabs' dataset_tool: a zip file, or a folder, of images with labels in dataset.json."""

import json
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

from consistency.data.cropping import Crop, halving
from consistency.data.decoding import EXTENSIONS, MOST_BYTES, bad_image
from consistency.data.encoded import Encoded, OnBad, PerProcess
from consistency.data.folder import file_stamp, image_files, read_file
from consistency.errors import UserError, require
from consistency.paths import path_of

LABELS = "dataset.json"
MOST_LABEL_BYTES = 1 << 28
MOST_NAMED = 3


class Archive(Encoded):
    """The images of a set that dataset_tool or `prepare.py` made, sorted by name [NVlabs/edm, stylegan3].

    path: the zip, or the folder it was unpacked to. dataset.json holds {"labels": [[name, class index], ...]} or
    {"labels": null}; with `classes` every image must have its label there, without it all class indices are 0. See
    `Encoded` for the rest; an image that has the right size already is not resized.
    """

    def __init__(
        self,
        *,
        path: str | None,
        image_size: int | None,
        channels: int | None,
        classes: bool,
        crop: Crop = halving,
        num_classes: int | None = None,
        on_bad: OnBad = "stop",
    ) -> None:
        require(
            path is not None and path_of(path).exists(),
            f"a zip or folder made by dataset_tool or prepare.py at data.path={path}",
            "nothing there" if path is not None else "data.path=null",
            "add data.path=<file>; make one with `python src/prepare.py source=<images> output=<file>.zip`",
        )
        self.path = path_of(str(path))
        self.zip = None if self.path.is_dir() else PerProcess(partial(opened_zip, self.path))
        if self.zip is None:
            names, _ = image_files(self.path)
        else:
            suffixed = (n for n in self.zip().namelist() if n.lower().endswith(EXTENSIONS))
            names = sorted(suffixed)
        require(bool(names), f"images in data.path={self.path}", "none", "check the path")
        labels = self._labels(names) if classes else None
        super().__init__(
            names,
            labels,
            where=str(self.path),
            class_names=[] if labels is None else [str(i) for i in range(max(labels) + 1)],
            image_size=image_size,
            channels=channels,
            crop=crop,
            num_classes=num_classes,
            on_bad=on_bad,
        )

    def _labels(self, names: list[str]) -> list[int]:
        table = labels_of(self.path)
        require(
            table is not None,
            f"class labels in {LABELS} of {self.path}",
            "none",
            "set data.source.classes=false and data.num_classes=null",
        )
        assert table is not None
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

    def read(self, name: str) -> bytes:
        """The bytes of an image file, checked by the zip's own checksum."""
        if self.zip is None:
            return read_file(self.path, name)
        try:
            size = self.zip().getinfo(name).file_size
            if size > MOST_BYTES:  # unpacked: a small zip may hold any amount of the same
                raise ValueError(f"{size:,} bytes, more than {MOST_BYTES:,}")
            return self.zip().read(name)
        except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error,
                zipfile.BadZipFile) as error:  # fmt: skip
            raise bad_image(f"{self.path}/{name}", f"a damaged entry ({error})") from error

    def stamp(self, index: int) -> bytes:
        """The checksum of a zip's entry; size and time of a file."""
        if self.zip is None:
            return file_stamp(self.path / self.names[index])
        entry = self.zip().getinfo(self.names[index])
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


def labels_of(path: Path) -> dict[str, int] | None:
    """dataset.json of a zip or folder: name -> class index; None without classes or without the file."""
    content = _labels_content(path)
    if content is None:
        return None
    try:
        stored: Any = json.loads(content)
        rows = stored["labels"]
        table = None if rows is None else {str(name): label for name, label in rows}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _bad_labels(path, f"something else ({type(error).__name__}: {error})") from error
    if table is None or not table:
        return None
    for name, label in table.items():
        if type(label) is not int or not 0 <= label < 2**31:
            raise _bad_labels(path, f"the label {str(label)[:40]} of {name}")
    if len(table) != len(rows):
        raise _bad_labels(path, "two labels for one image")
    return table


def _labels_content(path: Path) -> bytes | None:
    if path.is_dir():
        return (path / LABELS).read_bytes() if (path / LABELS).is_file() else None
    with opened_zip(path) as archive:
        if LABELS not in archive.namelist():
            return None
        try:
            size = archive.getinfo(LABELS).file_size
            if size > MOST_LABEL_BYTES:
                raise ValueError(f"{size:,} bytes, more than {MOST_LABEL_BYTES:,}")
            return archive.read(LABELS)
        except (OSError, EOFError, ValueError, RuntimeError, zlib.error,
                zipfile.BadZipFile) as error:  # fmt: skip
            raise _bad_labels(path, f"a damaged entry ({error})") from error


def _bad_labels(path: Path, got: str) -> UserError:
    return UserError(
        f'expected {{"labels": [["name", class index], ...]}} or {{"labels": null}} in {LABELS} of {path}\n'
        f"  got: {got}\n  do: mend it, or make the set anew with prepare.py"
    )
