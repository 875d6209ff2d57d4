"""Writing of folders of diffusers, without the package: a pipeline for a consistency model, a UNet for a teacher."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from consistency.checkpoints.contents import C_NOISE_OPENAI, StateDict
from consistency.checkpoints.diffusers_names import (
    FIXED,
    PIPELINE,
    SCHEDULER,
    SCHEDULER_FILE,
    TIME_EMBEDDING,
    UNET,
    WEIGHTS,
    block_type,
    their_weights,
)
from consistency.checkpoints.diffusers_time_embedding import LAYERS, rewritten, width
from consistency.checkpoints.openai import ADM
from consistency.checkpoints.safetensors import write_sealed
from consistency.errors import require
from consistency.inference.card import ModelCard
from consistency.runtime.files import write_text

POINTS = 40
"""Points of our pipelines' grids, as in the released distilled models."""

VERSION = "0.35.0"
"""The version that our folders are written for; it is only a note in them."""


def write_diffusers(folder: Path, card: ModelCard, weights: StateDict) -> None:
    """Write a pipeline for a consistency model, a UNet alone for a teacher, which has no pipeline in diffusers."""
    config = unet_settings(card, weights)
    student = card.role == "consistency"
    unet = folder / "unet" if student else folder
    if needs_rewriting(card):
        write_sealed(unet / TIME_EMBEDDING, card, {name: weights[name] for name in LAYERS})
        weights = rewritten(weights, points(card), card.preconditioning["c_noise_scale"])
    if student:
        index: dict[str, Any] = {"_class_name": PIPELINE, "_diffusers_version": VERSION}
        index |= {"scheduler": ["diffusers", SCHEDULER], "unet": ["diffusers", UNET]}
        _write_json(folder / "model_index.json", index)
        _write_json(folder / "scheduler" / SCHEDULER_FILE, scheduler_settings(card))
    _write_json(unet / "config.json", config)
    write_sealed(unet / f"{WEIGHTS}.safetensors", card, their_weights(card.network, weights))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def needs_rewriting(card: ModelCard) -> bool:
    """Return whether the network has another time input than 250 ln t, which diffusers computes."""
    return card.preconditioning["c_noise_scale"] != C_NOISE_OPENAI


def points(card: ModelCard) -> Tensor:
    """Return the noise levels at which the pipeline evaluates its network, in float64."""
    return replace(card.process.grid, t_min=card.preconditioning["t_min"]).points(POINTS)


def scheduler_settings(card: ModelCard) -> dict[str, Any]:
    """Return the settings of the pipeline's scheduler."""
    return {
        "_class_name": SCHEDULER,
        "_diffusers_version": VERSION,
        "num_train_timesteps": POINTS,
        "sigma_min": card.preconditioning["t_min"],
        "sigma_max": card.process.t_max,
        "sigma_data": card.preconditioning["sigma_data"],
        "rho": card.process.rho,
        "s_noise": 1.0,
        "clip_denoised": True,
    }


def unet_settings(card: ModelCard, weights: StateDict) -> dict[str, Any]:
    """Return the settings of `UNet2DModel` for our model. Refuse one that it cannot be."""
    require_expressible(card)
    network, size = card.network, card.image_size
    in_blocks, shift = network["resblock_updown"], network["use_scale_shift_norm"]
    widths = [int(m * network["model_channels"]) for m in network["channel_mult"]]
    attention = [size >> k in network["attention_resolutions"] for k in range(len(widths))]
    groups = network.get("num_groups", 32)
    return {
        "_class_name": UNET,
        "_diffusers_version": VERSION,
        **FIXED,
        "time_embedding_dim": width(widths[0], POINTS) if needs_rewriting(card) else None,
        "sample_size": size,
        "in_channels": network["in_channels"],
        "out_channels": network.get("out_channels") or network["in_channels"],
        "block_out_channels": widths,
        "layers_per_block": network["num_res_blocks"],
        "attention_head_dim": head_channels(network, weights),
        "down_block_types": [block_type("Down", has, in_blocks) for has in attention],
        "up_block_types": [block_type("Up", has, in_blocks) for has in attention[::-1]],
        "downsample_type": "resnet" if in_blocks else "conv",
        "upsample_type": "resnet" if in_blocks else "conv",
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if shift else None,
        "num_class_embeds": network.get("num_classes"),
        "dropout": float(network.get("dropout", 0.0)),
    }


def require_expressible(card: ModelCard) -> None:
    """Refuse a model that diffusers cannot express."""
    network, scalings = card.network, card.preconditioning
    _require(network["_target_"] == ADM, "a network other than ADM", "it is one of its own")
    scale, student = scalings.get("c_noise_scale"), card.role == "consistency"
    _require(
        scale == C_NOISE_OPENAI or (student and scale is not None),
        f"a time input of {scale or 'another kind than'} ln t, where a UNet alone gets 250 ln t",
        "train it with model.c_noise_scale=250",
    )
    _require(
        not student or "t_min" in scalings,
        "a consistency model without the boundary scalings, which the pipeline always applies",
        "train it with mode=ct, ict, ect or cd",
    )
    mult = network["channel_mult"]
    _require(mult[0] == 1, f"channel_mult={mult}", "begin channel_mult with 1")
    _require(
        network["resblock_updown"] or network.get("conv_resample", True),
        "pooling layers between the resolutions",
        "train it with model.network.resblock_updown=true",
    )


def head_channels(network: dict[str, Any], weights: StateDict) -> int | None:
    """Return the width of an attention head, of which diffusers has one; None is one head of all channels."""
    if network.get("num_head_channels") is not None:
        return int(network["num_head_channels"])
    heads, upsample = network.get("num_heads", 1), network.get("num_heads_upsample")
    remedy = "train it with model.network.num_head_channels=32"
    _require(
        upsample in (None, -1, heads),
        f"{upsample} attention heads on the way up for {heads} on the way down",
        remedy,
    )
    if heads == 1:
        return None
    widths = {v.shape[1] // heads for name, v in weights.items() if name.endswith(".qkv.weight")}
    listed = " and ".join(map(str, sorted(widths)))
    got = f"attention heads of {listed} channels, where diffusers has one width"
    _require(len(widths) == 1, got, remedy)
    return widths.pop()


def _require(holds: bool, got: str, remedy: str) -> None:
    require(holds, f"a model that {UNET} of diffusers can be", got, f"convert to=ours, or {remedy}")
