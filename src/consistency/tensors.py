"""The vocabulary of the project: named array types and the one broadcast.

Under the variance-exploding process sigma(t) = t, so the "sigma" of Karras et al. (2022) is our time `t`.
"""

from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Data: TypeAlias = Float[Tensor, "b c h w"]
"""Images in [-1, 1], or latents: x_0, x_t, noise z, network outputs."""

Time: TypeAlias = Float[Tensor, "b"]
"""One time (noise level) per sample, positive."""

PerSample: TypeAlias = Float[Tensor, "b"]
"""One number per sample: a distance, a weight, a loss."""

Label: TypeAlias = Int[Tensor, "b"] | None
"""Class indices, or None for an unconditional model."""


NO_CLASS = -1
"""The class index that stands for no class, in networks that take one."""


@runtime_checkable
class Denoise(Protocol):
    """The signature everything depends on: (x_t, t, label) -> estimate of x_0."""

    def __call__(self, x_t: Data, t: Time, label: Label = None) -> Data: ...


@runtime_checkable
class AverageVelocity(Protocol):
    """(x_t, t, label, r) -> u, the mean velocity from r to t: the jump from t to r is x_t - (t - r) u."""

    def __call__(self, x_t: Data, t: Time, label: Label = None, r: Time | None = None) -> Data: ...


@runtime_checkable
class Network(Protocol):
    """A raw network F: (c_in x_t, c_noise, label) -> tensor of the shape of x_t."""

    def __call__(self, x: Data, c_noise: Time, label: Label = None) -> Data: ...


def broadcast_time(per_sample: Shaped[Tensor, "b"], x: Data) -> Shaped[Tensor, "b 1 1 1"]:
    """Reshape one number per sample so that it multiplies the images `x`."""
    if per_sample.shape != x.shape[:1]:
        raise ValueError(
            f"expected one value per sample, shape {tuple(x.shape[:1])}, for images of shape "
            f"{tuple(x.shape)}; got shape {tuple(per_sample.shape)}"
        )
    return per_sample[:, None, None, None]


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """Move x to `device`, without waiting for a GPU."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
