"""A tiny network, its card, and one small checkpoint of every format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foreign
from consistency.checkpoints import load as checkpoint
from consistency.checkpoints import nvlabs, openai, ours
from consistency.checkpoints.diffusers import write_diffusers
from consistency.inference.card import ModelCard
from consistency.runtime.files import checksum_path
from golden_harness import FOLDER, read_json, read_safetensors


def weights_of(folder: str, name: str) -> dict[str, Tensor]:
    return {
        k: v.float() for k, v in read_safetensors(FOLDER / folder / f"{name}.safetensors").items()
    }


TINY_ADM = {
    "_target_": openai.ADM,
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "channel_mult": [1],
    "num_classes": None,
    "dropout": 0.0,
    "num_heads": 1,
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "conv_resample": True,
    "num_groups": 32,
}


TINY_SONG = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 0,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def randomised(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return random weights for every parameter, also those that start at zero; resampling filters stay."""
    torch.manual_seed(0)
    state = network.state_dict()
    for name, value in state.items():
        if not name.endswith("resample_filter"):
            state[name] = torch.randn_like(value) * (
                0.2 if value.ndim < 2 else value[0].numel() ** -0.5
            )
    return state


def tiny_adm() -> dict[str, Tensor]:
    return randomised(checkpoint.build(TINY_ADM, checkpoint.NETWORKS, torch.nn.Module))


def tiny_card(**changes: Any) -> dict[str, Any]:
    scalings = {"_target_": "consistency.preconditioning.Boundary", "sigma_data": 0.5}
    process = {"sigma_data": 0.5, "t_min": 0.002, "t_max": 80.0, "rho": 7.0, "times": [80.0, 1.0]}
    card = {"role": "consistency", "network": TINY_ADM, "process": process, "num_classes": None}
    card |= {"preconditioning": scalings | {"t_min": 0.002, "c_noise_scale": 250.0}}
    return card | {"image": {"channels": 3, "size": 8}} | changes


def tiny(**changes: Any) -> ModelCard:
    return ModelCard.parse(tiny_card(**changes), "a test")


def write_files(folder: Path) -> dict[str, Path]:
    """Write one small valid checkpoint of every format; return the paths by format."""
    weights, card = tiny_adm(), tiny()
    song = nvlabs.settings("SongUNet", TINY_SONG | {"in_channels": 3, "out_channels": 3})
    state = randomised(checkpoint.build(song, checkpoint.NETWORKS, torch.nn.Module))
    prefixed = {f"model.{name}": value for name, value in state.items()}
    files = {
        "ours": folder / "last.ckpt",
        "sealed": folder / "model.safetensors",
        "openai_card": folder / "own.pt",
        "diffusers": folder / "pipeline",
        "unet": folder / "pipeline_of_others" / "unet",
    }
    ours.write({"card": card.saved(), "weights": weights}, files["ours"])
    checksum_path(files["ours"]).unlink()
    ours.write_sealed(files["sealed"], card, weights)
    openai.write_openai(files["openai_card"], card, weights)
    write_diffusers(files["diffusers"], card, weights)
    write_diffusers(files["unet"].parent, card, weights)
    remove_card(files["unet"] / "diffusion_pytorch_model.safetensors")
    files["openai"] = foreign.write_openai(folder / "ema.pt", weights)
    files["nvlabs"] = foreign.write_nvlabs(folder / "snapshot.pkl", TINY_SONG, prefixed)
    files["state"] = foreign.write_nvlabs_state(folder / "state.pt", TINY_SONG, prefixed)
    files["jcm"] = foreign.write_flax(folder / "checkpoint_80", weights_of("jcm", "ncsnpp"))
    return files


def remove_card(path: Path) -> None:
    """Rewrite weights as diffusers does, without our card and checksum."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, metadata={"format": "pt"})


WITH_CHECKSUM = ("ours", "sealed", "openai_card", "openai", "state", "diffusers")
"""Formats that detect every change of their weights, by a zip's CRC or by our own checksum."""


WITH_ROLE = ("ours", "sealed", "openai_card", "nvlabs", "state", "diffusers")
"""Formats that record the role of a model."""


def write_card(path: Path, **changes: Any) -> Path:
    """Write a checkpoint of ours with a changed card and valid weights."""
    ours.write({"card": tiny_card(**changes), "weights": tiny_adm()}, path)
    return path


def write_weights(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    weights = tiny_adm()
    change(weights)
    return foreign.write_openai(path, weights)


def write_config(folder: Path, **changes: Any) -> Path:
    """Write a UNet of diffusers with a changed configuration."""
    write_diffusers(folder, tiny(role="teacher"), tiny_adm())
    remove_card(folder / "diffusion_pytorch_model.safetensors")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
