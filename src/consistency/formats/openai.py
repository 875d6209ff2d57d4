"""openai/consistency_models: a flat state dict of its `UNetModel`, saved by torch; also the same as safetensors.

The names are those of our `ADM`, the rows of qkv stand in the same order, and c_noise = 250 ln t. The file holds no
settings, and the keys of a teacher and of a student are the same. All settings that change a shape are read off the
shapes. Two are not in them: the width of an attention head, 64 in every released file, and the size of the images,
which the two released networks are known by.
"""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.errors import require
from consistency.formats.opened import OPENAI, ContentError, Hints, Opened, describe, process
from consistency.formats.pickles import CARD
from consistency.inference.card import ModelCard

FORMAT = "OpenAI"
ADM = "consistency.networks.adm.ADM"
ANCHORS = ("time_embed.0.weight", "input_blocks.0.0.weight")
"""Two names that every network has."""

HEAD_CHANNELS = (64, 32, 16)
"""What the published attention accepts, the released value first."""

RELEASED: dict[tuple[int, tuple[int | float, ...]], tuple[int, float]] = {
    (192, (1, 2, 3, 4)): (64, 1.38237),
    (256, (1, 1, 2, 2, 4, 4)): (256, 4.36556),
}
"""Channels and multipliers of the released networks -> side of their images, published second time of two steps."""


def open_state(weights: dict[str, Tensor], hints: Hints) -> Opened:
    """The network that a flat state dict belongs to."""
    network, notes = settings(weights, hints)
    known = (network["model_channels"], tuple(network["channel_mult"]))
    card = describe(
        role=None,
        network=network,
        process=process(second_time=RELEASED[known][1] if known in RELEASED else 0.821),
        num_classes=network["num_classes"],
        c_noise_scale=OPENAI,
    )
    return Opened(format=FORMAT, weights=weights, card=card, notes=notes)


def settings(weights: dict[str, Tensor], hints: Hints) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments of `ADM` for these weights, and what had to be assumed."""
    if any(name.endswith(".qkv.weight") and value.ndim == 3 for name, value in weights.items()):
        raise ContentError(
            "weights of guided-diffusion, which predict noise in another time and order qkv by heads"
        )
    # Encoder and decoder have equally many blocks, of which a pooling block has no weights.
    length = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("output_blocks."))
    if length > len(weights):
        raise ContentError("weights of a network that is no ADM")
    resampling_layers = sum(
        f"input_blocks.{k}.0.in_layers.0.weight" not in weights for k in range(1, length)
    )
    resampling_blocks = sum(
        any(f"output_blocks.{k}.{i}.in_layers.0.weight" in weights for i in (1, 2))
        for k in range(length)
    )
    levels = 1 + (resampling_layers or resampling_blocks)
    blocks, rest = divmod(length, levels)
    channels = weights["input_blocks.0.0.weight"].shape[1]
    if rest or blocks < 2:
        raise ContentError("weights of another network than those of consistency models")
    if weights["out.2.weight"].shape[0] != channels:
        raise ContentError(
            f"a UNetModel with {weights['out.2.weight'].shape[0]} output channels (out.2.weight) for {channels} of the "
            "image, as learn_sigma=True or a condition makes them, which no consistency model has"
        )
    width = weights["time_embed.0.weight"].shape[1]
    firsts = [f"input_blocks.{1 + k * blocks}" for k in range(levels)]
    tops = [weights[f"{name}.0.out_layers.3.weight"].shape[0] for name in firsts]
    mult = [n // width if n % width == 0 else n / width for n in tops]
    with_attention = [k for k, name in enumerate(firsts) if f"{name}.1.qkv.weight" in weights]
    embedding = weights["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    widths = {value.shape[1] for name, value in weights.items() if name.endswith(".qkv.weight")}

    notes = []
    known = RELEASED.get((width, tuple(mult)))
    size = hints.image_size or (known[0] if known else None)
    if size is None:
        size = 32 << min(with_attention, default=1)
        notes.append(
            f"assumes images of {size} x {size} (the file does not say; image_size= sets it)"
        )
    heads = hints.num_head_channels
    if heads is None and hints.num_heads is None:
        fitting = (n for n in HEAD_CHANNELS if all(c % n == 0 for c in widths))
        heads = next(fitting, None)
        if known is None:
            notes.append(
                f"assumes attention heads of {heads or 'all'} channels (the file does not say; num_head_channels= or "
                "num_heads= sets it)"
            )
    classes = weights.get("label_emb.weight")
    network = {
        "_target_": ADM,
        "image_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "model_channels": width,
        "num_res_blocks": blocks - 1,
        "attention_resolutions": [size >> k for k in with_attention],
        "channel_mult": mult,
        "num_classes": None if classes is None else classes.shape[0],
        "dropout": 0.0,
        "num_heads": hints.num_heads or 1,
        "num_head_channels": heads,
        "use_scale_shift_norm": embedding == 2 * tops[0],
        "resblock_updown": not resampling_layers,
        "conv_resample": not resampling_layers or any(n.endswith(".op.weight") for n in weights),
        "num_groups": 32,
    }
    if hints.num_heads_upsample is not None:
        network["num_heads_upsample"] = hints.num_heads_upsample
    return network, tuple(notes)


def write_openai(path: Path, card: ModelCard, weights: dict[str, Tensor]) -> None:
    """Writes a .pt file that the published code loads: a flat state dict, and our card as a record that torch skips."""
    require_openai(card)
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(weights), part)
    with zipfile.ZipFile(part, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/{CARD}", json.dumps(card.saved(), sort_keys=True))
    part.replace(path)


def require_openai(card: ModelCard) -> None:
    """Refuses a model that `UNetModel` cannot be."""
    network, scalings = card.network, card.preconditioning
    reasons = {
        "a network other than ADM": network["_target_"] != ADM,
        "another time input than c_noise = 250 ln t": scalings.get("c_noise_scale") != OPENAI,
        "groups of another number than 32": network.get("num_groups", 32) != 32,
        "another sigma_data than 0.5": scalings.get("sigma_data") != 0.5,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    require(
        not found,
        "a model that the published UNetModel can be",
        ", ".join(found),
        "convert to=ours, or train with model=adm_imagenet64 or adm_lsun256 (any size)",
    )
    if scalings.get("t_min", 0.002) != 0.002:
        note = f"give the published code sigma_min={scalings['t_min']} for this model"
        print(note, file=sys.stderr)
