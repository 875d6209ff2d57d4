"""What a loader that is not ours gives the training: images in [-1, 1] and class indices, or a message."""

from typing import Any

import torch
from torch import Tensor

from consistency.errors import require
from consistency.pixels import to_unit
from consistency.tensors import Data, Label

ROUNDING = 1e-4

FORM = "batches (images, labels): images uint8, or float within [-1, 1], of shape (batch, channels, height, width)"


def fed(
    batch: Any, *, shape: tuple[int, ...] | None, num_classes: int | None
) -> tuple[Data, Label]:
    """Images and labels of a batch: (images, labels), (images,), or images alone.

    Images of uint8 are scaled; float ones are in [-1, 1] and taken as they are. Labels are integers below `num_classes`, and
    ignored by a model without classes. shape: of an image, where it is known.
    """
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    require(
        len(parts) in (1, 2) and isinstance(parts[0], Tensor),
        FORM,
        f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in parts)}",
        "give a loader of TensorDataset(images, labels), or of a Dataset whose items are (image, label)",
    )
    images, labels = parts[0], parts[1] if len(parts) == 2 else None
    wanted = shape or tuple(images.shape[1:])
    require(
        images.ndim == 4 and tuple(images.shape[1:]) == wanted,
        f"images of shape (batch, {', '.join(map(str, shape or ('channels', 'height', 'width')))})",
        f"{images.dtype} of shape {tuple(images.shape)}",
        "change the loader, or build the module for these images: data.channels=, data.image_size=, model=",
    )
    return _in_unit(images), None if num_classes is None else _classes(
        labels, len(images), num_classes
    )


def _in_unit(images: Tensor) -> Data:
    if images.dtype == torch.uint8:
        return to_unit(images)
    require(
        images.is_floating_point(),
        "images of uint8 from 0 to 255, or of float within [-1, 1]",
        f"images of {images.dtype}",
        "say images.to(torch.uint8) for grey values from 0 to 255",
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
    wanted = f"{count} labels, integers from 0 to {num_classes - 1}, for a model of {num_classes} classes"
    remedy = "give them, or build the module without classes: data.num_classes=null"
    require(labels is not None, wanted, "none", remedy)
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    kind = (
        f"{labels.dtype} of shape {tuple(labels.shape)}"
        if isinstance(labels, Tensor)
        else type(labels).__name__
    )
    require(
        whole and labels.dtype != torch.bool and tuple(labels.shape) == (count,),
        wanted,
        kind,
        remedy,
    )
    if count:
        low, high = torch.stack(torch.aminmax(labels)).tolist()
        span = f"labels from {low} to {high}"
        require(
            0 <= low and high < num_classes,
            wanted,
            span,
            "set data.num_classes, or count classes from 0",
        )
    return labels.long()
