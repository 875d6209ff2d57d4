"""Detection of the data set at a path, in any of the known forms."""

import zipfile

from consistency.data.cifar10 import CIFAR10
from consistency.data.huggingface import HuggingFace
from consistency.data.image_files import ImageFiles
from consistency.data.listing import has_labels
from consistency.data.lsun import FILE, Database
from consistency.data.memory import InMemory
from consistency.data.mnist import MNIST
from consistency.data.source import require_existing, require_split
from consistency.data.zip_or_folder import Archive, Folder
from consistency.errors import require
from consistency.runtime.files import path_of


def detect_source(
    source: str, *, split: str, classes: bool, background: str | None = None
) -> ImageFiles | InMemory:
    """Open the images at `source` in their own size and number of channels; conf/prepare.yaml has the options."""
    if source.startswith("hf:"):
        name = source.removeprefix("hf:")
        return HuggingFace(name=name, split=split, classes=classes, background=background)
    require_split(split)
    images: ImageFiles | InMemory
    path = path_of(source)
    require_existing(path, f"images at source={source}")
    known = path.is_dir() or path.suffix.lower() == ".zip" or zipfile.is_zipfile(path)
    expected, got = f"a zip of images or a folder at source={source}", f"a file {path.name}"
    require(known, expected, got, "unpack it, or give the folder it is in")
    if path.is_file() or has_labels(path):
        images = Archive(path=source, classes=classes or None, background=background)
    elif (path / FILE).is_file():
        images = Database(path=source, background=background)
    elif kind := next((kind for kind in (MNIST, CIFAR10) if kind.find(path)), None):
        images = kind(path=source, split=split)  # type: ignore[arg-type]  # checked above
    else:
        images = Folder(path=source, classes=classes, background=background)
    expected, got = f"classes in source={source}, for classes=true", type(images).__name__
    fits = bool(images.class_names) or not classes
    require(fits, expected, f"{got}, a set without", "leave classes=false")
    return images
