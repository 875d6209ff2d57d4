"""diffusers folders, both ways: a `ConsistencyModelPipeline`, or a `UNet2DModel` alone. The package is not needed.

A `UNet2DModel` with these settings is our `ADM` under other names: q, k and v are three linear maps, in that order the
thirds of our qkv, and c_noise = 250 ln t, which the pipeline's scheduler computes. The pipeline always applies the
boundary scalings, so it is a consistency model; a UNet alone does not say what it is.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.errors import require
from consistency.formats.openai import ADM
from consistency.formats.opened import OPENAI, ContentError, Hints, Opened, Role, describe, process
from consistency.formats.pickles import read_zip, told
from consistency.formats.sealed import read_sealed, write_sealed
from consistency.formats.timetable import LAYERS, restored, rewritten, width
from consistency.grids import KarrasGrid

FORMAT = "diffusers"
PIPELINE, UNET, SCHEDULER = (
    "ConsistencyModelPipeline",
    "UNet2DModel",
    "CMStochasticIterativeScheduler",
)
WEIGHTS = "diffusion_pytorch_model"
SETTINGS = "scheduler_config.json"
TIMETABLE = "time_embedding.safetensors"
POINTS = 40
"""Points of our pipelines' grids, as in the released distilled models."""

VERSION = "0.35.0"
"""The version that our folders are written for; it is only a note in them."""

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
"""Settings of `UNet2DModel` that have one value in an ADM, which is also what they are if not given."""

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0", "qkv": "to_qkv"}


# ------------------------------------------------------------------------------------- reading


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is a pipeline or a model of diffusers."""
    return (folder / "model_index.json").is_file() or (folder / "config.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object."""
    if not path.is_file() or path.stat().st_size > 1 << 20:
        raise ContentError(f"a diffusers folder without its {path.name}")
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ContentError(f"a {path.name} that is no object")
    return found


def open_folder(folder: Path, hints: Hints) -> Opened:
    """The model in a folder of a pipeline or of a UNet."""
    role: Role | None = None
    noise = process(second_time=0.821)
    unet = folder
    if (folder / "model_index.json").is_file():
        kind = read_json(folder / "model_index.json").get("_class_name")
        if kind != PIPELINE:
            raise ContentError(f"a diffusers pipeline of class {told(kind)}, not {PIPELINE}")
        role, noise, unet = "consistency", scheduled(folder / "scheduler"), folder / "unet"
    config = read_json(unet / "config.json")
    theirs, card = read_weights(unet)
    network = settings(config, hints) if card is None else card["network"]
    weights = {ours: take(theirs, names) for ours, names in parameters(network)}
    if theirs:
        raise ContentError(f"weights without a place in {UNET}, such as {min(theirs)[:80]}")
    if card is None:
        classes = network["num_classes"]
        found = describe(role=role, network=network, process=noise, num_classes=classes)
        return Opened(format=FORMAT, weights=weights, card=found, c_noise_scale=OPENAI)
    if needs_timetable(card):
        layers, same = read_sealed(unet / TIMETABLE)
        if same != card:
            raise ContentError(f"a {TIMETABLE} that was not written with its weights")
        weights = restored(weights, layers)
    own = [(unet_settings(card, weights), config)]
    if role is not None:
        own.append((scheduler_settings(card), read_json(folder / "scheduler" / SETTINGS)))
    if any(found.get(k) != v for wrote, found in own for k, v in wrote.items() if k[0] != "_"):
        raise ContentError("settings that are not those which its weights were written with")
    return Opened(format=FORMAT, weights=weights, card=card)


def scheduled(folder: Path) -> dict[str, Any]:
    """The noise process of a scheduler; the second time is that of the pipeline's own two steps."""
    config = read_json(folder / SETTINGS)
    given = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0, "s_noise": 1.0}
    given |= {"num_train_timesteps": 40, "_class_name": None} | config
    if given["_class_name"] != SCHEDULER or given["s_noise"] != 1:
        raise ContentError(f"a scheduler other than {SCHEDULER} with s_noise=1")
    t_min, t_max, rho = (float(given[name]) for name in ("sigma_min", "sigma_max", "rho"))
    points = int(given["num_train_timesteps"])
    second = KarrasGrid(t_min=t_min, t_max=t_max, rho=rho).at(torch.tensor(points // 2), points)
    found = process(
        sigma_data=float(given["sigma_data"]), t_min=t_min, t_max=t_max, second_time=float(second)
    )
    return {**found, "rho": rho}


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights of a model's folder, and our card if we wrote them."""
    for name in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.fp16.safetensors"):
        if (folder / name).is_file():
            return read_sealed(folder / name)
    older = folder / f"{WEIGHTS}.bin"
    if not older.is_file():
        raise ContentError(f"a diffusers folder without {WEIGHTS}.safetensors")
    content, _ = read_zip(older)
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ContentError("weights that are no state dict")
    return content, None


def settings(config: dict[str, Any], hints: Hints) -> dict[str, Any]:
    """The arguments of `ADM` from those of `UNet2DModel`."""
    if config.get("_class_name") != UNET:
        raise ContentError(
            f"a diffusers model of class {told(config.get('_class_name'))}, not {UNET}"
        )
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ContentError(
                f"a {UNET} with {name}={told(config[name])}, which an ADM does not have"
            )
    widths, size = config["block_out_channels"], config.get("sample_size")
    shift = config.get("resnet_time_scale_shift", "default")
    groups, in_attention = config.get("norm_num_groups", 32), config.get("attn_norm_num_groups")
    if (groups if in_attention is None and shift == "default" else in_attention) != groups:
        raise ContentError(f"a {UNET} whose attn_norm_num_groups is not its norm_num_groups")
    if config.get("time_embedding_dim") not in (None, 4 * widths[0]):
        raise ContentError(f"a {UNET} with another time_embedding_dim than 4 x {widths[0]}")
    sides = set(size) if isinstance(size, list) else {size}
    side = hints.image_size or (sides.pop() if len(sides) == 1 else None)
    down, up = config["down_block_types"], config["up_block_types"]
    attention = ["Attn" in kind for kind in down]
    if ["Attn" in kind for kind in up] != attention[::-1] or len(down) != len(widths):
        raise ContentError(f"a {UNET} whose halves do not mirror each other")
    if not isinstance(side, int):
        raise ContentError(f"a {UNET} without one sample_size (image_size= sets it)")
    kinds = [_resampling(kind, config.get("downsample_type", "conv")) for kind in down]
    ups = [_resampling(kind, config.get("upsample_type", "conv")) for kind in up]
    changes = {*kinds[:-1], *ups[:-1]}  # the last block of each half changes nothing
    if len(changes) > 1:
        raise ContentError(f"a {UNET} that changes resolution in several ways")
    head = config.get("attention_head_dim", 8)
    return {
        "_target_": ADM,
        "image_size": side,
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "model_channels": widths[0],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attention_resolutions": [side >> k for k, has in enumerate(attention) if has],
        "channel_mult": [n // widths[0] if n % widths[0] == 0 else n / widths[0] for n in widths],
        "num_classes": config.get("num_class_embeds"),
        "dropout": float(config.get("dropout", 0.0)),
        "num_heads": 1,
        "num_head_channels": head,
        "use_scale_shift_norm": shift == "scale_shift",
        "resblock_updown": changes != {"conv"},
        "conv_resample": True,
        "num_groups": groups,
    }


def _resampling(kind: str, by_setting: str) -> str:
    """How a block changes resolution: by a residual block (`resnet`) or a convolution (`conv`)."""
    known = {"DownBlock2D": "conv", "UpBlock2D": "conv"}
    known |= {"ResnetDownsampleBlock2D": "resnet", "ResnetUpsampleBlock2D": "resnet"}
    known |= {"AttnDownBlock2D": by_setting, "AttnUpBlock2D": by_setting}
    if known.get(kind) not in ("conv", "resnet"):
        raise ContentError(f"a {UNET} with a block of kind {told(kind)}")
    return known[kind]


# --------------------------------------------------------------------- names of both programs


def parameters(network: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our name of each parameter, and its name or, for qkv, its three names in diffusers."""
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
    """Our name, diffusers' name and kind of every module; a residual block with a projection ends in `*` in ours."""
    sides = [network["image_size"] >> k for k in range(len(network["channel_mult"]))]
    attention = [side in network["attention_resolutions"] for side in sides]
    widths = [int(mult * network["model_channels"]) for mult in network["channel_mult"]]
    blocks, last = network["num_res_blocks"], len(widths) - 1
    in_blocks = network["resblock_updown"]

    def residual(ours: str, theirs: str, channels: int, out: int) -> tuple[str, str, str]:
        return ours + ("*" if channels != out else ""), theirs, "residual"

    yield "time_embed.0", "time_embedding.linear_1", "plain"
    yield "time_embed.2", "time_embedding.linear_2", "plain"
    if network.get("num_classes") is not None:
        yield "label_emb", "class_embedding", "embedding"
    yield "input_blocks.0.0", "conv_in", "plain"
    place, width, skips = 1, widths[0], [widths[0]]
    for level, out in enumerate(widths):
        for i in range(blocks):
            there = f"down_blocks.{level}"
            yield residual(f"input_blocks.{place}.0", f"{there}.resnets.{i}", width, out)
            if attention[level]:
                yield f"input_blocks.{place}.1", f"{there}.attentions.{i}", "attention"
            place, width = place + 1, out
            skips.append(out)
        if level < last:
            there = f"down_blocks.{level}.downsamplers.0"
            kind = "residual" if in_blocks else "plain"
            ours = f"input_blocks.{place}.0" + ("" if in_blocks else ".op")
            yield ours, there + ("" if in_blocks else ".conv"), kind
            place += 1
            skips.append(out)
    yield "middle_block.0", "mid_block.resnets.0", "residual"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "residual"
    place = 0
    for level in range(last, -1, -1):
        there = f"up_blocks.{last - level}"
        for i in range(blocks + 1):
            channels = width + skips.pop()
            width = widths[level]
            yield residual(f"output_blocks.{place}.0", f"{there}.resnets.{i}", channels, width)
            if attention[level]:
                yield f"output_blocks.{place}.1", f"{there}.attentions.{i}", "attention"
            place += 1
        if level > 0:
            ours = f"output_blocks.{place - 1}.{2 if attention[level] else 1}"
            kind = "residual" if in_blocks else "plain"
            ours += "" if in_blocks else ".conv"
            yield ours, f"{there}.upsamplers.0" + ("" if in_blocks else ".conv"), kind
    yield "out.0", "conv_norm_out", "plain"
    yield "out.2", "conv_out", "plain"


def take(theirs: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """One of our parameters out of one or three of theirs, which leave the dictionary. Linear maps become 1x1."""
    missing = [name for name in names if name not in theirs]
    if missing:
        raise ContentError(f"a {UNET} without {missing[0]}")
    value = torch.cat([theirs.pop(name) for name in names])
    inside = ".attentions." in names[0] and value.ndim == 2
    return value[:, :, None, None] if inside else value


def give(value: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The inverse of `take`."""
    flat = value[:, :, 0, 0] if ".attentions." in names[0] and value.ndim == 4 else value
    return dict(zip(names, flat.chunk(len(names)), strict=True))


# ------------------------------------------------------------------------------------- writing


def write_diffusers(folder: Path, card: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Writes a pipeline for a consistency model, a UNet alone for a teacher, which diffusers has no pipeline for."""
    config = unet_settings(card, weights)
    student = card["role"] == "consistency"
    unet = folder / "unet" if student else folder
    unet.mkdir(parents=True, exist_ok=True)
    if needs_timetable(card):
        write_sealed(unet / TIMETABLE, card, {name: weights[name] for name in LAYERS})
        weights = rewritten(weights, grid(card), card["preconditioning"]["c_noise_scale"])
    theirs: dict[str, Tensor] = {}
    for ours, names in parameters(card["network"]):
        theirs |= give(weights[ours], names)
    if student:
        index: dict[str, Any] = {"_class_name": PIPELINE, "_diffusers_version": VERSION}
        index |= {"scheduler": ["diffusers", SCHEDULER], "unet": ["diffusers", UNET]}
        write_json(folder / "model_index.json", index)
        write_json(folder / "scheduler" / SETTINGS, scheduler_settings(card))
    write_json(unet / "config.json", config)
    write_sealed(unet / f"{WEIGHTS}.safetensors", card, theirs)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def needs_timetable(card: dict[str, Any]) -> bool:
    """Whether the network has another time input than the one that diffusers computes."""
    return card["preconditioning"]["c_noise_scale"] != OPENAI


def grid(card: dict[str, Any]) -> Tensor:
    """The noise levels at which the pipeline evaluates its network, in float64."""
    noise = scheduler_settings(card)
    karras = KarrasGrid(t_min=noise["sigma_min"], t_max=noise["sigma_max"], rho=noise["rho"])
    return karras.points(POINTS)


def scheduler_settings(card: dict[str, Any]) -> dict[str, Any]:
    """The settings of the pipeline's scheduler."""
    scalings, noise = card["preconditioning"], card["process"]
    return {
        "_class_name": SCHEDULER,
        "_diffusers_version": VERSION,
        "num_train_timesteps": POINTS,
        "sigma_min": scalings["t_min"],
        "sigma_max": noise["t_max"],
        "sigma_data": scalings["sigma_data"],
        "rho": noise["rho"],
        "s_noise": 1.0,
        "clip_denoised": True,
    }


def unet_settings(card: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """The settings of `UNet2DModel` for our model. Refuses one that it cannot be."""
    network, scalings = card["network"], card["preconditioning"]
    scale, student = scalings.get("c_noise_scale"), card["role"] == "consistency"
    require_diffusers(
        network["_target_"] == ADM, "a network other than ADM", "it is one of its own"
    )
    require_diffusers(
        scale == OPENAI or (student and scale is not None),
        f"a time input of {scale or 'another kind than'} ln t, where a UNet alone gets 250 ln t",
        "train it with model.c_noise_scale=250",
    )
    require_diffusers(
        not student or "t_min" in scalings,
        "a consistency model without the boundary scalings, which the pipeline always applies",
        "train it with mode=ct, ict, ect or cd",
    )
    mult = network["channel_mult"]
    require_diffusers(mult[0] == 1, f"channel_mult={mult}", "begin channel_mult with 1")
    in_blocks = network["resblock_updown"]
    require_diffusers(
        in_blocks or network.get("conv_resample", True),
        "pooling layers between the resolutions",
        "train it with model.network.resblock_updown=true",
    )
    widths = [int(m * network["model_channels"]) for m in mult]
    attention = [
        network["image_size"] >> k in network["attention_resolutions"] for k in range(len(widths))
    ]
    shift = network["use_scale_shift_norm"]
    groups = network.get("num_groups", 32)
    down = [_block("Down", has, in_blocks) for has in attention]
    up = [_block("Up", has, in_blocks) for has in attention[::-1]]
    return {
        "_class_name": UNET,
        "_diffusers_version": VERSION,
        **FIXED,
        "time_embedding_dim": None if scale == OPENAI else width(widths[0], POINTS),
        "sample_size": card["image"]["size"],
        "in_channels": network["in_channels"],
        "out_channels": network.get("out_channels") or network["in_channels"],
        "block_out_channels": widths,
        "layers_per_block": network["num_res_blocks"],
        "attention_head_dim": head_channels(network, weights),
        "down_block_types": down,
        "up_block_types": up,
        "downsample_type": "resnet" if in_blocks else "conv",
        "upsample_type": "resnet" if in_blocks else "conv",
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if shift else None,
        "num_class_embeds": network.get("num_classes"),
        "dropout": float(network.get("dropout", 0.0)),
    }


def _block(way: str, attention: bool, in_blocks: bool) -> str:
    if attention:
        return f"Attn{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if in_blocks else f"{way}Block2D"


def head_channels(network: dict[str, Any], weights: dict[str, Tensor]) -> int | None:
    """The width of an attention head, which diffusers has one of; None is one head of all channels."""
    if network.get("num_head_channels") is not None:
        return int(network["num_head_channels"])
    heads = network.get("num_heads", 1)
    if heads == 1:
        return None
    found = {v.shape[1] // heads for name, v in weights.items() if name.endswith(".qkv.weight")}
    require_diffusers(
        len(found) == 1,
        f"attention heads of {' and '.join(map(str, sorted(found)))} channels, where diffusers has one width",
        "train it with model.network.num_head_channels=32",
    )
    return found.pop()


def require_diffusers(holds: bool, got: str, remedy: str) -> None:
    """Refuses a model that diffusers cannot express."""
    require(holds, f"a model that {UNET} of diffusers can be", got, f"convert to=ours, or {remedy}")
