"""Which files of a folder or a zip are images, and which are ignored: the one walk that all commands share."""

import heapq
import os
import stat
import zipfile
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from io import BufferedIOBase
from itertools import accumulate
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

from consistency.data import decode
from consistency.data.crop import fit
from consistency.data.decode import EXTENSIONS, MOST_BYTES
from consistency.data.image_files import Index, file_stamp
from consistency.data.parallel import PerProcess
from consistency.data.source import Images, require_existing
from consistency.errors import UserError, require
from consistency.runtime.files import path_of

LABELS = "dataset.json"

NOT_OURS = {
    "__macosx", "__pycache__", "@eadir", "#recycle", "#snapshot", "@recycle", "lost+found", "$recycle.bin",
    "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
"""Files and folders of operating systems, beside names that begin with a dot; lower case."""

PICTURES = {
    ".heic", ".heif", ".svg", ".psd", ".tga", ".ico", ".exr", ".hdr", ".pfm", ".eps", ".pdf", ".jxl", ".dds",
    ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".orf", ".rw2", ".pef", ".srw", ".raf", ".raw",
    ".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mos", ".mrw", ".rwl", ".fff", ".mef", ".x3f", ".crw",
}  # fmt: skip
"""Pictures that are not read. Some hold a small preview as JPEG or TIFF, so that their content would mislead."""

NEVER = PICTURES | {
    ".txt", ".caption", ".json", ".jsonl", ".csv", ".xml", ".md", ".yaml", ".yml", ".html", ".npy", ".npz",
    ".bak", ".old", ".orig", ".tmp", ".part", ".crdownload", ".thm", ".lrv",
}  # fmt: skip
"""Files that are not opened to look for an image: companions, copies and parts of images."""

MOST_SHOWN = 6
FOLDER, LINKED_FOLDER, LINKED_FILE = range(3)
"""The turns of a walk: of two ways to a file the one without links counts."""


def hidden(name: str) -> bool:
    """Return whether a file or folder of this name belongs to a system or a program."""
    return name.startswith(".") or name.lower() in NOT_OURS


class Listing(ABC):
    """The files of the folder or zip `path`, by names relative to it, with slashes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.depth = 0  # of the folders that are classes
        self.folders: set[str] = set()  # all that are not hidden
        self.names: list[str] = []  # of the images, sorted
        self.tables: list[str] = []  # files of labels
        self.others: list[str] = []  # files of other types; these are ignored, and the next three
        self.hidden: list[str] = []
        self.broken: list[str] = []  # links without target and folders that cannot be opened
        self.repeated: list[str] = []  # links to what is listed already

    @abstractmethod
    def open(self, name: str) -> BufferedIOBase: ...

    def add(self, name: str) -> None:
        """Add a file, an image by its suffix or by how its content begins."""
        suffix = os.path.splitext(name)[1].lower()
        is_picture = suffix in EXTENSIONS
        if not is_picture and suffix not in NEVER and not name.endswith("~"):
            with suppress(*decode.UNREADABLE), self.open(name) as stream:
                is_picture = decode.is_image(stream)
        is_table = os.path.basename(name) == LABELS
        (self.names if is_picture else self.tables if is_table else self.others).append(name)

    def index(self, *, classes: bool = False) -> Index:
        """Return the images, with `classes` a folder a class; print one line about ignored files."""
        types = [_suffix(name) for name in self.others]
        unread = ", ".join(sorted(PICTURES.intersection(types)))
        note = f" ({unread} are pictures that cannot be read: save them as PNG)" if unread else ""
        own = [os.path.basename(name) for name in self.hidden]
        kinds = ["._*" if name.startswith("._") else name for name in own]
        parts = [
            f"{len(names):,} {what}: {counts or ', '.join(sorted(names)[:MOST_SHOWN])}"
            for names, what, counts in (
                (self.others, "files of other types", _counts(types) + note),
                (self.hidden, "hidden files and folders", _counts(kinds)),
                (self.broken, "links or folders that cannot be followed", ""),
                (self.repeated, "links to files listed already", ""),
            )
            if names
        ]
        if parts:
            line = f"Ignored in {self.path}: {'; '.join(parts)}"
            rank_zero_only(print)(line.encode(errors="backslashreplace").decode())
        remedy = f"add some of the types {', '.join(EXTENSIONS)}"
        require(bool(self.names), f"images in {self.path}", "none", remedy)
        return self._with_classes() if classes else Index(self.names)

    def _with_classes(self) -> Index:
        beside = [name for name in self.names if name.count("/") <= self.depth]
        expected = f"one folder a class, and no image beside them, in {self.path}"
        got = f"{len(beside):,} images without a class, the first of them {''.join(beside[:1])}"
        remedy = "move them into folders, or leave classes=false (data.source.classes=false)"
        require(not beside, expected, got, remedy)
        tops = [self.class_of(name) for name in self.names]
        classes = sorted(set(tops))
        lost = {n for n in self.broken if os.path.splitext(n)[1].lower() not in EXTENSIONS}
        empty = sorted({self.class_of(name) for name in self.folders | lost} - {"", *classes})
        shown = []
        for top in empty[:MOST_SHOWN]:
            content = _counts(_suffix(name) for name in self.others if self.class_of(name) == top)
            shown.append(f"{top} ({content or 'empty'})")
        expected = f"images in every class folder of {self.path}"
        got = f"{len(empty):,} without any: {', '.join(shown)}"
        remedy = "put images in, or remove the folder; the classes are numbered in the order of their names"
        require(not empty, expected, got, remedy)
        number = {name: index for index, name in enumerate(classes)}
        return Index(self.names, [number[top] for top in tops], classes)

    def class_of(self, name: str) -> str:
        """Return the class folder that a file or folder is or lies in; "" for the folders above these."""
        return "".join(name.split("/")[self.depth : self.depth + 1])


class FolderFiles(Listing):
    """The files below a folder. Links are followed, each real folder and file once, with `classes` once a class."""

    def __init__(self, path: Path, *, classes: bool = False) -> None:
        super().__init__(path)
        level = Path(class_level(lambda name: children(path / name)) if classes else "")
        self.depth = len(level.parts)
        tops = [os.path.realpath(path / top) for top in (level, *level.parents)]
        known = defaultdict[str, set[str]](lambda: set(tops))  # real paths, by class
        queue = sorted(self._scan("/".join(level.parts)))
        while queue:
            turn, name = heapq.heappop(queue)
            real = os.path.realpath(path / name)
            listed = known[self.class_of(name) if classes else ""]
            folder, own = os.path.split(real)
            inside = turn == LINKED_FILE and folder in listed and not hidden(own)
            if inside or real in listed:
                self.repeated.append(name)
                continue
            listed.add(real)
            if turn == LINKED_FILE:
                self.add(name)
            else:
                for entry in self._scan(name):
                    heapq.heappush(queue, entry)
        self.names.sort()

    def _scan(self, folder: str) -> Iterator[tuple[int, str]]:
        """Add the files of a folder; yield its folders and links, each with its turn."""
        self.folders.add(folder)
        try:
            entries = list(os.scandir(self.path / folder))
        except OSError:
            self.broken.append(folder)
            return
        for entry in entries:
            name = f"{folder}/{entry.name}".lstrip("/")
            if hidden(entry.name):
                self.hidden.append(name)
            elif entry.is_dir(follow_symlinks=False):
                yield FOLDER, name
            elif entry.is_file(follow_symlinks=False):
                self.add(name)
            elif os.path.isdir(entry.path):
                yield LINKED_FOLDER, name
            elif os.path.isfile(entry.path):
                yield LINKED_FILE, name
            elif entry.is_symlink():
                self.broken.append(name)

    def open(self, name: str) -> BufferedIOBase:
        return (self.path / name).open("rb")

    def read(self, name: str, most: int = MOST_BYTES) -> bytes:
        return decode.read_bounded(self.path / name, most)

    def stamp(self, name: str) -> bytes:
        return file_stamp(self.path / name)


class ZipFiles(Listing):
    """The files in a zip, whose content its own checksums check. Backslashes in names are read as slashes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.zip = PerProcess(partial(zipfile.ZipFile, path))
        self.entries: dict[str, str] = {}  # names that the zip itself gives
        try:
            entries = self.zip().infolist()
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            got = f"a damaged, incomplete or other file ({error})"
            remedy = "copy or download it again, or make it anew with prepare.py"
            raise UserError(f"a zip file at {path}", got, remedy) from error
        for entry in entries:
            parts = slashed(entry.filename).split("/")
            *folders, name = accumulate(parts, os.path.join)
            is_folder = entry.filename.endswith(("/", "\\")) or not name
            if unseen := [p for p, own in zip([*folders, name], parts, strict=True) if hidden(own)]:
                self.hidden += [] if is_folder else unseen[:1]
                continue
            self.folders.update(folders)
            if is_folder:
                self.folders.add(name)
            elif stat.S_ISLNK(entry.external_attr >> 16):
                self.broken.append(name)
            else:
                self.entries[name] = entry.filename  # of two entries of one name the last counts
        for name in self.entries:
            self.add(name)
        self.names.sort()
        self.depth = len(Path(class_level(self._children)).parts)

    def _children(self, level: str) -> tuple[list[str], bool]:
        folders = [os.path.basename(n) for n in self.folders if n and os.path.dirname(n) == level]
        return folders, any(os.path.dirname(name) == level for name in self.names)

    def open(self, name: str, most: int = MOST_BYTES) -> BufferedIOBase:
        entry = self.zip().getinfo(self.entries[name])
        decode.require_size(entry.file_size, most)
        return self.zip().open(entry)  # type: ignore[return-value]

    def read(self, name: str, most: int = MOST_BYTES) -> bytes:
        with self.open(name, most) as stream:
            return stream.read()

    def stamp(self, name: str) -> bytes:
        entry = self.zip().getinfo(self.entries[name])
        return f"{entry.CRC} {entry.file_size}".encode()


def children(folder: Path) -> tuple[list[str], bool]:
    """Return the names of the folders in a folder that are not hidden, and whether images lie beside them."""
    _, folders, files = next(os.walk(folder), ("", [], []))
    suffixes = {os.path.splitext(name)[1].lower() for name in files if not hidden(name)}
    return [name for name in folders if not hidden(name)], not suffixes.isdisjoint(EXTENSIONS)


def _chain(children: Callable[[str], tuple[list[str], bool]]) -> Iterator[tuple[str, bool]]:
    """Yield the top, the only folder in it, the only one in that and so on, and whether each has folders alone.

    children: returns the names of the folders in a folder, and whether images lie beside them.
    """
    name, folders, images = "", [""], False
    while not images and len(folders) == 1:
        name = f"{name}/{folders[0]}".lstrip("/")
        folders, images = children(name)
        yield name, bool(folders) and not images


def has_labels(folder: Path) -> bool:
    """Return whether a file of labels lies in a folder, or in the only folder in it, and so on."""
    chain = _chain(lambda name: children(folder / name))
    return any((folder / name / LABELS).is_file() for name, _ in chain)


def class_level(children: Callable[[str], tuple[list[str], bool]]) -> str:
    """Return the folder whose folders are the classes: the top, or below single folders of folders the last of these."""
    return [name for name, of_folders in _chain(children) if of_folders or not name][-1]


def slashed(name: str) -> str:
    """Return the name of a file in a zip or a table of labels as listings have it."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _counts(kinds: Iterable[str]) -> str:
    """Return "3 .txt, 1 .mp4", the most frequent first."""
    ordered = Counter(sorted(kinds)).most_common()
    more = len(ordered) - MOST_SHOWN
    shown = [f"{count:,} {kind}" for kind, count in ordered[:MOST_SHOWN]]
    return ", ".join(shown) + (f", {more:,} other kinds" if more > 0 else "")


def files_at(path: str) -> list[Path]:
    """Return the image at a path, or the images below the folder there, in the order of their names."""
    file = path_of(path)
    require_existing(file, f"an image or a folder of images at {file}")
    return [file / name for name in FolderFiles(file).index().names] if file.is_dir() else [file]


def read_images(path: str, channels: int, size: int, background: str | None = None) -> Images:
    """Read the image or all images at a path, for a model of images of so many channels and pixels."""
    require(channels in decode.MODES, "a model of 1 or 3 channels", channels, "choose another")
    mode, colour = decode.MODES[channels], decode.colour_of(background)
    pictures = (decode.read_picture(file, mode, colour) for file in files_at(path))
    return torch.stack([decode.to_tensor(fit(picture, size)) for picture in pictures])
