"""A small network for toy distributions, such as points in the plane as images of one pixel."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from consistency.networks.layers import (
    SecondTime,
    at_least_float32,
    check_label,
    times_of,
    two_times,
    zeroed,
)
from consistency.tensors import Data, Label, Time

HARMONICS = 8


class MLP(nn.Module):
    """Residual layers on the flattened data, each shifted by time and class; starts at zero.

    `channels` counts the numbers of one sample, c h w. Time enters as c, sin(i c), cos(i c) for
    i = 1..8, which suits c_noise = 0.25 ln t and times from 0 to 1. `second_time` adds those of a second time.
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        depth: int,
        num_classes: int | None = None,
        second_time: SecondTime = None,
    ) -> None:
        super().__init__()
        self.channels, self.num_classes, self.second_time = channels, num_classes, second_time
        features = times_of(second_time) * (1 + 2 * HARMONICS)
        self.embed = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        if num_classes is not None:
            self.label = nn.Embedding(num_classes, width)
        self.first = nn.Linear(channels, width)
        self.shifts = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = zeroed(nn.Linear(width, channels))

    def forward(
        self, x: Data, c_noise: Time, label: Label = None, *, r: Time | None = None
    ) -> Data:
        check_label(label, self.num_classes)
        if x[0].numel() != self.channels:
            raise ValueError(
                f"expected {self.channels} numbers per sample; got shape {tuple(x.shape)}. "
                "Set channels of the network to c h w of the data."
            )
        dtype = self.last.weight.dtype
        features = two_times(self._features, c_noise, r, self.second_time)
        embedding = self.embed(features.to(dtype))
        if label is not None:
            embedding = embedding + self.label(label)
        embedding = functional.silu(embedding)
        h = self.first(x.flatten(1).to(dtype))
        for shift, layer in zip(self.shifts, self.layers, strict=True):
            h = h + layer(functional.silu(h + shift(embedding)))
        return self.last(functional.silu(h)).reshape(x.shape).to(x.dtype)

    def _features(self, c_noise: Time) -> Float[Tensor, "b features"]:
        c = c_noise.to(at_least_float32(c_noise.dtype))[:, None]
        phase = c * torch.arange(1, HARMONICS + 1, device=c.device)
        return torch.cat([c, phase.sin(), phase.cos()], dim=1)
