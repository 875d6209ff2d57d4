"""The network of diffusers, `UNet2DModel`, and our `ADM`: names of the weights and settings, in both directions.

They are one network under the settings `FIXED`. q, k and v are three linear maps in diffusers, in that order the thirds of
our qkv.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints import contents
from consistency.checkpoints import diffusers_time_embedding as time_embedding
from consistency.checkpoints.contents import ContentError, Hints, StateDict, assumes, brief, check
from consistency.checkpoints.openai import ADM
from consistency.errors import require
from consistency.inference.card import ModelCard

UNET = "UNet2DModel"
VERSION = "0.35.0"
"""The version of diffusers that our folders are written for; it is only a note in them."""

FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
}
"""Settings of `UNet2DModel` with one value in an ADM, which is also their default."""

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0", "qkv": "to_qkv"}


def block_type(way: str, attention: bool, in_blocks: bool) -> str:
    """Return the class of a block; way: Down or Up; in_blocks: whether residual blocks change the resolution."""
    if attention:
        return f"Attn{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if in_blocks else f"{way}Block2D"


def block_settings(
    attention: list[bool], in_blocks: bool, shift: bool, groups: int
) -> dict[str, Any]:
    """Return the settings of the blocks, given which levels have attention."""
    return {
        "down_block_types": [block_type("Down", has, in_blocks) for has in attention],
        "up_block_types": [block_type("Up", has, in_blocks) for has in attention[::-1]],
        "downsample_type": "resnet" if in_blocks else "conv",
        "upsample_type": "resnet" if in_blocks else "conv",
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if shift else None,
    }


DEFAULTS: dict[str, Any] = {
    **block_settings([False, True, True, True], False, False, 32),
    **{"sample_size": None, "in_channels": 3, "out_channels": 3, "num_class_embeds": None},
    **{"block_out_channels": [224, 448, 672, 896], "layers_per_block": 2, "dropout": 0.0},
    **{"attention_head_dim": 8, "time_embedding_dim": None},
}
"""Defaults of the settings that are not in `FIXED`."""

COUNTS = {
    **{"in_channels": "a whole number", "out_channels": "a whole number"},
    **{"layers_per_block": "a whole number", "norm_num_groups": "a whole number"},
    **dict.fromkeys(("num_class_embeds", "attention_head_dim"), "a whole number or null"),
}
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


def our_weights(network: dict[str, Any], theirs: StateDict) -> StateDict:
    """Return the weights of a `UNet2DModel` under the names of `ADM`. Linear maps of attention become 1x1."""
    rest, ours = dict(theirs), {}
    for name, sources in parameters(network):
        missing = [source for source in sources if source not in rest]
        if missing:
            raise ContentError(f"a {UNET} without {missing[0]}")
        value = torch.cat([rest.pop(source) for source in sources])
        linear = ".attentions." in sources[0] and value.ndim == 2
        ours[name] = value[:, :, None, None] if linear else value
    if rest:
        raise ContentError(f"weights without a counterpart in {UNET}, such as {min(rest)[:80]}")
    return ours


def their_weights(network: dict[str, Any], ours: StateDict) -> dict[str, Tensor]:
    """Return the inverse of `our_weights`."""
    theirs: dict[str, Tensor] = {}
    for name, targets in parameters(network):
        value = ours[name]
        flat = value[:, :, 0, 0] if ".attentions." in targets[0] and value.ndim == 4 else value
        theirs |= dict(zip(targets, flat.chunk(len(targets)), strict=True))
    return theirs


def parameters(network: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield our name of each parameter, and its name in diffusers or, for qkv, its three names."""
    for ours, theirs, kind in modules(network):
        names = {"residual": RESIDUAL, "attention": ATTENTION}.get(kind, {"": ""})
        for old, new in names.items():
            if old == "skip_connection" and not ours.endswith("*"):
                continue
            a, b = f"{ours.removesuffix('*')}.{old}".strip("."), f"{theirs}.{new}".strip(".")
            for part in ("weight",) if kind == "embedding" else ("weight", "bias"):
                three = tuple(b.replace("to_qkv", f"to_{letter}") for letter in "qkv")
                yield f"{a}.{part}", tuple(f"{n}.{part}" for n in dict.fromkeys(three))


def modules(network: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield our name, diffusers' name and the kind of every module.

    Our name of a residual block with a projection ends in `*`.
    """
    sides = [network["image_size"] >> k for k in range(len(network["channel_mult"]))]
    attention = [side in network["attention_resolutions"] for side in sides]
    widths = [int(mult * network["model_channels"]) for mult in network["channel_mult"]]
    blocks, last, in_blocks = network["num_res_blocks"], len(widths) - 1, network["resblock_updown"]
    change = ("", "", "residual") if in_blocks else (".op", ".conv", "plain")

    def residual(ours: str, theirs: str, channels: int, out: int) -> tuple[str, str, str]:
        return ours + ("*" if channels != out else ""), theirs, "residual"

    yield "time_embed.0", "time_embedding.linear_1", "plain"
    yield "time_embed.2", "time_embedding.linear_2", "plain"
    if network.get("num_classes") is not None:
        yield "label_emb", "class_embedding", "embedding"
    yield "input_blocks.0.0", "conv_in", "plain"
    index, width, skips = 1, widths[0], [widths[0]]
    for level, out in enumerate(widths):
        block = f"down_blocks.{level}"
        for i in range(blocks):
            yield residual(f"input_blocks.{index}.0", f"{block}.resnets.{i}", width, out)
            if attention[level]:
                yield f"input_blocks.{index}.1", f"{block}.attentions.{i}", "attention"
            index, width = index + 1, out
            skips.append(out)
        if level < last:
            ours, theirs, kind = change
            yield f"input_blocks.{index}.0{ours}", f"{block}.downsamplers.0{theirs}", kind
            index += 1
            skips.append(out)
    yield "middle_block.0", "mid_block.resnets.0", "residual"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "residual"
    for index in range((last + 1) * (blocks + 1)):
        level, i = last - index // (blocks + 1), index % (blocks + 1)
        block, channels = f"up_blocks.{last - level}", width + skips.pop()
        width = widths[level]
        yield residual(f"output_blocks.{index}.0", f"{block}.resnets.{i}", channels, width)
        if attention[level]:
            yield f"output_blocks.{index}.1", f"{block}.attentions.{i}", "attention"
        if level > 0 and i == blocks:
            ours = f"output_blocks.{index}.{2 if attention[level] else 1}"
            _, theirs, kind = change
            yield f"{ours}{theirs}", f"{block}.upsamplers.0{theirs}", kind
    yield "out.0", "conv_norm_out", "plain"
    yield "out.2", "conv_out", "plain"


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
    kind = config.get("_class_name")
    check(kind == UNET, f"a diffusers model of class {brief(kind)}, not {UNET}")
    theirs = DEFAULTS | config

    def expect(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise unlike(theirs, name, expected)

    for name, value in (FIXED | ABSENT).items():
        expect(name, theirs.get(name, value) == value, f"{value}, as an ADM has")
    for name, kinds in COUNTS.items():
        count = theirs[name]
        whole = type(count) is int and 1 <= count <= 1 << 20
        expect(name, whole or (count is None and "null" in kinds), kinds)
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
    attention, changes = [], []
    for way in ("Down", "Up"):
        name, setting = f"{way.lower()}_block_types", theirs[f"{way.lower()}sample_type"]
        kinds = {
            block_type(way, False, False): "conv",
            block_type(way, False, True): "resnet",
            block_type(way, True, False): setting,
        }
        for kind in theirs[name]:
            known = isinstance(kind, str) and kind in kinds
            check(known, f"a {UNET} with a block of kind {brief(kind)} in {name}")
        attention.append([kind.startswith("Attn") for kind in theirs[name]])
        changes += [kinds[kind] for kind in theirs[name][:-1]]  # the last block changes nothing
    mirrored = attention[0] == attention[1][::-1]
    check(mirrored, f"a {UNET} whose halves do not mirror each other (up_block_types)")
    names = "down_block_types, up_block_types"
    check(len({*changes}) <= 1, f"a {UNET} that changes resolution in several ways ({names})")
    return {*changes} != {"conv"}


def unlike(config: dict[str, Any], name: str, expected: str) -> ContentError:
    """Return the refusal of a setting, by name and value."""
    value = config.get(name)
    plain = isinstance(value, int | float | str | list | None) and len(str(value)) < 200
    shown = value if plain else brief(value)
    return ContentError(f"a {UNET} with {name}={shown}, where {expected} is known")


def settings_of(theirs: StateDict, hints: Hints) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of `UNet2DModel` for these weights, and the assumptions made."""
    numbers = {int(name.split(".")[1]) for name in theirs if re.match(r"down_blocks\.\d+\.", name)}
    blocks = [f"down_blocks.{k}" for k in range(len(numbers))]
    firsts = [f"{block}.resnets.0.conv1.weight" for block in blocks]
    known = firsts and all(name in theirs for name in firsts)
    check(known, f"weights of a model of diffusers other than {UNET}")
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
        **block_settings(attention, resnet, shift, DEFAULTS["norm_num_groups"]),
        "num_class_embeds": None if classes is None else classes.shape[0],
    }
    return config, notes


def unet_settings(card: ModelCard, weights: StateDict) -> dict[str, Any]:
    """Return the settings of `UNet2DModel` for our model. Refuse one that it cannot be."""
    require_expressible(card)
    network, size = card.network, card.image_size
    shift = network["use_scale_shift_norm"]
    widths = [int(m * network["model_channels"]) for m in network["channel_mult"]]
    attention = [size >> k in network["attention_resolutions"] for k in range(len(widths))]
    return {
        "_class_name": UNET,
        "_diffusers_version": VERSION,
        **FIXED,
        "time_embedding_dim": time_embedding.width(card)
        if time_embedding.needs_rewriting(card)
        else None,
        "sample_size": size,
        "in_channels": network["in_channels"],
        "out_channels": network.get("out_channels") or network["in_channels"],
        "block_out_channels": widths,
        "layers_per_block": network["num_res_blocks"],
        "attention_head_dim": head_channels(network, weights),
        **block_settings(
            attention, network["resblock_updown"], shift, network.get("num_groups", 32)
        ),
        "num_class_embeds": network.get("num_classes"),
        "dropout": float(network.get("dropout", 0.0)),
    }


def require_expressible(card: ModelCard) -> None:
    """Refuse a model that diffusers cannot express."""
    network, scalings = card.network, card.preconditioning
    _require(network["_target_"] == ADM, "a network other than ADM", "it is one of its own")
    scale, student = scalings.get("c_noise_scale"), card.role == "consistency"
    _require(
        scale == contents.C_NOISE_OPENAI or (student and scale is not None),
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
