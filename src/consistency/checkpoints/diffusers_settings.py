"""Settings of a `UNet2DModel` of diffusers -> those of our `ADM`, from its configuration or from bare weights."""

import re
from typing import Any

from consistency.checkpoints.contents import ContentError, Hints, StateDict, assumes
from consistency.checkpoints.diffusers_names import FIXED, UNET, block_type
from consistency.checkpoints.openai import ADM
from consistency.checkpoints.pickle_reader import brief

DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "time_embedding_dim": None,
    "resnet_time_scale_shift": "default",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "num_class_embeds": None,
    "dropout": 0.0,
}
"""Defaults of the settings that are not in `FIXED`."""

COUNTS = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
CHOICES = {
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
}
ABSENT = dict.fromkeys(
    (
        *("cross_attention_dim", "encoder_hid_dim", "addition_embed_type", "time_cond_proj_dim"),
        *("projection_class_embeddings_input_dim", "prediction_type"),
    )
)
"""Settings of other networks of diffusers, which none that we know has."""


def settings(config: dict[str, Any], hints: Hints) -> dict[str, Any]:
    """Return the arguments of `ADM` from those of `UNet2DModel`."""
    theirs = known_settings(config)
    widths, size = theirs["block_out_channels"], theirs["sample_size"]
    sides = set(size) if isinstance(size, list) else {size}
    side = hints.image_size or (sides.pop() if len(sides) == 1 else None)
    if type(side) is not int or side < 1:
        raise unlike(theirs, "sample_size", "one side of the images (image_size= sets it)")
    attention = ["Attn" in kind for kind in theirs["down_block_types"]]
    return {
        "_target_": ADM,
        "image_size": side,
        "in_channels": theirs["in_channels"],
        "out_channels": theirs["out_channels"],
        "model_channels": widths[0],
        "num_res_blocks": theirs["layers_per_block"],
        "attention_resolutions": [side >> k for k, has in enumerate(attention) if has],
        "channel_mult": [n // widths[0] if n % widths[0] == 0 else n / widths[0] for n in widths],
        "num_classes": theirs["num_class_embeds"],
        "dropout": float(theirs["dropout"]),
        "num_heads": 1,
        "num_head_channels": theirs["attention_head_dim"],
        "use_scale_shift_norm": theirs["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": in_blocks(theirs),
        "conv_resample": True,
        "num_groups": theirs["norm_num_groups"],
    }


def known_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a UNet with their defaults. Refuse, by name and value, those that no ADM has."""
    if config.get("_class_name") != UNET:
        kind = brief(config.get("_class_name"))
        raise ContentError(f"a diffusers model of class {kind}, not {UNET}")
    theirs = DEFAULTS | config

    def expect(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise unlike(theirs, name, expected)

    for name, value in (FIXED | ABSENT).items():
        expect(name, theirs.get(name, value) == value, f"{value}, as an ADM has")
    for name in COUNTS:
        count = theirs[name]
        expect(name, type(count) is int and 1 <= count <= 1 << 20, "a whole number")
    for name in ("num_class_embeds", "attention_head_dim"):
        count = theirs[name]
        expect(name, count is None or (type(count) is int and count > 0), "a whole number or null")
    for name, choices in CHOICES.items():
        expect(name, theirs[name] in choices, " or ".join(choices))
    channels, widths = theirs["in_channels"], theirs["block_out_channels"]
    same = theirs["out_channels"] == channels
    expect("out_channels", same, f"in_channels={channels}, as a consistency model has")
    numbers = isinstance(widths, list) and all(type(n) is int and n > 0 for n in widths)
    expect("block_out_channels", numbers, "a list of whole numbers")
    groups, in_attention = theirs["norm_num_groups"], theirs["attn_norm_num_groups"]
    default = in_attention is None and theirs["resnet_time_scale_shift"] == "default"
    expect("attn_norm_num_groups", default or in_attention == groups, f"norm_num_groups={groups}")
    embedding = theirs["time_embedding_dim"] in (None, 4 * widths[0])
    expect("time_embedding_dim", embedding, f"4 x {widths[0]}")
    for name in ("down_block_types", "up_block_types"):
        listed = isinstance(theirs[name], list) and len(theirs[name]) == len(widths)
        expect(name, listed, f"{len(widths)} blocks, as block_out_channels has")
    return theirs


def in_blocks(theirs: dict[str, Any]) -> bool:
    """Return whether residual blocks change the resolution, else convolutions. Refuse unknown and mixed blocks."""
    halves = []
    for way in ("down", "up"):
        name, setting = f"{way}_block_types", theirs[f"{way}sample_type"]
        kinds = {
            block_type(way.title(), False, False): "conv",
            block_type(way.title(), False, True): "resnet",
            block_type(way.title(), True, False): setting,
        }
        for kind in theirs[name]:
            if not isinstance(kind, str) or kind not in kinds:
                raise ContentError(f"a {UNET} with a block of kind {brief(kind)} in {name}")
        halves.append([(kind.startswith("Attn"), kinds[kind]) for kind in theirs[name]])
    down, up = halves
    if [attention for attention, _ in down] != [attention for attention, _ in up[::-1]]:
        raise ContentError(f"a {UNET} whose halves do not mirror each other (up_block_types)")
    changes = {change for _, change in (*down[:-1], *up[:-1])}  # the last block changes nothing
    if len(changes) > 1:
        raise ContentError(
            f"a {UNET} that changes resolution in several ways (down_block_types, up_block_types)"
        )
    return changes != {"conv"}


def unlike(config: dict[str, Any], name: str, expected: str) -> ContentError:
    """Return the refusal of a setting, by name and value."""
    value = config.get(name)
    short = isinstance(value, int | float | str | None) or (
        isinstance(value, list) and len(str(value)) < 200
    )
    shown = value if short else brief(value)
    return ContentError(f"a {UNET} with {name}={shown}, where {expected} is known")


def settings_of(theirs: StateDict, hints: Hints) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of `UNet2DModel` for these weights, and the assumptions made."""
    numbers = {int(name.split(".")[1]) for name in theirs if re.match(r"down_blocks\.\d+\.", name)}
    blocks = [f"down_blocks.{k}" for k in range(len(numbers))]
    firsts = [f"{block}.resnets.0.conv1.weight" for block in blocks]
    if not firsts or not all(name in theirs for name in firsts):
        raise ContentError(f"weights of a model of diffusers other than {UNET}")
    widths = [theirs[name].shape[0] for name in firsts]
    attention = [f"{block}.attentions.0.to_q.weight" in theirs for block in blocks]
    resnet = any(f"{block}.downsamplers.0.conv1.weight" in theirs for block in blocks)
    shift = theirs["down_blocks.0.resnets.0.time_emb_proj.weight"].shape[0] == 2 * widths[0]
    classes = theirs.get("class_embedding.weight")
    size, head = hints.image_size, hints.num_head_channels
    notes = []
    if size is None:
        size = 32 << next((k for k, has in enumerate(attention) if has), 1)
        notes.append(assumes(f"images of {size} x {size}", "image_size="))
    if head is None:
        head = DEFAULTS["attention_head_dim"]
        notes.append(assumes(f"attention heads of {head} channels", "num_head_channels="))
    layer = re.compile(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight")
    config = {
        "_class_name": UNET,
        "sample_size": size,
        "in_channels": theirs["conv_in.weight"].shape[1],
        "out_channels": theirs["conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": sum(bool(layer.fullmatch(name)) for name in theirs),
        "attention_head_dim": head,
        "down_block_types": [block_type("Down", has, resnet) for has in attention],
        "up_block_types": [block_type("Up", has, resnet) for has in attention[::-1]],
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
        "attn_norm_num_groups": DEFAULTS["norm_num_groups"],
        "num_class_embeds": None if classes is None else classes.shape[0],
    }
    return config, notes
