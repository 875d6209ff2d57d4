"""What lies at a path, whichever of the known forms it has."""

import zipfile
from typing import Any

from consistency.data.archive import Archive
from consistency.data.cifar import CIFAR10, cifar_folder
from consistency.data.encoded import PLAIN, Encoded
from consistency.data.folder import Folder
from consistency.data.held import Held
from consistency.data.huggingface import HuggingFace
from consistency.data.idx import MNIST, PREFIXES, idx_folder
from consistency.data.listing import has_labels
from consistency.data.lsun import FILE, Database
from consistency.errors import require
from consistency.paths import path_of

HUB = "hf:"


def opened(
    source: str, *, split: str, classes: bool, background: str | None = None
) -> Encoded | Held:
    """The images at `source`, undisturbed: own size, own number of channels.

    source: a zip or folder of dataset_tool's form; an LMDB's folder, such as bedroom_train_lmdb; a folder with the IDX
    files of (Fashion-)MNIST or with the batches of CIFAR-10; hf:<name> for a set of the Hugging Face hub; any other
    folder is one of images. classes: of images without labels, whether each folder is a class; a set that can have none is
    then refused. split: of the sets that have one; train, test or all, and on the hub any that a set has.
    """
    found = _opened(source, split, classes, {**PLAIN, "background": background})
    require(
        bool(found.class_names) or not classes,
        f"classes in source={source}, for classes=true",
        f"{type(found).__name__}, a set without",
        "leave classes=false",
    )
    return found


def _opened(source: str, split: str, classes: bool, settings: dict[str, Any]) -> Encoded | Held:
    if source.startswith(HUB):
        return HuggingFace(name=source.removeprefix(HUB), split=split, **settings, classes=classes)
    require(split in PREFIXES, "split=train, test or all", split, "choose one")
    path = path_of(source)
    require(
        path.exists(),
        f"images at source={source}",
        "nothing there",
        "check the path; it is taken relative to the folder the command runs in",
    )
    if path.is_file():
        require(
            path.suffix.lower() == ".zip" or zipfile.is_zipfile(path),
            f"a zip of images or a folder at source={source}",
            f"a file {path.name}",
            "unpack it, or give the folder it is in",
        )
    plain: dict[str, Any] = {"path": str(path), **settings}
    if path.is_file() or has_labels(path):
        return Archive(**plain, classes=classes or None)
    if (path / FILE).is_file():
        return Database(**plain)
    if (idx := idx_folder(path)) is not None:
        return MNIST(path=str(idx), split=split)  # type: ignore[arg-type]  # checked above
    if cifar_folder(path) is not None:
        return CIFAR10(path=str(path), split=split)  # type: ignore[arg-type]
    return Folder(**plain, classes=classes)
