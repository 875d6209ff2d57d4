"""Pipelines of diffusers: the same images from the real pipeline and from ours."""

from pathlib import Path
from typing import Any

import pytest
import torch

import consistency
from consistency.checkpoints import load as checkpoint
from consistency.checkpoints.diffusers import write_diffusers
from consistency.errors import UserError
from consistency.inference.card import ModelCard
from real_pipelines import same_images
from tiny_models import TINY_ADM, randomised, tiny_card

REAL = {
    "published test network": {
        "sample_size": 16,
        "layers_per_block": 2,
        "num_class_embeds": 10,
        "block_out_channels": (32, 64),
        "attention_head_dim": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "upsample_type": "resnet",
        "downsample_type": "resnet",
    },
    "convolutions between resolutions": {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "lsun kind with one head": {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 32, 64),
        "attention_head_dim": None,
        "norm_num_groups": 16,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "upsample_type": "resnet",
        "downsample_type": "resnet",
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REAL)
def test_our_model_and_the_real_pipeline_draw_the_same_images(name: str, tmp_path: Path) -> None:
    """Our sampler reads their folder, and their pipeline reads ours, with the same images."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(**REAL[name])
    unet.load_state_dict(randomised(unet))
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)
    pipe = diffusers.ConsistencyModelPipeline(unet.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "theirs")
    loaded = consistency.load(tmp_path / "theirs")
    process = loaded.card.process  # the second of two steps is the middle of their 40 points
    assert process.times == (80.0, pytest.approx(float(process.grid.points(40)[20])))
    label = [3, 7] if "num_class_embeds" in REAL[name] else None
    same_images(pipe, loaded, label)

    state = loaded.denoiser.network.state_dict()
    write_diffusers(tmp_path / "ours", loaded.card, state)
    back = diffusers.ConsistencyModelPipeline.from_pretrained(
        tmp_path / "ours", use_safetensors=True
    )
    back.set_progress_bar_config(disable=True)
    found, expected = back.unet.state_dict(), unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    same_images(back, consistency.load(tmp_path / "ours"), label)
    assert (back.unet.config.attention_head_dim, back.unet.config.sample_size) == (
        unet.config.attention_head_dim,
        16,
    )

    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)  # diffusers' older format
    alone = consistency.load(tmp_path / "unet", "teacher").denoiser.network.state_dict()
    assert all(torch.equal(alone[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"c_noise_scale": None}, "c_noise_scale=250"),
        ({"num_heads": 2, "num_head_channels": None}, "num_head_channels=32"),
        ({"channel_mult": [2, 2]}, "channel_mult"),
        ({"resblock_updown": False, "conv_resample": False}, "resblock_updown"),
    ],
)
def test_a_model_without_a_diffusers_form_is_refused(
    change: dict[str, Any], hint: str, tmp_path: Path
) -> None:
    node = TINY_ADM | {"channel_mult": [1, 2], "attention_resolutions": [8]}
    card = tiny_card(network=node | {k: v for k, v in change.items() if k in node})
    card["preconditioning"] = card["preconditioning"] | {
        key: value for key, value in change.items() if key == "c_noise_scale"
    }
    network = checkpoint.build(card["network"], checkpoint.NETWORKS, torch.nn.Module)
    with pytest.raises(UserError, match=hint):
        write_diffusers(tmp_path / "folder", ModelCard.parse(card, ""), network.state_dict())
    assert not (tmp_path / "folder").exists()
