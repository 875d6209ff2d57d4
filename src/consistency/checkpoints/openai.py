"""openai/consistency_models: a flat state dict of its `UNetModel`, saved by torch; also the same as safetensors.

Names and rows of qkv are those of our `ADM`, and c_noise = 250 ln t. Settings are read off the shapes. These do not have
the role, the width of an attention head (64 in every released file) and the size of the images.
"""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints import contents, wrapped
from consistency.checkpoints.contents import Hints, StateDict, assumes, card_of, check
from consistency.checkpoints.pickle_reader import CARD, OPENAI
from consistency.errors import require
from consistency.inference.card import ModelCard
from consistency.runtime.files import written_whole

FORMAT = OPENAI
ANCHORS = ("time_embed.0.weight", "input_blocks.0.0.weight")
ADM = "consistency.networks.adm.ADM"
HEAD_CHANNELS = (64, 32, 16)  # that the published attention accepts, the released one first
RELEASED: dict[tuple[int, tuple[int | float, ...]], tuple[int, float]] = {
    (192, (1, 2, 3, 4)): (64, 1.38237),
    (256, (1, 1, 2, 2, 4, 4)): (256, 4.36556),
}
"""Channels and multipliers of the released networks -> side of their images, published second time of two steps."""


def open_state(weights: dict[str, Tensor], hints: Hints) -> wrapped.OpenedState:
    """Return card and assumptions for a flat state dict; the names are ours already."""
    network, notes = settings(weights, hints)
    known = RELEASED.get((network["model_channels"], tuple(network["channel_mult"])))
    card = card_of(network, contents.C_NOISE_OPENAI, second_time=known[1] if known else 0.821)
    return card, notes, lambda state: state


def settings(weights: StateDict, hints: Hints) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of `ADM` for these weights, and the assumptions made."""
    levels, blocks, between = layout(weights)
    channels, out = weights["input_blocks.0.0.weight"].shape[1], weights["out.2.weight"].shape[0]
    counts = f"{out} output channels (out.2.weight) for {channels} of the image"
    check(out == channels, f"a UNetModel with {counts}, as learn_sigma or a condition makes them")
    width = weights["time_embed.0.weight"].shape[1]
    firsts = [f"input_blocks.{1 + k * blocks}" for k in range(levels)]
    tops = [weights[f"{name}.0.out_layers.3.weight"].shape[0] for name in firsts]
    mult = [n // width if n % width == 0 else n / width for n in tops]
    attention = [k for k, name in enumerate(firsts) if f"{name}.1.qkv.weight" in weights]
    known = RELEASED.get((width, tuple(mult)))
    size = hints.image_size or (known[0] if known else 32 << min(attention, default=1))
    notes = []
    if hints.image_size is None and known is None:
        notes.append(assumes(f"images of {size} x {size}", "image_size="))
    heads = hints.num_head_channels
    if heads is None and hints.num_heads is None:
        widths = {v.shape[1] for name, v in weights.items() if name.endswith(".qkv.weight")}
        heads = next((n for n in HEAD_CHANNELS if all(c % n == 0 for c in widths)), None)
        if known is None:
            width_of = f"attention heads of {heads or 'all'} channels"
            notes.append(assumes(width_of, "num_head_channels= or num_heads="))
    classes, upsample = weights.get("label_emb.weight"), hints.num_heads_upsample
    embedding = weights["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    network = {
        **{"_target_": ADM, "image_size": size, "model_channels": width},
        **{"in_channels": channels, "out_channels": channels, "num_res_blocks": blocks - 1},
        "attention_resolutions": [size >> k for k in attention],
        "channel_mult": mult,
        "num_classes": None if classes is None else classes.shape[0],
        **{"num_heads": hints.num_heads or 1, "num_head_channels": heads},
        "use_scale_shift_norm": embedding == 2 * tops[0],
        "resblock_updown": not between,
        "conv_resample": not between or any(n.endswith(".op.weight") for n in weights),
        **{"dropout": 0.0, "num_groups": 32},
    }
    return network | ({} if upsample is None else {"num_heads_upsample": upsample}), notes


def layout(weights: StateDict) -> tuple[int, int, bool]:
    """Return the number of levels, of decoder blocks in each, and whether layers or else blocks change the resolution."""
    guided = any(n.endswith(".qkv.weight") and value.ndim == 3 for n, value in weights.items())
    fault = "predict noise in another time and order qkv by heads"
    check(not guided, f"weights of guided-diffusion, which {fault}")
    # Encoder and decoder have equally many blocks, of which a pooling block has no weights.
    length = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("output_blocks."))
    check(length <= len(weights), "weights of a network that is no ADM")
    layers = sum(f"input_blocks.{k}.0.in_layers.0.weight" not in weights for k in range(1, length))
    inside = (f"output_blocks.{k}.{{}}.in_layers.0.weight" for k in range(length))
    in_blocks = sum(n.format(1) in weights or n.format(2) in weights for n in inside)
    levels = 1 + (layers or in_blocks)
    blocks, rest = divmod(length, levels)
    check(not rest and blocks >= 2, "weights of another network than those of consistency models")
    return levels, blocks, layers > 0


def write_openai(path: Path, card: ModelCard, weights: StateDict) -> None:
    """Write a .pt file that the published code loads: a flat state dict, and our card as a record that torch skips."""
    require_openai(card)
    with written_whole(path) as file:
        torch.save(dict(weights), file)
        with zipfile.ZipFile(file, "a") as archive:
            root = archive.namelist()[0].split("/")[0]
            archive.writestr(f"{root}/{CARD}", json.dumps(card.saved(), sort_keys=True))


def require_openai(card: ModelCard) -> None:
    """Refuse a model that `UNetModel` cannot be."""
    network, scalings = card.network, card.preconditioning
    scale = scalings.get("c_noise_scale")
    reasons = {
        "a network other than ADM": network["_target_"] != ADM,
        "another time input than c_noise = 250 ln t": scale != contents.C_NOISE_OPENAI,
        "groups of another number than 32": network.get("num_groups", 32) != 32,
        "another sigma_data than 0.5": scalings.get("sigma_data") != 0.5,
    }
    got = ", ".join(reason for reason, holds in reasons.items() if holds)
    remedy = "convert to=ours, or train with model=adm_imagenet64 or adm_lsun256 (any size)"
    require(not got, "a model that the published UNetModel can be", got, remedy)
    if scalings.get("t_min", 0.002) != 0.002:
        note = f"give the published code sigma_min={scalings['t_min']} for this model"
        print(note, file=sys.stderr)
