"""diffusers folders, both ways: a `ConsistencyModelPipeline`, or a `UNet2DModel` alone. The package is not needed.

A `UNet2DModel` with these settings is our `ADM` under other names: q, k and v are three linear maps, in that order the
thirds of our qkv, and c_noise = 250 ln t, which the pipeline's scheduler computes. The pipeline always applies the
boundary scalings, so it is a consistency model; a UNet alone does not say what it is.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.errors import require
from consistency.formats.openai import ADM
from consistency.formats.opened import (
    OPENAI,
    ContentError,
    Hints,
    Opened,
    chosen,
    describe,
    process,
)
from consistency.formats.pickles import read_pickle, read_zip, told
from consistency.formats.sealed import read_sealed, write_sealed
from consistency.formats.timetable import LAYERS, restored, rewritten, width
from consistency.grids import KarrasGrid
from consistency.inference.card import ModelCard, Process, Role

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
"""What the other settings are if not given."""

COUNTS = {"in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 1}
CHOICES = {
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
}
"""Settings that are whole numbers, with the least of each, and those of which some kinds are known."""

ANCHORS = ("time_embedding.linear_1.weight", "conv_in.weight")
"""Two names that every network has."""

UNETS = {"online": "unet/", "ema": "unet_ema/"}
"""Where the UNet stands in a pipeline, and the two that accelerate keeps in training."""

SUFFIXES = (".safetensors", ".safetensors.index", ".bin", ".bin.index")
PREFERRED = ("", "fp32", "bf16", "fp16")
"""Which form of a file of weights is read, and which variant where the usual one is not there."""

VARIANTS = {"non_ema": "online", "ema": "ema"}
"""Variants whose name says which weights they are; others keep their own."""

SHARD = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")

ABSENT = dict.fromkeys(
    (
        *("cross_attention_dim", "encoder_hid_dim", "addition_embed_type", "time_cond_proj_dim"),
        *("projection_class_embeddings_input_dim", "prediction_type"),
    )
)
"""Settings of other networks of diffusers, which none that we know has."""

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
    """Whether a folder is a pipeline or a model of diffusers, or what accelerate keeps of one in training."""
    names = ("model_index.json", *(f"{place}config.json" for place in ("", *UNETS.values())))
    return any((folder / name).is_file() for name in names)


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object."""
    if not path.is_file() or path.stat().st_size > 1 << 20:
        raise ContentError(f"a diffusers folder without its {path.name}")
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ContentError(f"a {path.name} that is no object")
    return found


def open_folder(folder: Path, weights: str, hints: Hints) -> Opened:
    """The model in a folder of a pipeline, of a UNet, or of accelerate, with the weights of that name."""
    if is_pipeline(folder):
        require_pipeline(folder)
    return _open(folder, *chosen(sets(folder), weights), hints)


def open_file(file: Path, weights: str, hints: Hints) -> Opened:
    """The model of one file of weights beside its settings, whatever other files stand there."""
    unet = file.parent
    kind = variant(file.name)
    chosen({VARIANTS.get(kind, kind or "ema"): file}, weights)
    return _open(unet.parent if is_pipeline(unet.parent) else unet, unet, file, hints)


def folder_of(file: Path) -> Path:
    """What is meant by a file of weights: the folder where it is the usual one or a part of it, else the file itself."""
    unet = file.parent
    if not (unet / "config.json").is_file():
        return file
    usual = next((f for v, f in weight_files(unet).items() if v in PREFERRED), None)
    if file != usual and "-of-" not in file.name:
        return file
    return unet.parent if is_pipeline(unet.parent) and unet.name == "unet" else unet


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is that of a pipeline."""
    return (folder / "model_index.json").is_file()


def _open(folder: Path, unet: Path, file: Path, hints: Hints) -> Opened:
    role: Role | None = None
    noise = process(second_time=0.821)
    if is_pipeline(folder):
        require_pipeline(folder)
        role, noise = "consistency", scheduled(folder / "scheduler")
    else:
        for above in (unet.parent, unet.parent.parent):
            if is_pipeline(above):
                require_pipeline(above)
    config = read_json(unet / "config.json")
    theirs, card = read_weights(file)
    network = settings(config, hints) if card is None else card.network
    weights = {ours: take(theirs, names) for ours, names in parameters(network)}
    if theirs:
        raise ContentError(f"weights without a place in {UNET}, such as {min(theirs)[:80]}")
    if card is None:
        return _described(role, network, noise, weights)
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


def _described(
    role: Role | None,
    network: dict[str, Any],
    noise: Process,
    weights: dict[str, Tensor],
    notes: tuple[str, ...] = (),
) -> Opened:
    classes = network["num_classes"]
    card = describe(
        role=role, network=network, process=noise, c_noise_scale=OPENAI, num_classes=classes
    )
    return Opened(format=FORMAT, weights=weights, card=card, notes=notes)


def require_pipeline(folder: Path) -> None:
    """Refuses a pipeline of another kind, whose network was trained for other inputs and another output."""
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind != PIPELINE:
        raise ContentError(f"a diffusers pipeline of class {told(kind)}, not {PIPELINE}")


def variant(name: str) -> str:
    """What tells a file of weights from others of its folder, `fp16` or `non_ema`; empty for the usual one."""
    parts = name.removeprefix(WEIGHTS).split(".")
    return ".".join(p for p in parts if p not in ("", "safetensors", "bin", "index", "json"))


def weight_files(unet: Path) -> dict[str, Path]:
    """The file of weights of every variant in a model's folder; of several the first of `SUFFIXES`."""
    found: dict[str, Path] = {}
    for suffix in SUFFIXES:
        for path in sorted(unet.glob(f"{WEIGHTS}*")):
            index = path.name.endswith(".json")
            this = f".{'safetensors' if '.safetensors' in path.name else 'bin'}"
            if this + (".index" if index else "") == suffix and "-of-" not in path.name:
                found.setdefault(variant(path.name), path)
    return found


def sets(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The sets of weights in a folder by the names that `weights=` takes: the folder of the UNet, and the file.

    The usual file holds the average, unless there is a `unet_ema` or a variant that says so; every variant has its own name
    beside.
    """
    alone = (folder / "config.json").is_file() and not is_pipeline(folder)
    unets = {"": folder} if alone else {name: folder / place for name, place in UNETS.items()}
    there = {name: unet for name, unet in unets.items() if (unet / "config.json").is_file()}
    by_folder = not alone and (len(there) > 1 or not is_pipeline(folder))
    found: dict[str, tuple[Path, Path]] = {}
    for name, unet in there.items():
        held = weight_files(unet)
        if not held:
            raise ContentError(f"a diffusers folder without {WEIGHTS}.safetensors")
        usual = next((v for v in PREFERRED if v in held), next(iter(held)))
        for kind, file in sorted(held.items()):
            means = VARIANTS.get(kind, kind)
            if by_folder:
                means = name if kind == usual else f"{name}:{kind}"
            elif kind == usual and kind in PREFERRED:
                means = "online" if "ema" in held else "ema"
                found[kind or means] = (unet, file)
            found[means] = (unet, file)
    if not found:
        raise ContentError("a diffusers folder without its unet/config.json")
    return found


def scheduled(folder: Path) -> Process:
    """The noise process of a scheduler; the second time is that of the pipeline's own two steps."""
    config = read_json(folder / SETTINGS)
    given = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0, "s_noise": 1.0}
    given |= {"num_train_timesteps": 40, "_class_name": None} | config
    if given["_class_name"] != SCHEDULER:
        raise ContentError(f"a scheduler of class {told(given['_class_name'])}, not {SCHEDULER}")
    for name in ("sigma_min", "sigma_max", "sigma_data", "rho"):
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise ContentError(
                f"a {SCHEDULER} with {name}={told(value)}, which is no level of noise"
            )
    for name, only in {"s_noise": 1, "prediction_type": None, "timestep_type": None}.items():
        if given.get(name, only) != only:
            raise ContentError(
                f"a {SCHEDULER} with {name}={told(given[name])}, where {only} is known"
            )
    points = given["num_train_timesteps"]
    if type(points) is not int or points < 2 or given["sigma_min"] >= given["sigma_max"]:
        raise ContentError(
            f"a {SCHEDULER} with num_train_timesteps={told(points)} from sigma_max={given['sigma_max']} "
            f"to sigma_min={given['sigma_min']}, which is no grid"
        )
    t_min, t_max, rho = (float(given[name]) for name in ("sigma_min", "sigma_max", "rho"))
    second = KarrasGrid(t_min=t_min, t_max=t_max, rho=rho).at(torch.tensor(points // 2), points)
    found = process(
        sigma_data=float(given["sigma_data"]), t_min=t_min, t_max=t_max, second_time=float(second)
    )
    return replace(found, rho=rho)


def read_weights(file: Path) -> tuple[dict[str, Tensor], ModelCard | None]:
    """The weights in a file or in the files that an index names, and our card if we wrote them."""
    if file.suffix == ".json":
        return read_shards(file), None
    if file.suffix == ".safetensors":
        return read_sealed(file)
    with file.open("rb") as content:
        zipped = content.read(2) == b"PK"
    found = read_zip(file)[0] if zipped else read_pickle(file)
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ContentError("weights that are no state dict")
    return found, None


def read_shards(index: Path) -> dict[str, Tensor]:
    """The weights that an index spreads over files of its own folder."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ContentError(f"a {index.name} without a weight_map")
    read: dict[str, dict[str, Tensor]] = {}
    for name in dict.fromkeys(places.values()):
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise ContentError(f"a {index.name} that names the file {told(name)}")
        if not (index.parent / name).is_file():
            raise ContentError(f"a {index.name} whose {name[:80]} is not there")
        read[name] = read_weights(index.parent / name)[0]
    for parameter, name in places.items():
        if parameter not in read[name]:
            raise ContentError(f"a {name} without {told(parameter)}, which {index.name} has there")
    return {parameter: read[name][parameter] for parameter, name in places.items()}


def settings(config: dict[str, Any], hints: Hints) -> dict[str, Any]:
    """The arguments of `ADM` from those of `UNet2DModel`."""
    if config.get("_class_name") != UNET:
        raise ContentError(
            f"a diffusers model of class {told(config.get('_class_name'))}, not {UNET}"
        )
    for name, value in (FIXED | ABSENT).items():
        if config.get(name, value) != value:
            raise unlike(config, name, f"{value}, as an ADM has")
    given = DEFAULTS | config
    for name, least in COUNTS.items():
        if type(given[name]) is not int or not least <= given[name] <= 1 << 20:
            raise unlike(given, name, "a whole number")
    for name in ("num_class_embeds", "attention_head_dim"):
        if given[name] is not None and (type(given[name]) is not int or given[name] < 1):
            raise unlike(given, name, "a whole number or null")
    for name, choices in CHOICES.items():
        if given[name] not in choices:
            raise unlike(given, name, " or ".join(choices))
    if given["out_channels"] != given["in_channels"]:
        raise unlike(
            given, "out_channels", f"in_channels={given['in_channels']}, as a consistency model has"
        )
    widths, size = given["block_out_channels"], given["sample_size"]
    if not isinstance(widths, list) or not all(type(n) is int and n > 0 for n in widths):
        raise unlike(given, "block_out_channels", "a list of whole numbers")
    shift, groups = given["resnet_time_scale_shift"], given["norm_num_groups"]
    in_attention = given["attn_norm_num_groups"]
    if (groups if in_attention is None and shift == "default" else in_attention) != groups:
        raise unlike(given, "attn_norm_num_groups", f"norm_num_groups={groups}")
    if given["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise unlike(given, "time_embedding_dim", f"4 x {widths[0]}")
    sides = set(size) if isinstance(size, list) else {size}
    side = hints.image_size or (sides.pop() if len(sides) == 1 else None)
    down, up = given["down_block_types"], given["up_block_types"]
    for name, kinds_of in (("down_block_types", down), ("up_block_types", up)):
        if not isinstance(kinds_of, list) or len(kinds_of) != len(widths):
            raise unlike(given, name, f"{len(widths)} blocks, as block_out_channels has")
    kinds = [_resampling("down_block_types", kind, given["downsample_type"]) for kind in down]
    ups = [_resampling("up_block_types", kind, given["upsample_type"]) for kind in up]
    attention = ["Attn" in kind for kind in down]
    if ["Attn" in kind for kind in up] != attention[::-1]:
        raise ContentError(f"a {UNET} whose halves do not mirror each other (up_block_types)")
    if type(side) is not int or side < 1:
        raise unlike(given, "sample_size", "one side of the images (image_size= sets it)")
    changes = {*kinds[:-1], *ups[:-1]}  # the last block of each half changes nothing
    if len(changes) > 1:
        raise ContentError(
            f"a {UNET} that changes resolution in several ways (down_block_types, up_block_types)"
        )
    return {
        "_target_": ADM,
        "image_size": side,
        "in_channels": given["in_channels"],
        "out_channels": given["out_channels"],
        "model_channels": widths[0],
        "num_res_blocks": given["layers_per_block"],
        "attention_resolutions": [side >> k for k, has in enumerate(attention) if has],
        "channel_mult": [n // widths[0] if n % widths[0] == 0 else n / widths[0] for n in widths],
        "num_classes": given["num_class_embeds"],
        "dropout": float(given["dropout"]),
        "num_heads": 1,
        "num_head_channels": given["attention_head_dim"],
        "use_scale_shift_norm": shift == "scale_shift",
        "resblock_updown": changes != {"conv"},
        "conv_resample": True,
        "num_groups": groups,
    }


def unlike(config: dict[str, Any], name: str, expected: str) -> ContentError:
    """The refusal of a setting, by name and value."""
    value = config.get(name)
    short = isinstance(value, int | float | str | None) or (
        isinstance(value, list) and len(str(value)) < 200
    )
    return ContentError(
        f"a {UNET} with {name}={value if short else told(value)}, where {expected} is known"
    )


def open_state(theirs: dict[str, Tensor], hints: Hints) -> Opened:
    """The network that a state dict without settings belongs to."""
    config, notes = settings_of(theirs, hints)
    network = settings(config, hints)
    rest = dict(theirs)
    weights = {ours: take(rest, names) for ours, names in parameters(network)}
    if rest:
        raise ContentError(f"weights without a place in {UNET}, such as {min(rest)[:80]}")
    return _described(None, network, process(second_time=0.821), weights, tuple(notes))


def settings_of(theirs: dict[str, Tensor], hints: Hints) -> tuple[dict[str, Any], list[str]]:
    """The settings of `UNet2DModel` for these weights, and what had to be assumed."""
    numbers = {int(name.split(".")[1]) for name in theirs if re.match(r"down_blocks\.\d+\.", name)}
    blocks = [f"down_blocks.{k}" for k in range(len(numbers))]
    firsts = [f"{block}.resnets.0.conv1.weight" for block in blocks]
    if not firsts or not all(name in theirs for name in firsts):
        raise ContentError(f"weights of a model of diffusers other than {UNET}")
    widths = [theirs[name].shape[0] for name in firsts]
    attention = [f"{block}.attentions.0.to_q.weight" in theirs for block in blocks]
    in_blocks = any(f"{block}.downsamplers.0.conv1.weight" in theirs for block in blocks)
    time = theirs["down_blocks.0.resnets.0.time_emb_proj.weight"].shape[0]
    classes = theirs.get("class_embedding.weight")
    size, head = hints.image_size, hints.num_head_channels
    notes = []
    if size is None:
        size = 32 << next((k for k, has in enumerate(attention) if has), 1)
        notes.append(
            f"assumes images of {size} x {size} (the file does not say; image_size= sets it)"
        )
    if head is None:
        head = DEFAULTS["attention_head_dim"]
        notes.append(
            f"assumes attention heads of {head} channels (the file does not say; num_head_channels= sets it)"
        )
    shift = time == 2 * widths[0]
    layers = sum(
        bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight", n)) for n in theirs
    )
    found = {
        "_class_name": UNET,
        "sample_size": size,
        "in_channels": theirs["conv_in.weight"].shape[1],
        "out_channels": theirs["conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "attention_head_dim": head,
        "down_block_types": [_block("Down", has, in_blocks) for has in attention],
        "up_block_types": [_block("Up", has, in_blocks) for has in attention[::-1]],
        "downsample_type": "resnet" if in_blocks else "conv",
        "upsample_type": "resnet" if in_blocks else "conv",
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
        "attn_norm_num_groups": DEFAULTS["norm_num_groups"],
        "num_class_embeds": None if classes is None else classes.shape[0],
    }
    return found, notes


def _resampling(name: str, kind: object, by_setting: str) -> str:
    """How a block changes resolution: by a residual block (`resnet`) or a convolution (`conv`)."""
    known = {"DownBlock2D": "conv", "UpBlock2D": "conv"}
    known |= {"ResnetDownsampleBlock2D": "resnet", "ResnetUpsampleBlock2D": "resnet"}
    known |= {"AttnDownBlock2D": by_setting, "AttnUpBlock2D": by_setting}
    if not isinstance(kind, str) or kind not in known:
        raise ContentError(f"a {UNET} with a block of kind {told(kind)} in {name}")
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


def write_diffusers(folder: Path, card: ModelCard, weights: dict[str, Tensor]) -> None:
    """Writes a pipeline for a consistency model, a UNet alone for a teacher, which diffusers has no pipeline for."""
    config = unet_settings(card, weights)
    student = card.role == "consistency"
    unet = folder / "unet" if student else folder
    unet.mkdir(parents=True, exist_ok=True)
    if needs_timetable(card):
        write_sealed(unet / TIMETABLE, card, {name: weights[name] for name in LAYERS})
        weights = rewritten(weights, grid(card), card.preconditioning["c_noise_scale"])
    theirs: dict[str, Tensor] = {}
    for ours, names in parameters(card.network):
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


def needs_timetable(card: ModelCard) -> bool:
    """Whether the network has another time input than the one that diffusers computes."""
    return card.preconditioning["c_noise_scale"] != OPENAI


def grid(card: ModelCard) -> Tensor:
    """The noise levels at which the pipeline evaluates its network, in float64."""
    noise = scheduler_settings(card)
    karras = KarrasGrid(t_min=noise["sigma_min"], t_max=noise["sigma_max"], rho=noise["rho"])
    return karras.points(POINTS)


def scheduler_settings(card: ModelCard) -> dict[str, Any]:
    """The settings of the pipeline's scheduler."""
    scalings, noise = card.preconditioning, card.process
    return {
        "_class_name": SCHEDULER,
        "_diffusers_version": VERSION,
        "num_train_timesteps": POINTS,
        "sigma_min": scalings["t_min"],
        "sigma_max": noise.t_max,
        "sigma_data": scalings["sigma_data"],
        "rho": noise.rho,
        "s_noise": 1.0,
        "clip_denoised": True,
    }


def unet_settings(card: ModelCard, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The settings of `UNet2DModel` for our model. Refuses one that it cannot be."""
    network, scalings = card.network, card.preconditioning
    scale, student = scalings.get("c_noise_scale"), card.role == "consistency"
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
        "sample_size": card.image_size,
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
    require_diffusers(
        network.get("num_heads_upsample") in (None, -1, heads),
        f"{network.get('num_heads_upsample')} attention heads on the way up for {heads} on the way down",
        "train it with model.network.num_head_channels=32",
    )
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
