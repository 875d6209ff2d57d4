"""Image sets of the Hugging Face hub, by name; needs the extra `huggingface`."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from consistency.data.cropping import Crop, halving
from consistency.data.decoding import bad_image
from consistency.data.encoded import Encoded, OnBad
from consistency.errors import UserError, require


class HuggingFace(Encoded):
    """A set of the hub, or a folder that `datasets` can read.

    name, subset, split: as in `datasets.load_dataset`; images and labels: the columns, None for the set's only one of
    that type (no label where there is none). cache: where the download is kept, None for the library's own place. Images
    stay encoded as they are stored, and are decoded by our own rules. See `Encoded` for the rest.
    """

    def __init__(
        self,
        *,
        name: str | None,
        split: str,
        image_size: int | None,
        channels: int | None,
        classes: bool,
        subset: str | None = None,
        images: str | None = None,
        labels: str | None = None,
        cache: str | None = None,
        crop: Crop = halving,
        num_classes: int | None = None,
        on_bad: OnBad = "stop",
        background: str | None = None,
    ) -> None:
        require(name is not None, "the name of a set in data.path", "null", "add data.path=<name>")
        library = _library()
        try:
            table = library.load_dataset(name, subset, split=split, cache_dir=cache)
        except (
            Exception
        ) as error:  # the library raises its own, its network's and its file systems' errors
            raise UserError(
                f"expected the set {name} (subset {subset}, split {split}) for data.path={name}\n"
                f"  got: {type(error).__name__}: {str(error)[:300]}\n"
                "  do: check the name; without a network, fill the library's cache beforehand"
            ) from error
        column = _only(table.features, library.Image, images, "images")
        assert column is not None
        self.table = table.select_columns([column]).cast_column(column, library.Image(decode=False))
        self.column = column
        label = _only(table.features, library.ClassLabel, labels, "labels") if classes else None
        super().__init__(
            [str(i) for i in range(len(table))],
            None if label is None else list(table[label]),
            where=str(name),
            class_names=[] if label is None else table.features[label].names,
            image_size=image_size,
            channels=channels,
            crop=crop,
            num_classes=num_classes,
            on_bad=on_bad,
            background=background,
        )

    def read(self, name: str) -> bytes:
        """The bytes of an image as stored, or of the file the set points to."""
        stored: dict[str, Any] = self.table[int(name)][self.column]
        if stored["bytes"] is not None:
            return stored["bytes"]
        try:
            return Path(stored["path"]).read_bytes()
        except OSError as error:
            raise bad_image(
                f"{self.where}/{name}", f"a file that cannot be read ({error})"
            ) from error

    def stamp(self, index: int) -> bytes:
        """The library's fingerprint of the set."""
        return str(self.table._fingerprint).encode()


def _library() -> ModuleType:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            "expected the library `datasets` for a set of the Hugging Face hub (data.path)\n"
            f"  got: {error}\n  do: pip install 'consistency[huggingface]', or in this repository pip install datasets"
        ) from error


def _only(features: Any, kind: type, chosen: str | None, option: str) -> str | None:
    """The chosen column, or the only one of its type."""
    fitting: Sequence[str] = [
        name for name, feature in features.items() if isinstance(feature, kind)
    ]
    found = [chosen] if chosen is not None else fitting
    require(
        len(found) == 1 and found[0] in fitting,
        f"one column of type {kind.__name__}, or data.source.{option}=<column>",
        f"{chosen or list(fitting)} of {list(features)}",
        f"name one with data.source.{option}="
        + ("" if option == "images" else ", or data.source.classes=false"),
    )
    return found[0]
