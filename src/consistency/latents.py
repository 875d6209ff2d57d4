"""Latents of an autoencoder as networks see them, in the published scalings.

The autoencoder gives every latent a mean and a standard deviation; training draws a new latent at every use,

    x_0 = factor (mean + std n) + shift,    n ~ N(0, 1),

channel by channel. A scaling belongs to one range of the pixels that the autoencoder takes and returns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from consistency.errors import UserError, require
from consistency.tensors import Data


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A map between an autoencoder's latents and those of a network, and the range of the autoencoder's pixels.

    mean, std: of the channels of the autoencoder's latents; one number stands for all channels.
    final_std: standard deviation of x_0, whose mean is 0.
    black: pixel value of black in the autoencoder; white is 1.
    half_up: whether pixels are rounded to the nearest of 256 levels; the released code of EDM2 rounds down.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    final_std: float
    black: float
    half_up: bool

    @property
    def factor(self) -> Tensor:
        """final_std / std of every channel, (channels or 1, 1, 1)."""
        return self.final_std / torch.tensor(self.std)[:, None, None]

    @property
    def shift(self) -> Tensor:
        """-mean final_std / std of every channel, (channels or 1, 1, 1)."""
        return -torch.tensor(self.mean)[:, None, None] * self.factor

    def scaled(self, latents: Data) -> Data:
        """Return the autoencoder's latents as a network sees them."""
        return latents * self.factor.to(latents) + self.shift.to(latents)

    def unscaled(self, x_0: Data) -> Data:
        """Return a network's latents as the autoencoder sees them: the inverse of `scaled`."""
        return (x_0 - self.shift.to(x_0)) / self.factor.to(x_0)

    def from_uint8(self, images: UInt8[Tensor, "b c h w"]) -> Data:
        """Return the pixels that the autoencoder takes of 0 ... 255."""
        return images.float() / 255 * (1 - self.black) + self.black

    def to_uint8(self, pixels: Data) -> UInt8[Tensor, "b c h w"]:
        """Return 0 ... 255 of the autoencoder's pixels, on their device; values beyond black and white are clamped."""
        scale = 255 / (1 - self.black)
        levels = pixels.float() * scale + (0.5 * self.half_up - self.black * scale)
        return levels.clamp(0, 255).to(torch.uint8)

    def from_unit(self, x: Data) -> Data:
        """Return the pixels that the autoencoder takes of images in [-1, 1]."""
        return (x + 1) / 2 * (1 - self.black) + self.black

    def to_unit(self, pixels: Data) -> Data:
        """Return the autoencoder's pixels as images in [-1, 1], not clamped."""
        return (pixels - self.black) / (1 - self.black) * 2 - 1

    @property
    def quantisation(self) -> str:
        """The rounding of `to_uint8` in words, for the protocol of a measure."""
        rounding = "rounded half up" if self.half_up else "rounded down"
        return f"uint8, 255 y {rounding}, y of the autoencoder with black 0 and white 1, clamped"


EDM2 = Scaling(
    mean=(5.81, 3.25, 0.12, -2.15), std=(4.17, 4.62, 3.71, 3.28), final_std=0.5, black=0, half_up=False
)  # fmt: skip
"""Of stabilityai/sd-vae-ft-mse with pixels in [0, 1], to sigma_data = 0.5 [Karras et al. 2024, released code]."""

SIT = Scaling(mean=(0.0,), std=(1.0,), final_std=0.18215, black=-1, half_up=True)
"""The factor of Stable Diffusion with pixels in [-1, 1], in DiT, SiT and MeanFlow: a deviation of about 1
[Rombach et al. 2022; released code].
"""

SCALINGS: Mapping[str, Scaling] = {"edm2": EDM2, "sit": SIT}


def scaling_of(name: str, channels: int) -> Scaling:
    """Return the scaling of that name. Refuse other names, and latents of another number of channels."""
    if name not in SCALINGS:
        raise UserError(f"scaling among {', '.join(SCALINGS)}", name, "choose one")
    scaling = SCALINGS[name]
    wanted = len(scaling.std)
    remedy = "choose scaling=sit, or the autoencoder of the published scaling"
    expected = f"latents of {wanted} channels for scaling={name}"
    require(wanted in (1, channels), expected, f"{channels} channels", remedy)
    return scaling
