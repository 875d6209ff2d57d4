"""Batches of a foreign loader: images in [-1, 1] and class indices, or one message."""

from typing import Any

import torch
from torch import Tensor

from consistency.errors import require
from consistency.pixels import to_unit
from consistency.tensors import Data, Label

ROUNDING = 1e-4


def unpack_batch(
    batch: Any, *, shape: tuple[int, ...] | None, num_classes: int | None
) -> tuple[Data, Label]:
    """Return images and labels of a batch: (images, labels), (images,), or images alone.

    Images of uint8 are scaled; float ones must be in [-1, 1]. Labels are integers below `num_classes`; without
    classes they are ignored.

    shape: of an image, if it is known.
    """
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    require(
        len(parts) in (1, 2) and isinstance(parts[0], Tensor),
        "batches (images, labels): images uint8, or float within [-1, 1], of shape (batch, channels, height, width)",
        f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in parts)}",
        "give a loader of TensorDataset(images, labels), or of a Dataset whose items are (image, label)",
    )
    images = parts[0]
    require(
        images.ndim == 4 and shape in (None, tuple(images.shape[1:])),
        f"images of shape (batch, {', '.join(map(str, shape or ('channels', 'height', 'width')))})",
        f"{images.dtype} of shape {tuple(images.shape)}",
        "change the loader, or build the module for these images: data.channels=, data.image_size=, model=",
    )
    if num_classes is None:
        return _in_unit(images), None
    return _in_unit(images), _classes(parts[1] if parts[1:] else None, len(images), num_classes)


def _in_unit(images: Tensor) -> Data:
    if images.dtype == torch.uint8:
        return to_unit(images)
    require(
        images.is_floating_point(),
        "images of uint8 from 0 to 255, or of float within [-1, 1]",
        f"images of {images.dtype}",
        "write images.to(torch.uint8) for grey values from 0 to 255",
    )
    low, high = torch.stack(torch.aminmax(images)).tolist()
    require(
        -1 - ROUNDING <= low and high <= 1 + ROUNDING,
        "float images within [-1, 1]",
        f"values from {low:.4g} to {high:.4g}",
        "give uint8, or scale them: x / 127.5 - 1 from 0 ... 255, 2 * x - 1 from 0 ... 1",
    )
    return images.float()


def _classes(labels: Any, count: int, num_classes: int) -> Label:
    got, fits = "none" if labels is None else type(labels).__name__, False
    if isinstance(labels, Tensor):
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        floating = labels.is_floating_point() or labels.is_complex()
        fits = not floating and labels.dtype != torch.bool and tuple(labels.shape) == (count,)
        if fits and count:
            low, high = torch.stack(torch.aminmax(labels)).tolist()
            got, fits = f"labels from {low} to {high}", 0 <= low and high < num_classes
    require(
        fits,
        f"{count} labels, integers from 0 to {num_classes - 1}, for a model of {num_classes} classes",
        got,
        "give them, counted from 0, or set data.num_classes; null builds the module without classes",
    )
    return labels.long()
