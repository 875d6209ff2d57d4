"""One's own images: a folder of image files."""

from pathlib import Path

from consistency.data.cropping import Crop, halving
from consistency.data.decoding import EXTENSIONS, bad_image
from consistency.data.encoded import Encoded, OnBad
from consistency.data.listing import in_folder
from consistency.errors import require
from consistency.paths import path_of


class Folder(Encoded):
    """Image files under `path`, in sorted order; with `classes`, each folder directly below it is a class.

    What is an image, a class and what is passed over says `listing`. See `Encoded` for the rest and `decode` for what is
    done with images of unusual kinds.
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
        background: str | None = None,
    ) -> None:
        require(
            path is not None,
            "a folder of images in data.path",
            "data.path=null",
            "add data.path=<folder>; any mix of " + ", ".join(EXTENSIONS),
        )
        self.folder = path_of(str(path))
        require(
            self.folder.is_dir(),
            f"a folder of images at data.path={self.folder}",
            "a file" if self.folder.exists() else "nothing there",
            "data=zip reads a zip of images"
            if self.folder.exists()
            else "check the path; it is taken relative to the folder the command runs in",
        )
        found = in_folder(self.folder, classes=classes)
        found.others += found.tables  # which data=zip reads
        found.tell()
        require(
            bool(found.names),
            f"image files under data.path={self.folder}",
            "none",
            "any of these types will do: " + ", ".join(EXTENSIONS),
        )
        labels, class_names = found.classes() if classes else (None, [])
        super().__init__(
            found.names,
            labels,
            where=str(self.folder),
            class_names=class_names,
            image_size=image_size,
            channels=channels,
            crop=crop,
            num_classes=num_classes,
            on_bad=on_bad,
            background=background,
        )

    def read(self, name: str) -> bytes:
        """The bytes of an image file."""
        return read_file(self.folder, name)

    def stamp(self, index: int) -> bytes:
        """Size and time of the file."""
        return file_stamp(self.folder / self.names[index])


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of a file; one that cannot be read is a bad image."""
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise bad_image(f"{folder}/{name}", f"a file that cannot be read ({error})") from error


def file_stamp(file: Path) -> bytes:
    """Size and time of a file."""
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns}".encode()
