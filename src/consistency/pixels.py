"""Pixel values: uint8 images in files, float images in [-1, 1] in networks."""

import torch
from jaxtyping import UInt8
from torch import Tensor

from consistency.tensors import Data

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels in ImageNet, black 0 and white 1."""


def to_unit(images: UInt8[Tensor, "b c h w"]) -> Data:
    """Scale 0 ... 255 to [-1, 1]."""
    return images.float() / 127.5 - 1


def quantised(x: Data) -> UInt8[Tensor, "b c h w"]:
    """Clamp to [-1, 1] and round to 0 ... 255, on the device of x."""
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_uint8(x: Data) -> UInt8[Tensor, "b c h w"]:
    """`quantised`, on the CPU."""
    return quantised(x).cpu()
