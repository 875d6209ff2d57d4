"""Tiny autoencoders of diffusers with random weights."""

from pathlib import Path

import torch


def write_autoencoder(
    folder: Path, *, seed: int = 0, latent_channels: int = 4, halvings: int = 1
) -> Path:
    """Write an AutoencoderKL that halves the sides of images, once or several times."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
            up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
            block_out_channels=(8,) * (halvings + 1),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=16,
        )
    network.save_pretrained(str(folder))
    return folder
