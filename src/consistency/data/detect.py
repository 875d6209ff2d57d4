"""Detection of the data set at a path, in any of the known forms."""

import zipfile
from pathlib import Path

from consistency.data.cifar10 import CIFAR10, cifar_folder
from consistency.data.folder import Folder
from consistency.data.huggingface import HuggingFace
from consistency.data.image_files import ImageFiles
from consistency.data.listing import has_labels
from consistency.data.lsun import FILE, Database
from consistency.data.memory import InMemory
from consistency.data.mnist import MNIST, idx_folder
from consistency.data.source import require_existing, require_split
from consistency.data.zip_or_folder import Archive
from consistency.errors import require
from consistency.runtime.files import path_of

HUB = "hf:"


def detect_source(
    source: str, *, split: str, classes: bool, background: str | None = None
) -> ImageFiles | InMemory:
    """Open the images at `source` in their own size and number of channels.

    source: a zip or folder of dataset_tool's form; the folder of an LMDB, such as bedroom_train_lmdb; a folder of the
        IDX files of (Fashion-)MNIST or of the batches of CIFAR-10; hf:<name> for a set of the Hugging Face hub; any
        other folder of images.
    split: of the sets that have one: train, test or all; on the hub any split of the set.
    classes: whether each folder is a class, of images without labels; a set that cannot have classes is refused.
    background: colour put behind transparent images; None refuses them.
    """
    if source.startswith(HUB):
        name = source.removeprefix(HUB)
        return HuggingFace(name=name, split=split, classes=classes, background=background)
    require_split(split)
    path = path_of(source)
    require_existing(path, f"images at source={source}")
    require(
        path.is_dir() or path.suffix.lower() == ".zip" or zipfile.is_zipfile(path),
        f"a zip of images or a folder at source={source}",
        f"a file {path.name}",
        "unpack it, or give the folder it is in",
    )
    images = _detect(path, split, classes, background)
    require(
        bool(images.class_names) or not classes,
        f"classes in source={source}, for classes=true",
        f"{type(images).__name__}, a set without",
        "leave classes=false",
    )
    return images


def _detect(path: Path, split: str, classes: bool, background: str | None) -> ImageFiles | InMemory:
    if path.is_file() or has_labels(path):
        return Archive(path=str(path), classes=classes or None, background=background)
    if (path / FILE).is_file():
        return Database(path=str(path), background=background)
    if (folder := idx_folder(path)) is not None:
        return MNIST(path=str(folder), split=split)  # type: ignore[arg-type]  # checked above
    if cifar_folder(path) is not None:
        return CIFAR10(path=str(path), split=split)  # type: ignore[arg-type]
    return Folder(path=str(path), classes=classes, background=background)
