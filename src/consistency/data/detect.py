"""Detection of the data set at a path, in any of the known forms."""

import zipfile

from consistency.data.huggingface import HuggingFace
from consistency.data.image_files import ImageFiles
from consistency.data.listing import has_labels
from consistency.data.lsun import FILE, Database
from consistency.data.memory import InMemory
from consistency.data.source import require_existing, require_split
from consistency.data.torchvision_sets import CIFAR10, MNIST
from consistency.data.zip_or_folder import Archive, Folder
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
    images: ImageFiles | InMemory
    path = path_of(source)
    require_existing(path, f"images at source={source}")
    require(
        path.is_dir() or path.suffix.lower() == ".zip" or zipfile.is_zipfile(path),
        f"a zip of images or a folder at source={source}",
        f"a file {path.name}",
        "unpack it, or give the folder it is in",
    )
    if path.is_file() or has_labels(path):
        images = Archive(path=source, classes=classes or None, background=background)
    elif (path / FILE).is_file():
        images = Database(path=source, background=background)
    elif kind := next((kind for kind in (MNIST, CIFAR10) if kind.find(path)), None):
        images = kind(path=source, split=split)  # type: ignore[arg-type]  # checked above
    else:
        images = Folder(path=source, classes=classes, background=background)
    require(
        bool(images.class_names) or not classes,
        f"classes in source={source}, for classes=true",
        f"{type(images).__name__}, a set without",
        "leave classes=false",
    )
    return images
