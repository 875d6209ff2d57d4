"""Which files of a folder or a zip are images, and what is passed over: the one walk that all commands share."""

import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path, PurePosixPath

from lightning.pytorch.utilities import rank_zero_only

from consistency.data.decoding import EXTENSIONS, MOST_BYTES, is_image
from consistency.errors import require

LABELS = "dataset.json"

NOT_OURS = {
    "__macosx", "__pycache__", "@eadir", "#recycle", "#snapshot", "@recycle", "lost+found", "$recycle.bin",
    "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
"""What systems leave in folders, beside names that begin with a dot; lower case."""

PICTURES = {
    ".heic", ".heif", ".svg", ".psd", ".tga", ".ico", ".exr", ".hdr", ".pfm", ".eps", ".pdf", ".jxl", ".dds",
    ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".orf", ".rw2", ".pef", ".srw", ".raf", ".raw",
    ".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mos", ".mrw", ".rwl", ".fff", ".mef", ".x3f", ".crw",
}  # fmt: skip
"""Pictures of kinds that are not read. Some hold a JPEG or TIFF that shows them small, so no file says otherwise."""

NEVER = PICTURES | {
    ".txt", ".caption", ".json", ".jsonl", ".csv", ".xml", ".md", ".yaml", ".yml", ".html", ".npy", ".npz",
    ".bak", ".old", ".orig", ".tmp", ".part", ".crdownload", ".thm", ".lrv",
}  # fmt: skip
"""Not opened to see what they hold: there may be one beside every image, or they are copies and halves of images."""

SHOWN = 6

UNREADABLE = (
    *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError, KeyError),
    *(zlib.error, zipfile.BadZipFile),
)
"""What reading a file or a zip's entry raises."""


def hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to a system or a program."""
    return name.startswith(".") or name.lower() in NOT_OURS


@dataclass
class Listing:
    """What lies in a folder or zip, by name relative to it, with slashes.

    names: the images, sorted. folders: all that are not hidden. level: the folder whose folders are the classes. tables:
    files of labels. others: files of other types. hidden, broken (links that lead nowhere, folders that cannot be opened)
    and repeated (links to what is there already) are passed over. entries: what a zip itself calls its images.
    """

    where: str
    names: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    level: str = ""
    tables: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    entries: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, opening: Callable[[], BufferedIOBase]) -> bool:
        """Takes in a file, by its suffix or by how it begins; whether it is an image."""
        suffix = os.path.splitext(name)[1].lower()
        if suffix in EXTENSIONS or _begins_as_image(name, suffix, opening):
            self.names.append(name)
            return True
        (self.tables if name.rsplit("/", 1)[-1] == LABELS else self.others).append(name)
        return False

    def tell(self) -> None:
        """Says in one line what is passed over, if anything is."""
        others = Counter(map(_kind, self.others))
        told = []
        if others:
            told.append(f"files of other types: {_counted(others)}")
            if unread := sorted(others.keys() & PICTURES):
                told[-1] += (
                    f" ({', '.join(unread)} are pictures that cannot be read: save them as PNG)"
                )
        if self.hidden:
            own = (name.rsplit("/", 1)[-1] for name in self.hidden)
            kinds = Counter("._*" if name.startswith("._") else name for name in own)
            told.append(f"{len(self.hidden):,} hidden files and folders: {_counted(kinds)}")
        if self.broken:
            shown = ", ".join(sorted(self.broken)[:SHOWN])
            told.append(f"{len(self.broken):,} links or folders that cannot be followed: {shown}")
        if self.repeated:
            shown = ", ".join(sorted(self.repeated)[:SHOWN])
            told.append(f"{len(self.repeated):,} links to what is there already: {shown}")
        if told:
            line = f"Ignored in {self.where}: {'; '.join(told)}"
            rank_zero_only(print)(line.encode(errors="backslashreplace").decode())

    def classes(self) -> tuple[list[int], list[str]]:
        """The class index of every image and the names of the classes, which are the folders at `level`."""
        depth = len(PurePosixPath(self.level).parts)
        beside = [name for name in self.names if name.count("/") <= depth]
        require(
            not beside,
            f"one folder a class, and no image beside them, in {self.where}",
            f"{len(beside):,} images without a class, the first of them {(beside or [''])[0]}",
            "move them into folders, or leave classes=false (data.source.classes=false)",
        )
        tops = [name.split("/")[depth] for name in self.names]
        known = set(tops)
        lost = {n for n in self.broken if os.path.splitext(n)[1].lower() not in EXTENSIONS}
        folders = {n.split("/")[depth] for n in self.folders | lost if n.count("/") >= depth}
        empty = sorted(folders - known - {self.level})
        held = []
        for top in empty[:SHOWN]:
            inside = [n for n in self.others if n.split("/")[depth : depth + 1] == [top]]
            held.append(f"{top} ({_counted(Counter(map(_kind, inside))) or 'empty'})")
        require(
            not empty,
            f"images in every class folder of {self.where}",
            f"{len(empty):,} without any: {', '.join(held)}",
            "put images in, or remove the folder; the classes are numbered in the order of their names",
        )
        names = sorted(known)
        number = {name: index for index, name in enumerate(names)}
        return [number[top] for top in tops], names


def in_folder(folder: Path, *, classes: bool = False) -> Listing:
    """What lies below a folder. Links are followed, each real folder and file once, with `classes` once a class."""
    root, found = str(folder), Listing(str(folder))
    if not classes:
        _walk(root, "", found, set())
    else:
        found.level = class_level(lambda name: children(folder / name))
        above = {os.path.realpath(os.path.join(root, part)) for part in _chain(found.level)}
        tops = _walk(root, found.level, found, above, deep=False)
        for top in sorted(tops):
            _walk(root, top, found, set(above))
    found.names.sort()
    return found


def _chain(level: str) -> list[str]:
    parts = PurePosixPath(level).parts
    return ["/".join(parts[:count]) for count in range(len(parts) + 1)]


def _walk(root: str, top: str, found: Listing, known: set[str], *, deep: bool = True) -> list[str]:
    """Adds what lies in the folder `top`, what links lead to last; `known`: real paths that are not added again.

    Not `deep`: adds the files directly in it, and returns the folders.
    """
    if not deep:
        known = known - {os.path.realpath(os.path.join(root, top))}
    folders = [(top, os.path.realpath(os.path.join(root, top)))]
    linked: list[str] = []
    files: list[str] = []
    inside: list[str] = []
    while folders or linked:
        if not folders:
            linked.sort(reverse=True)
            name = linked.pop()
            folders.append((name, os.path.realpath(os.path.join(root, name))))
        place, real = folders.pop()
        if real in known:
            found.repeated.append(place)
            continue
        known.add(real)
        if place:
            found.folders.add(place)
        try:
            entries = list(os.scandir(os.path.join(root, place)))
        except OSError:
            found.broken.append(place)
            continue
        for entry in entries:
            name = f"{place}/{entry.name}" if place else entry.name
            if hidden(entry.name):
                found.hidden.append(name)
            elif entry.is_symlink():
                if os.path.isdir(entry.path):
                    (linked if deep else inside).append(name)
                elif os.path.isfile(entry.path):
                    files.append(name)
                else:
                    found.broken.append(name)
            elif entry.is_dir():
                if deep:
                    folders.append((name, f"{real.rstrip('/')}/{entry.name}"))
                else:
                    inside.append(name)
            elif entry.is_file():
                found.add(name, lambda path=entry.path: open(path, "rb"))  # type: ignore[misc]
    for name in sorted(files):
        path = os.path.join(root, name)
        real = os.path.realpath(path)
        there = os.path.dirname(real) in known and not hidden(os.path.basename(real))
        if there or real in known:
            found.repeated.append(name)
        else:
            known.add(real)
            found.add(name, lambda path=path: open(path, "rb"))  # type: ignore[misc]
    return inside


def children(folder: Path) -> tuple[list[str], bool]:
    """The folders in a folder that are not hidden, by their names, and whether images lie beside them."""
    folders, images = [], False
    for entry in os.scandir(folder):
        if not hidden(entry.name):
            if entry.is_dir():
                folders.append(entry.name)
            elif PurePosixPath(entry.name).suffix.lower() in EXTENSIONS:
                images = True
    return folders, images


def has_labels(folder: Path) -> bool:
    """Whether a file of labels lies in a folder, or in the one folder that it holds, and so on."""
    while not (folder / LABELS).is_file():
        folders, images = children(folder)
        if images or len(folders) != 1:
            return False
        folder /= folders[0]
    return True


def class_level(children: Callable[[str], tuple[list[str], bool]]) -> str:
    """The folder whose folders are the classes: below one that holds nothing but one folder of folders, that one."""
    level = ""
    while True:
        folders, images = children(level)
        if images or len(folders) != 1:
            return level
        inner = f"{level}/{folders[0]}" if level else folders[0]
        folders, images = children(inner)
        if images or not folders:
            return level
        level = inner


def in_zip(archive: zipfile.ZipFile, where: str) -> Listing:
    """What lies in a zip; names with backslashes, as some programs write them, are those with slashes."""
    found = Listing(where)
    for entry in archive.infolist():
        parts = [p for p in entry.filename.replace("\\", "/").split("/") if p not in ("", ".")]
        ends = entry.filename.endswith(("/", "\\"))
        name = "/".join(parts)
        not_ours = next((n for n, part in enumerate(parts) if hidden(part)), None)
        if not_ours is not None:
            if not ends:
                found.hidden.append("/".join(parts[: not_ours + 1]))
            continue
        found.folders.update("/".join(parts[:n]) for n in range(1, len(parts) + ends))
        if ends or not parts:
            continue
        if stat.S_ISLNK(entry.external_attr >> 16):
            found.broken.append(name)
        elif name in found.entries:
            found.entries[name] = entry.filename  # written anew: the last one counts
        elif found.add(name, lambda entry=entry: _entry(archive, entry)):  # type: ignore[misc]
            found.entries[name] = entry.filename
        elif name.rsplit("/", 1)[-1] == LABELS:
            found.entries[name] = entry.filename
    found.names.sort()
    found.level = class_level(lambda level: _children_in(found, level))
    return found


def _entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> BufferedIOBase:
    if entry.file_size > MOST_BYTES:
        raise OSError("too large")
    return archive.open(entry)  # type: ignore[return-value]


def _children_in(found: Listing, level: str) -> tuple[list[str], bool]:
    def directly(names: Iterable[str]) -> list[str]:
        return [n for n in names if n.rpartition("/")[0] == level]

    return [n.rpartition("/")[2] for n in directly(found.folders)], bool(directly(found.names))


def _begins_as_image(name: str, suffix: str, opening: Callable[[], BufferedIOBase]) -> bool:
    if suffix in NEVER or name.endswith("~"):
        return False
    try:
        with opening() as stream:
            return is_image(stream)
    except UNREADABLE:
        return False


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _counted(kinds: Counter[str]) -> str:
    """3 .txt, 1 .mp4: the most frequent first."""
    ordered = sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))
    more = len(ordered) - SHOWN
    shown = [f"{count:,} {kind}" for kind, count in ordered[:SHOWN]]
    return ", ".join([*shown, *([f"{more:,} other kinds"] if more > 0 else [])])
