"""LPIPS with the published weights: the backbone's from torchvision, the linear ones from the files of torchmetrics.

The two variants are the perceptual distances of the published consistency models. Both take images in [-1, 1], which
`Backbone` normalises as ImageNet.

    average_pooled_unit   ImageNet-64 and LSUN code: average instead of maximum pooling (as in piq, whose input is in
                          [0, 1]), images smaller than 256 pixels bilinearly enlarged to 224
    max_pooled_signed     CIFAR-10 code, and LPIPS as first published: maximum pooling, input in [-1, 1], always 224
"""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from consistency.distances import LPIPS, Resize
from consistency.errors import UserError, require
from consistency.pixels import IMAGENET_MEAN, IMAGENET_STD
from consistency.tensors import Data

BackboneName = Literal["vgg16", "alexnet", "squeezenet1_1"]
Variant = Literal["average_pooled_unit", "max_pooled_signed"]

TAPS: dict[str, tuple[int, ...]] = {
    "vgg16": (3, 8, 15, 22, 29),
    "alexnet": (1, 4, 7, 9, 11),
    "squeezenet1_1": (1, 4, 7, 9, 10, 11, 12),
}
"""Layers of torchvision's `features` whose outputs are compared [Zhang et al. 2018, arXiv:1801.03924, Appendix B]."""

LINEAR_FILES = {"vgg16": "vgg.pth", "alexnet": "alex.pth", "squeezenet1_1": "squeeze.pth"}

RESIZING: dict[str, Resize] = {
    "average_pooled_unit": Resize(size=224, only_below=256, antialias=False),
    "max_pooled_signed": Resize(size=224, only_below=None, antialias=True),
}
"""Antialiasing of the two published codes: JAX filters when it shrinks an image, PyTorch as called there does not."""


class Backbone(nn.Module):
    """Images in [-1, 1] -> the maps of an ImageNet classifier's layers at `taps`."""

    def __init__(self, features: nn.Sequential, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.features, self.taps = features[: taps[-1] + 1], taps
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, x: Data) -> list[Float[Tensor, "b _c _h _w"]]:
        expected, remedy = "images of 1 or 3 channels for LPIPS", "choose another mode.distance"
        require(x.shape[1] in (1, 3), expected, f"{x.shape[1]} channels", remedy)
        h = ((x + 1) / 2 - self.get_buffer("mean")) / self.get_buffer("std")
        maps = []
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in self.taps:
                maps.append(h)
        return maps


def empty_features(backbone: BackboneName) -> nn.Sequential:
    """Return the layers of a torchvision classifier before its head, on the meta device."""
    with torch.device("meta"):
        features: nn.Sequential = torchvision.models.get_model(backbone, weights=None).features
    for layer in features.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return features


def assemble(features: nn.Sequential, backbone: BackboneName, variant: Variant) -> Backbone:
    """Return the feature extractor of a variant: one pools the same windows by their mean."""
    if variant == "average_pooled_unit":
        for i, pool in enumerate(features):
            if isinstance(pool, nn.MaxPool2d):
                window = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
                features[i] = nn.AvgPool2d(*window)
    return Backbone(features, TAPS[backbone])


def load_lpips(*, backbone: BackboneName, variant: Variant) -> LPIPS:
    """Return the perceptual distance of the published runs, which used vgg16, with weights of torch hub."""
    for name, value, known in (("backbone", backbone, TAPS), ("variant", variant, RESIZING)):
        require(value in known, f"an LPIPS {name} among {', '.join(known)}", value, "choose one")
    layers = empty_features(backbone)
    layers.load_state_dict(_imagenet_weights(backbone), assign=True)
    folder = files("torchmetrics") / "functional" / "image" / "lpips_models"  # of LPIPS version 0.1
    with as_file(folder / LINEAR_FILES[backbone]) as path:
        linear = torch.load(path, map_location="cpu", weights_only=True)
    weights = [linear[f"lin{i}.model.1.weight"].flatten() for i in range(len(TAPS[backbone]))]
    features = assemble(layers, backbone, variant)
    return LPIPS(features=features, weights=weights, resize=RESIZING[variant]).requires_grad_(False)


def _imagenet_weights(backbone: BackboneName) -> dict[str, Tensor]:
    url: str = torchvision.models.get_model_weights(backbone).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        expected = f"the ImageNet weights of {backbone}, which LPIPS measures with, at {path}"
        got = f"no readable file, and the download failed ({error})"
        remedy = f"fetch {url} elsewhere and put the file there (TORCH_HOME moves the folder), or choose another distance"
        raise UserError(expected, got, remedy) from error
    return {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
