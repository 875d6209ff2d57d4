"""A folder of image files."""

from dataclasses import dataclass
from pathlib import Path

from consistency.data.decode import MOST_BYTES, read_bounded
from consistency.data.image_files import ImageFiles, Index
from consistency.data.listing import Listing, in_folder
from consistency.data.source import required_path
from consistency.errors import require


@dataclass(kw_only=True, eq=False, repr=False)
class Folder(ImageFiles):
    """Image files below a folder, in the order of their names. `listing` has the rules of what is an image or a class.

    path: the folder.
    classes: whether each folder directly below it is a class.
    """

    path: str | None
    classes: bool

    def open(self) -> Index:
        folder = required_path(self.path, "a folder of images")
        self.where, self.files = str(folder), FolderFiles(folder)
        require(
            folder.is_dir(), f"a folder of images at data.path={folder}", "a file", "try data=zip"
        )
        listing = self.files.listing(classes=self.classes)
        listing.others += listing.tables  # which data=zip reads
        listing.require_images()
        return Index(listing.names, *(listing.classes() if self.classes else ()))

    def read(self, name: str) -> bytes:
        return self.files.read(name)

    def stamp(self, index: int) -> bytes:
        return self.files.stamp(self.names[index])


@dataclass(frozen=True)
class FolderFiles:
    """The files below a folder, by names relative to it."""

    folder: Path

    def listing(self, *, classes: bool = False) -> Listing:
        """List the folder."""
        return in_folder(self.folder, classes=classes)

    def read(self, name: str, most: int = MOST_BYTES) -> bytes:
        """Return the content of a file of at most `most` bytes."""
        return read_bounded(self.folder / name, most)

    def stamp(self, name: str) -> bytes:
        """Return size and time of a file."""
        return file_stamp(self.folder / name)


def file_stamp(file: Path) -> bytes:
    """Return size and time of a file."""
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}".encode()
