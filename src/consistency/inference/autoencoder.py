"""The autoencoder of a model of latents: an AutoencoderKL of diffusers, an optional extra, known by the hash of its weights."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from consistency.errors import UserError, require
from consistency.inference.card import LatentSpace, ModelCard
from consistency.latents import Scaling, scaling_of
from consistency.runtime.files import fingerprint, path_of
from consistency.tensors import Data

WEIGHTS, SETTINGS = "diffusion_pytorch_model.safetensors", "config.json"
INSIDE = "vae"  # the folder of the autoencoder in that of a pipeline
Sized: TypeAlias = Float[Tensor, "b _c _h _w"]
"""Images, of another size than their latents."""

PIXELS = 1 << 20  # of the images that are encoded or decoded at once: 4 of 512 x 512


def library() -> Any:
    """Import diffusers, which is an optional extra."""
    try:
        import diffusers
    except ImportError as error:
        expected = "the package diffusers, which holds the autoencoders of latents"
        remedy = "install the extra `latents`: pip install -e '.[latents]'"
        raise UserError(expected, error, remedy) from error
    return diffusers


def find(name: str) -> Path:
    """Return the folder of an autoencoder: that folder, the one in a pipeline's, or a download from the Hugging Face hub.

    Raises `UserError` if it is missing.
    """
    path = path_of(name)
    for folder in (path / INSIDE, path):
        if (folder / SETTINGS).is_file() and (folder / WEIGHTS).is_file():
            return folder
    remedy = "say autoencoder=<its folder, or its name on the Hugging Face hub>"
    expected = f"an AutoencoderKL of diffusers, {SETTINGS} and {WEIGHTS}, at autoencoder={name}"
    is_name = not path.exists() and name.count("/") == 1 and name[0] not in "/.~"
    require(is_name, expected, "others" if path.exists() else "no such folder", remedy)
    try:
        return find(str(_downloaded(name)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        got = f"no such folder, and none from the hub ({reason})"
        raise UserError(expected, got, remedy) from error


def _downloaded(name: str) -> Path:
    """Return the folder of a model of the hub in its cache, downloaded if it is missing."""
    library()
    from huggingface_hub import snapshot_download

    files = [f"{folder}{file}" for folder in ("", f"{INSIDE}/") for file in (SETTINGS, WEIGHTS)]
    return Path(snapshot_download(name, allow_patterns=files))


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """Images to latents in a scaling and back, on `device`, a few at a time and in float32.

    network: the AutoencoderKL. sha256: of its file of weights.
    """

    network: Any
    sha256: str
    scaling: Scaling
    device: torch.device

    @property
    def channels(self) -> int:
        """The number of channels of the latents."""
        return int(self.network.config.latent_channels)

    @property
    def factor(self) -> int:
        """The side of an image over that of its latents."""
        return 1 << (len(self.network.config.block_out_channels) - 1)

    @torch.no_grad()
    def moments(self, pixels: Sized) -> tuple[Data, Data]:
        """Return means and standard deviations of the autoencoder's own latents of its pixels."""
        few = max(1, PIXELS // (pixels.shape[2] * pixels.shape[3]))
        laws = [self.network.encode(part).latent_dist for part in pixels.split(few)]
        return torch.cat([law.mean for law in laws]), torch.cat([law.std for law in laws])

    @torch.no_grad()
    def pixels(self, x_0: Data) -> Iterator[Sized]:
        """Decode latents to the autoencoder's pixels, not clamped, a few at a time."""
        few = max(1, PIXELS // (self.factor**2 * x_0.shape[2] * x_0.shape[3]))
        for part in x_0.split(few):
            latents = self.scaling.unscaled(part.to(self.device).float())
            yield self.network.decode(latents).sample

    def images(self, x_0: Data) -> UInt8[Tensor, "b _c _h _w"]:
        """Decode latents to images of 0 ... 255, on the device of x_0."""
        parts = [self.scaling.to_uint8(part).to(x_0.device) for part in self.pixels(x_0)]
        return torch.cat(parts)

    def decoded(self, x_0: Data) -> Sized:
        """Decode latents to images in [-1, 1], not clamped."""
        return self.scaling.to_unit(torch.cat([*self.pixels(x_0)]))

    def encoded(self, images: Sized) -> Data:
        """Encode images in [-1, 1] to the means of their latents."""
        return self.scaling.scaled(self.moments(self.scaling.from_unit(images))[0])


@lru_cache(maxsize=2)
def opened(name: str, sha256: str | None, scaling: str, device: torch.device) -> Autoencoder:
    """Open an autoencoder by folder or name, once a process. Refuse one of another SHA-256, unless that is None."""
    folder = find(name)
    digest = fingerprint(folder / WEIGHTS)
    expected = f"the autoencoder of the latents, weights of sha256 {sha256}"
    remedy = "say autoencoder=<the folder of that one, or its name on the Hugging Face hub>"
    got = f"autoencoder={name}, another one, sha256 {digest}"
    require(sha256 in (None, digest), expected, got, remedy)
    diffusers = library()
    try:
        options = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
        read = diffusers.AutoencoderKL.from_pretrained
        network, keys = read(str(folder), output_loading_info=True, **options)
        if wrong := [*keys["missing_keys"], *keys["unexpected_keys"], *keys["mismatched_keys"]]:
            raise ValueError(f"weights that are missing, unknown or of other shapes: {wrong[:3]}")
    except Exception as error:  # a damaged or foreign file can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        expected = f"an AutoencoderKL of diffusers at {folder}"
        raise UserError(expected, reason, "download or copy it again") from error
    scale = scaling_of(scaling, int(network.config.latent_channels))
    return Autoencoder(network.eval().requires_grad_(False).to(device), digest, scale, device)


def autoencoder_of(space: LatentSpace, device: torch.device | str) -> Autoencoder:
    """Open the autoencoder of a space of latents on a device. Raises `UserError` if it is missing or another."""
    return opened(space.autoencoder, space.sha256, space.scaling, torch.device(device))


def hashed(space: LatentSpace) -> LatentSpace:
    """Return the space with the hash of its autoencoder, which the checkpoint of another program does not record."""
    if space.sha256 is not None:
        return space
    return replace(space, sha256=fingerprint(find(space.autoencoder) / WEIGHTS))


def moved(card: ModelCard, autoencoder: str) -> ModelCard:
    """Return the card with the present place of its autoencoder. Refuse the card of a model of images."""
    expected, remedy = "a model of latents for autoencoder=", "leave it out"
    if card.latents is None:
        raise UserError(expected, "a model of images", remedy)
    return replace(card, latents=replace(card.latents, autoencoder=autoencoder))
