"""The network of diffusers, `UNet2DModel`, and our `ADM`: names and settings, in both directions.

They are one network under the settings `FIXED`. q, k and v are three linear maps in diffusers, in that order the thirds of
our qkv.
"""

from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints import diffusers_time_embedding as time_embedding
from consistency.checkpoints.contents import C_NOISE_OPENAI, Hints, StateDict, brief, check
from consistency.checkpoints.openai import ADM
from consistency.errors import require
from consistency.inference.card import ModelCard

UNET = "UNet2DModel"
VERSION = "0.35.0"  # of diffusers, a mere note in the folders that we write

FIXED: dict[str, Any] = {
    **{"center_input_sample": False, "time_embedding_type": "positional", "freq_shift": 0},
    **{"flip_sin_to_cos": True, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1},
    **{"downsample_padding": 1, "act_fn": "silu", "norm_eps": 1e-5, "add_attention": True},
    "class_embed_type": None,
}
"""Settings of `UNet2DModel` with one value in an ADM, which is also their default."""

ABSENT = dict.fromkeys(
    (
        *("cross_attention_dim", "encoder_hid_dim", "addition_embed_type", "time_cond_proj_dim"),
        *("projection_class_embeddings_input_dim", "prediction_type"),
    )
)
"""Settings of other networks of diffusers, which none that we know has."""

SAME = {
    **{"in_channels": "in_channels", "out_channels": "out_channels", "dropout": "dropout"},
    **{"layers_per_block": "num_res_blocks", "num_class_embeds": "num_classes"},
    **{"attention_head_dim": "num_head_channels", "norm_num_groups": "num_groups"},
}
"""Settings with the same values in an ADM, and their names there."""

OPTIONAL = {
    **{"out_channels": None, "num_classes": None, "dropout": 0.0, "num_groups": 32},
    **{"num_heads": 1, "num_heads_upsample": None, "conv_resample": True},
}
"""Arguments of `ADM` that a card may lack, and their defaults."""

OUTSIDE = {
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"class_embedding": "label_emb", "conv_in": "input_blocks.0.0"},
    **{"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"},
    **{"mid_block.resnets.1": "middle_block.2", "conv_norm_out": "out.0", "conv_out": "out.2"},
}
"""Modules outside the levels, and ours."""

PARTS = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
    **{"group_norm": "norm", "to_q": "qkv", "to_out.0": "proj_out"},
}
"""Parts of blocks, and ours; to_k and to_v are in our qkv, too."""


def block_type(way: str, attention: bool, inside: bool) -> str:
    """Return the class of a block; way: Down or Up; inside: residual blocks change the resolution."""
    if attention:
        return f"Attn{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if inside else f"{way}Block2D"


def block_settings(attention: list[bool], inside: bool, shift: bool, groups: int) -> dict[str, Any]:
    """Return the settings of the blocks, given which levels have attention."""
    return {
        "down_block_types": [block_type("Down", has, inside) for has in attention],
        "up_block_types": [block_type("Up", has, inside) for has in attention[::-1]],
        "downsample_type": "resnet" if inside else "conv",
        "upsample_type": "resnet" if inside else "conv",
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if shift else None,
    }


DEFAULTS: dict[str, Any] = {
    **FIXED,
    **ABSENT,
    **block_settings([False, True, True, True], False, False, 32),
    **{"sample_size": None, "in_channels": 3, "out_channels": 3, "num_class_embeds": None},
    **{"block_out_channels": [224, 448, 672, 896], "layers_per_block": 2, "dropout": 0.0},
    **{"attention_head_dim": 8, "time_embedding_dim": None},
}
COUNTS = {
    **dict.fromkeys(("in_channels", "layers_per_block", "norm_num_groups"), "a whole number"),
    **dict.fromkeys(("num_class_embeds", "attention_head_dim"), "a whole number or null"),
}
CHOICES = {
    "resnet_time_scale_shift": ("default", "scale_shift"),
    **dict.fromkeys(("downsample_type", "upsample_type"), ("conv", "resnet")),
}


def our_weights(theirs: StateDict) -> StateDict:
    """Return the weights of a `UNet2DModel` under the names of `ADM`. Linear maps of attention become 1x1."""
    needed = (f"{name}.{kind}" for name in ("conv_in", "conv_out") for kind in ("weight", "bias"))
    missing = [name for name in needed if name not in theirs]
    check(not missing, f"a {UNET} without {', '.join(missing)}")
    levels, blocks = numbers(theirs, "down_blocks."), numbers(theirs, "down_blocks.0.resnets.")
    check(levels * blocks <= len(theirs), f"weights of another network than {UNET}")
    attention = [f"up_blocks.{k}.attentions.0.to_q.weight" in theirs for k in range(levels)]
    ours, modules = {}, names(blocks, attention)
    for name, value in theirs.items():
        query = name.replace(".to_k.", ".to_q.").replace(".to_v.", ".to_q.")
        if query != name and query in theirs:
            continue  # joined with the query
        if ".to_q." in name:
            value = torch.cat([theirs[name.replace("to_q", f"to_{letter}")] for letter in "qkv"])
        linear = ".attentions." in name and value.ndim == 2
        ours[renamed(name, modules, PARTS)] = value[:, :, None, None] if linear else value
    return ours


def their_weights(network: dict[str, Any], ours: StateDict) -> dict[str, Tensor]:
    """Return the inverse of `our_weights`."""
    levels, blocks = len(network["channel_mult"]), network["num_res_blocks"]
    lowest = [f"output_blocks.{k * (blocks + 1)}.1.qkv.weight" in ours for k in range(levels)]
    modules = {our: their for their, our in names(blocks, lowest).items()}
    parts = {our: their for their, our in PARTS.items()}
    theirs: dict[str, Tensor] = {}
    for name, value in ours.items():
        new = renamed(name, modules, parts)
        flat = value[:, :, 0, 0] if ".attentions." in new and value.ndim == 4 else value
        targets = [new.replace("to_q", f"to_{c}") for c in ("qkv" if ".to_q." in new else "q")]
        theirs |= dict(zip(targets, flat.chunk(len(targets)), strict=True))
    return theirs


def numbers(weights: StateDict, prefix: str) -> int:
    """Return how many numbers follow the prefix in names."""
    return len({n.removeprefix(prefix).split(".")[0] for n in weights if n.startswith(prefix)})


def names(blocks: int, attention: list[bool]) -> dict[str, str]:
    """Return the modules that a `UNet2DModel` can have, and ours; of two names for one of ours the last is right.

    blocks: residual blocks of a level of the encoder; attention: whether levels have it, the lowest first.
    """
    modules = dict(OUTSIDE)
    for level, has_attention in enumerate(attention):
        for number in range(blocks + 1):
            index = level * (blocks + 1) + number
            down, up = f"input_blocks.{index + 1}", f"output_blocks.{index}"
            for way, ours in (("down", down), ("up", up)):
                modules[f"{way}_blocks.{level}.resnets.{number}"] = f"{ours}.0"
                modules[f"{way}_blocks.{level}.attentions.{number}"] = f"{ours}.1"
        modules[f"down_blocks.{level}.downsamplers.0"] = f"{down}.0"
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"{down}.0.op"
        modules[f"up_blocks.{level}.upsamplers.0"] = f"{up}.{1 + has_attention}"
    return modules


def renamed(name: str, modules: dict[str, str], parts: dict[str, str]) -> str:
    """Return the name of a parameter with its module and its part of a block exchanged; others as they are."""
    module = name
    while module not in modules:
        if not module:
            return name
        module = module.rpartition(".")[0]
    part, _, kind = name.removeprefix(f"{module}.").rpartition(".")
    return ".".join(filter(None, (modules[module], parts.get(part, part), kind)))


def settings(config: dict[str, Any], hints: Hints) -> dict[str, Any]:
    """Return the arguments of `ADM` from those of `UNet2DModel`."""
    theirs = known_settings(config)
    resblock_updown = in_blocks(theirs)
    widths, size = theirs["block_out_channels"], theirs["sample_size"]
    square = isinstance(size, list) and len({*size}) == 1
    side: Any = size[0] if square else size
    if type(side) is not int and hints.image_size is not None:
        side = hints.image_size
    known = type(side) is int and side >= 1
    expect(theirs, "sample_size", known, "one side of the images (image_size= sets it)")
    attention = ["Attn" in kind for kind in theirs["down_block_types"]]
    return {
        "_target_": ADM,
        "image_size": side,
        **{ours: theirs[name] for name, ours in SAME.items()},
        "model_channels": widths[0],
        "attention_resolutions": [side >> k for k, has in enumerate(attention) if has],
        "channel_mult": [n // widths[0] if n % widths[0] == 0 else n / widths[0] for n in widths],
        "dropout": float(theirs["dropout"]),
        "num_heads": 1,
        "use_scale_shift_norm": theirs["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": resblock_updown,
        "conv_resample": True,
    }


def known_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a UNet with their defaults. Refuse, by name and value, those that no ADM has."""
    kind = config.get("_class_name")
    check(kind == UNET, f"a diffusers model of class {brief(kind)}, not {UNET}")
    theirs = DEFAULTS | config
    for name, value in (FIXED | ABSENT).items():
        expect(theirs, name, theirs[name] == value, f"{value}, as an ADM has")
    for name, kinds in COUNTS.items():
        count = theirs[name]
        whole = type(count) is int and 1 <= count <= 1 << 20
        expect(theirs, name, whole or (count is None and "null" in kinds), kinds)
    for name, choices in CHOICES.items():
        expect(theirs, name, theirs[name] in choices, " or ".join(choices))
    channels, widths = theirs["in_channels"], theirs["block_out_channels"]
    same = theirs["out_channels"] == channels
    expect(theirs, "out_channels", same, f"in_channels={channels}, as a consistency model has")
    listed = isinstance(widths, list) and all(type(n) is int and n > 0 for n in widths)
    expect(theirs, "block_out_channels", listed, "a list of whole numbers")
    groups, name = theirs["norm_num_groups"], "attn_norm_num_groups"
    default = theirs[name] is None and theirs["resnet_time_scale_shift"] == "default"
    expect(theirs, name, default or theirs[name] == groups, f"norm_num_groups={groups}")
    embedding = theirs["time_embedding_dim"] in (None, 4 * widths[0])
    expect(theirs, "time_embedding_dim", embedding, f"4 x {widths[0]}")
    return theirs


def in_blocks(theirs: dict[str, Any]) -> bool:
    """Return whether residual blocks change the resolution, else convolutions. Refuse unknown and mixed blocks."""
    attention, changes, levels = [], set(), len(theirs["block_out_channels"])
    for way in ("Down", "Up"):
        name, setting = f"{way.lower()}_block_types", theirs[f"{way.lower()}sample_type"]
        kinds, known = theirs[name], {block_type(way, True, False): setting}
        known |= {block_type(way, False, False): "conv", block_type(way, False, True): "resnet"}
        listed = isinstance(kinds, list) and len(kinds) == levels and {*kinds} <= known.keys()
        expect(theirs, name, listed, f"{levels} blocks of {', '.join(known)}")
        attention.append([kind.startswith("Attn") for kind in kinds])
        changes |= {known[kind] for kind in kinds[:-1]}  # the last block changes nothing
    one = attention[0] == attention[1][::-1] and len(changes) <= 1
    fault = "whose halves do not mirror each other, or change resolution in several ways"
    check(one, f"a {UNET} {fault} (down_block_types, up_block_types)")
    return changes != {"conv"}


def expect(theirs: dict[str, Any], name: str, holds: bool, expected: str) -> None:
    """Refuse a setting, by name and value, unless it `holds`."""
    check(holds, f"a {UNET} with {name}={str(theirs[name])[:200]}, where {expected} is known")


def unet_settings(card: ModelCard, weights: StateDict) -> dict[str, Any]:
    """Return the settings of `UNet2DModel` for our model. Refuse one that it cannot be."""
    require_expressible(card)
    network, size = OPTIONAL | card.network, card.image_size
    widths = [int(m * network["model_channels"]) for m in network["channel_mult"]]
    attention = [size >> k in network["attention_resolutions"] for k in range(len(widths))]
    shift, groups = network["use_scale_shift_norm"], network["num_groups"]
    return {
        "_class_name": UNET,
        "_diffusers_version": VERSION,
        **FIXED,
        **{name: network[ours] for name, ours in SAME.items()},
        **block_settings(attention, network["resblock_updown"], shift, groups),
        "time_embedding_dim": time_embedding.width(card)
        if time_embedding.needs_rewriting(card)
        else None,
        "sample_size": size,
        "out_channels": network["out_channels"] or network["in_channels"],
        "block_out_channels": widths,
        "attention_head_dim": head_channels(network, weights),
        "dropout": float(network["dropout"]),
    }


def require_expressible(card: ModelCard) -> None:
    """Refuse a model that diffusers cannot express."""
    network, scalings = OPTIONAL | card.network, card.preconditioning
    scale, student = scalings.get("c_noise_scale"), card.role == "consistency"
    mult, other_time = network.get("channel_mult", [1]), not student and scale != C_NOISE_OPENAI
    time_input = f"a time input of {scale or 'another kind than'} ln t, where a UNet gets 250 ln t"
    boundary = (
        "a consistency model without the boundary scalings, which the pipeline always applies"
    )
    pooling = not network.get("resblock_updown") and not network["conv_resample"]
    for fault, got, remedy in (
        (network["_target_"] != ADM, "a network other than ADM", "it is one of its own"),
        (other_time or scale is None, time_input, "train it with model.c_noise_scale=250"),
        (student and "t_min" not in scalings, boundary, "train it with mode=ct, ict, ect or cd"),
        (mult[0] != 1, f"channel_mult={mult}", "begin channel_mult with 1"),
        (pooling, "pooling layers between the resolutions", "train with resblock_updown=true"),
    ):
        _require(not fault, got, remedy)


def head_channels(network: dict[str, Any], weights: StateDict) -> int | None:
    """Return the width of an attention head, of which diffusers has one; None is one head of all channels."""
    heads, upsample = network["num_heads"], network["num_heads_upsample"]
    if network["num_head_channels"] is not None:
        return int(network["num_head_channels"])
    remedy = "train it with model.network.num_head_channels=32"
    got = f"{upsample} attention heads on the way up for {heads} on the way down"
    _require(upsample in (None, -1, heads), got, remedy)
    if heads == 1:
        return None
    widths = {v.shape[1] // heads for name, v in weights.items() if name.endswith(".qkv.weight")}
    listed = " and ".join(map(str, sorted(widths)))
    got = f"attention heads of {listed} channels, where diffusers has one width"
    _require(len(widths) == 1, got, remedy)
    return widths.pop()


def _require(holds: bool, got: str, remedy: str) -> None:
    require(holds, f"a model that {UNET} of diffusers can be", got, f"convert to=ours, or {remedy}")
