"""One's own images: a folder of image files."""

from collections import Counter
from pathlib import Path

from consistency.data.cropping import Crop, halving
from consistency.data.decoding import EXTENSIONS, bad_image
from consistency.data.encoded import Encoded, OnBad
from consistency.errors import require
from consistency.paths import path_of


class Folder(Encoded):
    """Image files under `path`, in sorted order; with `classes`, each folder directly below it is a class.

    Images are found by their suffix, case aside; `ignored` counts the other files by theirs. See `Encoded` for the rest
    and `decode` for what is done with images of unusual kinds.
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
            "check the path; it is taken relative to the folder the command runs in",
        )
        names, self.ignored = image_files(self.folder)
        if classes:
            self._require_no_image_beside(names)
        require(
            bool(names),
            f"image files under data.path={self.folder}",
            "none",
            "any of these types will do: " + ", ".join(EXTENSIONS),
        )
        tops = [name.split("/", 1)[0] for name in names] if classes else []
        class_names = sorted(set(tops))
        number = {name: index for index, name in enumerate(class_names)}
        super().__init__(
            names,
            [number[top] for top in tops] or None,
            where=str(self.folder),
            class_names=class_names,
            image_size=image_size,
            channels=channels,
            crop=crop,
            num_classes=num_classes,
            on_bad=on_bad,
        )

    def _require_no_image_beside(self, names: list[str]) -> None:
        beside = [name for name in names if "/" not in name]
        require(
            not beside,
            f"one folder a class, and no image beside them, in data.path={self.folder}",
            f"{len(beside):,} images without a class, the first of them {(beside or [''])[0]}",
            "move them into folders, or leave data.source.classes=false",
        )

    def read(self, name: str) -> bytes:
        """The bytes of an image file."""
        return read_file(self.folder, name)

    def stamp(self, index: int) -> bytes:
        """Size and time of the file."""
        return file_stamp(self.folder / self.names[index])


def image_files(folder: Path) -> tuple[list[str], Counter[str]]:
    """Names of the image files below a folder, relative to it, sorted; and how many other files, by suffix."""
    names, ignored = [], Counter[str]()
    for file in folder.rglob("*"):
        if file.suffix.lower() in EXTENSIONS and file.is_file():
            names.append(file.relative_to(folder).as_posix())
        elif file.is_file():
            ignored[file.suffix.lower() or file.name] += 1
    return sorted(names), ignored


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
