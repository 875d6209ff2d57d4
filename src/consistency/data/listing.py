"""Which files of a folder or a zip are images, and which are ignored: the one walk that all commands share."""

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from io import FileIO, IOBase
from pathlib import Path, PurePosixPath

import torch
from jaxtyping import UInt8
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from consistency.data.crop import fit
from consistency.data.decode import (
    EXTENSIONS,
    MODES,
    UNREADABLE,
    colour_of,
    is_image,
    read_picture,
    require_size,
    to_tensor,
)
from consistency.data.source import require_existing
from consistency.errors import require
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


def hidden(name: str) -> bool:
    """Return whether a file or folder of this name belongs to a system or a program."""
    return name.startswith(".") or name.lower() in NOT_OURS


class Listing:
    """The content of the folder or zip `where`, by names relative to it, with slashes."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.names: list[str] = []  # of the images, sorted
        self.tables: list[str] = []  # files of labels
        self.others: list[str] = []  # files of other types
        self.folders: set[str] = set()  # all that are not hidden
        self.level = ""  # the folder whose folders are the classes
        self.hidden: list[str] = []  # these are ignored, and the next two
        self.broken: list[str] = []  # links without target and folders that cannot be opened
        self.repeated: list[str] = []  # links to images that are listed already
        self.entries: dict[str, str] = {}  # names that a zip itself gives to its images

    def add(self, name: str, opening: Callable[[], IOBase]) -> None:
        """Add a file, an image by its suffix or by how its content begins."""
        suffix = os.path.splitext(name)[1].lower()
        is_picture = suffix in EXTENSIONS
        if not is_picture and suffix not in NEVER and not name.endswith("~"):
            with suppress(*UNREADABLE), opening() as stream:
                is_picture = is_image(stream)
        is_table = name.rsplit("/", 1)[-1] == LABELS
        (self.names if is_picture else self.tables if is_table else self.others).append(name)

    def require_images(self) -> None:
        """Print one line about ignored files, if there are any; refuse a listing without images."""
        parts = []
        if others := Counter(map(_suffix, self.others)):
            parts.append(f"files of other types: {_counts(others)}")
            if unread := ", ".join(sorted(others.keys() & PICTURES)):
                parts[0] += f" ({unread} are pictures that cannot be read: save them as PNG)"
        if self.hidden:
            own = (name.rsplit("/", 1)[-1] for name in self.hidden)
            kinds = Counter("._*" if name.startswith("._") else name for name in own)
            parts.append(f"{len(self.hidden):,} hidden files and folders: {_counts(kinds)}")
        for names, kind in (
            (self.broken, "links or folders that cannot be followed"),
            (self.repeated, "links to files listed already"),
        ):
            if names:
                parts.append(f"{len(names):,} {kind}: {', '.join(sorted(names)[:MOST_SHOWN])}")
        if parts:
            line = f"Ignored in {self.where}: {'; '.join(parts)}"
            rank_zero_only(print)(line.encode(errors="backslashreplace").decode())
        types = f"add some of the types {', '.join(EXTENSIONS)}"
        require(bool(self.names), f"images in {self.where}", "none", types)

    def classes(self) -> tuple[list[int], list[str]]:
        """Return the class index of every image and the names of the classes, which are the folders at `level`."""
        depth = len(PurePosixPath(self.level).parts)
        beside = [name for name in self.names if name.count("/") <= depth]
        expected = f"one folder a class, and no image beside them, in {self.where}"
        got = f"{len(beside):,} images without a class, the first of them {''.join(beside[:1])}"
        remedy = "move them into folders, or leave classes=false (data.source.classes=false)"
        require(not beside, expected, got, remedy)
        tops = [name.split("/")[depth] for name in self.names]
        names = sorted(set(tops))
        lost = {n for n in self.broken if os.path.splitext(n)[1].lower() not in EXTENSIONS}
        folders = {n.split("/")[depth] for n in self.folders | lost if n.count("/") >= depth}
        content = {top: Counter[str]() for top in sorted(folders - {*names, self.level})}
        for name in self.others:
            top = "".join(name.split("/")[depth : depth + 1])
            if top in content:
                content[top][_suffix(name)] += 1
        shown = [f"{top} ({_counts(kinds) or 'empty'})" for top, kinds in content.items()]
        expected = f"images in every class folder of {self.where}"
        got = f"{len(content):,} without any: {', '.join(shown[:MOST_SHOWN])}"
        remedy = "put images in, or remove the folder; the classes are numbered in the order of their names"
        require(not content, expected, got, remedy)
        number = {name: index for index, name in enumerate(names)}
        return [number[top] for top in tops], names


def in_folder(folder: Path, *, classes: bool = False) -> Listing:
    """List a folder. Links are followed, each real folder and file once, with `classes` once a class."""
    listing = Listing(str(folder))
    if not classes:
        _Walk(folder, listing, set()).below("")
    else:
        listing.level = class_level(lambda name: children(folder / name))
        parts = PurePosixPath(listing.level).parts
        above = {os.path.realpath(folder.joinpath(*parts[:n])) for n in range(len(parts))}
        top = _Walk(folder, listing, above)
        top.scan(listing.level)
        top.add_linked_files()
        above.add(os.path.realpath(folder / listing.level))
        for name in sorted(top.folders + top.linked_folders):
            _Walk(folder, listing, above).below(name)
    listing.names.sort()
    return listing


class _Walk:
    """A walk through folders below `root` that adds to a listing, links last.

    known: real paths that are not listed again; the walk keeps a copy.
    """

    def __init__(self, root: Path, listing: Listing, known: Iterable[str]) -> None:
        self.root, self.listing, self.known = root, listing, set(known)
        self.folders: list[str] = []
        self.linked_folders: list[str] = []
        self.linked_files: list[str] = []

    def below(self, name: str) -> None:
        """List a folder and all folders below it."""
        self.folders.append(name)
        while self.folders or self.linked_folders:
            if not self.folders:
                self.linked_folders.sort(reverse=True)
                self.folders.append(self.linked_folders.pop())
            self.scan(self.folders.pop())
        self.add_linked_files()

    def scan(self, name: str) -> None:
        """List the files of one folder; note its folders and its links."""
        path, listing = os.path.join(self.root, name), self.listing
        real = os.path.realpath(path)
        if real in self.known:
            listing.repeated.append(name)
            return
        self.known.add(real)
        if name:
            listing.folders.add(name)
        try:
            entries = list(os.scandir(path))
        except OSError:
            listing.broken.append(name)
            return
        for entry in entries:
            inner = f"{name}/{entry.name}".lstrip("/")
            if hidden(entry.name):
                listing.hidden.append(inner)
            elif not entry.is_symlink():
                if entry.is_dir():
                    self.folders.append(inner)
                elif entry.is_file():
                    listing.add(inner, partial(FileIO, entry.path))
            elif os.path.isdir(entry.path):
                self.linked_folders.append(inner)
            elif os.path.isfile(entry.path):
                self.linked_files.append(inner)
            else:
                listing.broken.append(inner)

    def add_linked_files(self) -> None:
        """List the files that links lead to, unless they are listed already."""
        for name in sorted(self.linked_files):
            path = os.path.join(self.root, name)
            real = os.path.realpath(path)
            inside = os.path.dirname(real) in self.known and not hidden(os.path.basename(real))
            if inside or real in self.known:
                self.listing.repeated.append(name)
            else:
                self.known.add(real)
                self.listing.add(name, partial(FileIO, path))


def children(folder: Path) -> tuple[list[str], bool]:
    """Return the names of the folders in a folder that are not hidden, and whether images lie beside them."""
    entries = [entry for entry in os.scandir(folder) if not hidden(entry.name)]
    folders = [entry.name for entry in entries if entry.is_dir()]
    suffixes = {os.path.splitext(entry.name)[1].lower() for entry in entries if not entry.is_dir()}
    return folders, not suffixes.isdisjoint(EXTENSIONS)


def has_labels(folder: Path) -> bool:
    """Return whether a file of labels lies in a folder, or in the only folder in it, and so on."""
    while not (folder / LABELS).is_file():
        folders, images = children(folder)
        if images or len(folders) != 1:
            return False
        folder /= folders[0]
    return True


def class_level(children: Callable[[str], tuple[list[str], bool]]) -> str:
    """Return the folder whose folders are the classes: the top, or below single folders of folders the last of these."""
    level, inner = "", ""
    folders, images = children(level)
    while folders and not images:
        level = inner
        if len(folders) > 1:
            break
        inner = f"{level}/{folders[0]}".lstrip("/")
        folders, images = children(inner)
    return level


def in_zip(archive: zipfile.ZipFile, where: str) -> Listing:
    """List a zip; backslashes in names, as some programs write them, are read as slashes."""
    listing = Listing(where)

    def opened(entry: zipfile.ZipInfo) -> IOBase:
        require_size(entry.file_size)
        return archive.open(entry)  # type: ignore[return-value]

    def children(level: str) -> tuple[list[str], bool]:
        folders = [PurePosixPath(n).name for n in listing.folders if os.path.dirname(n) == level]
        return folders, any(os.path.dirname(name) == level for name in listing.names)

    for entry in archive.infolist():
        name = slashed(entry.filename)
        paths = ["/".join(name.split("/")[:n]) for n in range(1, name.count("/") + 2)]
        is_folder = entry.filename.endswith(("/", "\\")) or not name
        if out_of_sight := [path for path in paths if hidden(os.path.basename(path))]:
            listing.hidden += [] if is_folder else out_of_sight[:1]
            continue
        listing.folders.update(paths if is_folder and name else paths[:-1])
        if not is_folder and stat.S_ISLNK(entry.external_attr >> 16):
            listing.broken.append(name)
        elif not is_folder:
            if name not in listing.entries:
                listing.add(name, partial(opened, entry))
            listing.entries[name] = entry.filename  # of two entries of one name the last counts
    listing.names.sort()
    listing.level = class_level(children)
    return listing


def slashed(name: str) -> str:
    """Return the name of a file in a zip or a table of labels as listings have it."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _counts(kinds: Counter[str]) -> str:
    """Return "3 .txt, 1 .mp4", the most frequent first."""
    ordered = sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))
    more = len(ordered) - MOST_SHOWN
    shown = [f"{count:,} {kind}" for kind, count in ordered[:MOST_SHOWN]]
    return ", ".join(shown) + (f", {more:,} other kinds" if more > 0 else "")


def files_at(path: str) -> list[Path]:
    """Return the image at a path, or the images below the folder there, in the order of their names."""
    file = path_of(path)
    require_existing(file, f"an image or a folder of images at {file}")
    if not file.is_dir():
        return [file]
    listing = in_folder(file)
    listing.require_images()
    return [file / name for name in listing.names]


def read_images(
    path: str, channels: int, size: int, background: str | None = None
) -> UInt8[Tensor, "n c h w"]:
    """Read the image or all images at a path, for a model of images of so many channels and pixels."""
    require(channels in MODES, "a model of images of 1 or 3 channels", channels, "choose another")
    mode, colour = MODES[channels], colour_of(background)
    pictures = (read_picture(file, mode, colour) for file in files_at(path))
    return torch.stack([to_tensor(fit(picture, size)) for picture in pictures])
