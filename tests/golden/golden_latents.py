"""Comparisons of the latents of images with those of EDM2: constants, what networks see, and what is decoded."""

import torch

from consistency.latents import EDM2, SIT, Scaling
from consistency.pixels import quantised, to_unit
from golden_harness import Archive, Tolerance, read_json, require_known

ROUNDED = Tolerance(of_largest=1e-6)
EXACT = Tolerance()
CONSTANTS = {"vae_name", "raw_mean", "raw_std", "final_mean", "final_std", "input_range", "raw_channels"}  # fmt: skip


def compare_latents(archive: Archive) -> None:
    """The encoder of latents, and that of pixels."""
    constants = read_json(archive.path.with_suffix(".json"))["vae"]
    require_known(constants, CONSTANTS, "vae")
    if constants["final_mean"] != 0 or not constants["input_range"].startswith("[0,1]"):
        raise AssertionError("vae: a mean or a range of pixels that our scaling has not")
    own = Scaling(
        mean=tuple(constants["raw_mean"]), std=tuple(constants["raw_std"]),
        final_std=constants["final_std"], black=0, half_up=False,
    )  # fmt: skip
    if constants["vae_name"] == "stabilityai/sd-vae-ft-mse" and own != EDM2:
        raise AssertionError(f"vae: expected {own}, got {EDM2}")
    archive.compare("vae.scale", own.factor[:, 0, 0], ROUNDED)
    archive.compare("vae.bias", own.shift[:, 0, 0], ROUNDED)
    mean, std = archive.tensor("vae.raw").chunk(2, dim=1)
    archive.compare("vae.final", own.scaled(mean + std * archive.tensor("vae.noise")), ROUNDED)
    archive.compare("vae.to_decoder", own.unscaled(archive.tensor("vae.final")), ROUNDED)
    archive.compare("vae.pixels_stub", own.to_uint8(archive.tensor("vae.decoded_stub")), EXACT)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    archive.compare("rgb.latents_of_0_255", to_unit(levels), ROUNDED)
    x = archive.tensor("rgb.x")
    archive.compare("rgb.decoded", quantised(x), Tolerance(absolute=1))  # which rounds half to even
    archive.compare("rgb.decoded", SIT.to_uint8(x), EXACT)
