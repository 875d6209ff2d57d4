"""Comparison of LPIPS with golden data, with weights made by the recipe in section 3 of the golden README."""

import numpy as np
import torch
from torch import Tensor, nn

from consistency.distances import LPIPS
from consistency.training.lpips import TAPS, Variant, assemble, empty_features
from golden_harness import Archive, Tolerance

SAME = Tolerance(of_each=1e-5)
GRADIENT = Tolerance(of_norm=1e-5)
VARIANTS: dict[str, Variant] = {"True": "average_pooled_unit", "False": "max_pooled_signed"}


def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape)


def recipe(offset: int, variant: Variant) -> LPIPS:
    """VGG16 with weights of normal draws; images keep their size."""
    features = empty_features("vgg16")
    state: dict[str, Tensor] = {}
    for index, layer in enumerate(features):
        if isinstance(layer, nn.Conv2d):
            shape = tuple(layer.weight.shape)
            scale = np.sqrt(2 / np.prod(shape[1:]))
            weight = _normal(1000 + offset + index, shape) * scale
            bias = 0.05 * _normal(2000 + offset + index, shape[:1])
            state[f"{index}.weight"] = torch.from_numpy(weight.astype(np.float32))
            state[f"{index}.bias"] = torch.from_numpy(bias.astype(np.float32))
    channels = [state[f"{tap - 1}.bias"].shape for tap in TAPS["vgg16"]]
    weights = [np.abs(_normal(3000 + offset + j, tuple(c))) for j, c in enumerate(channels)]
    features.load_state_dict(state, assign=True)
    return LPIPS(
        features=assemble(features, "vgg16", variant),
        weights=[torch.from_numpy(w.astype(np.float32)) for w in weights],
        resize=nn.Identity(),
    ).requires_grad_(False)


def compare_lpips(archive: Archive) -> None:
    """Both kinds of pooling. The arrays are images in [0, 1], ours take [-1, 1]."""
    offset = int(archive.number("recipe_offset"))
    y = archive.tensor("y")
    for array in archive.matching("lpips.replace_pooling_*"):
        pooling = array.removeprefix("lpips.replace_pooling_")
        lpips = recipe(offset, VARIANTS[pooling])
        x = archive.tensor("x").requires_grad_()
        layers = lpips.per_layer(2 * x - 1, 2 * y - 1)
        distance = lpips(2 * x - 1, 2 * y - 1)
        archive.compare(array, distance, SAME)
        archive.compare(f"per_layer.replace_pooling_{pooling}", layers, SAME)
        gradient = f"grad_x.replace_pooling_{pooling}"
        if gradient in archive:
            distance.sum().backward()
            assert x.grad is not None
            archive.compare(gradient, x.grad, GRADIENT)
