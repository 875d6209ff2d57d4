"""NVlabs/edm and codes that grew from it (ECT): a pickle of whole modules with their settings and their source.

The source is not read. Names and rows of qkv are those of our networks, and c_noise = 0.25 ln t. Augmentation layers are
left out: without augmentation labels they add nothing. `network-snapshot-*.pkl` holds the average, `training-state-*.pt`
the weights in training.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from consistency.checkpoints import contents, wrapped
from consistency.checkpoints.contents import Hints, Object, StateDict, brief, check
from consistency.inference.card import ModelCard, Role
from consistency.networks.unet import fir_filter

FORMAT = "NVlabs"
ANCHORS = ("map_layer0.weight", "map_layer1.weight")
SETS = {"ema": "ema", "net": "online"}  # keys of a snapshot and of a training state
ROLES: dict[str, Role] = {"EDMPrecond": "teacher", "ECMPrecond": "consistency"}
"""The preconditioning classes whose scalings we have: EDM's, and ECT's with the boundary condition."""

TARGETS = {
    "SongUNet": "consistency.networks.song.SongUNet",
    "DhariwalUNet": "consistency.networks.dhariwal.DhariwalUNet",
}

SAME = (
    *("in_channels", "out_channels", "model_channels", "channel_mult", "channel_mult_emb"),
    *("dropout", "channel_mult_noise", "resample_filter"),
)
OTHER = {
    **{"img_resolution": "image_size", "num_blocks": "num_res_blocks"},
    "attn_resolutions": "attention_resolutions",
}
"""Arguments of the published constructors that ours have: under the same name, and theirs and ours."""

COMMON = {"label_dim": 0, "channel_mult_emb": 4, "dropout": 0.1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        **{"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4},
        **{"attn_resolutions": [16], "channel_mult_noise": 1, "resample_filter": [1, 1]},
        **{"embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard"},
    },
    "DhariwalUNet": {
        **{"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3},
        **{"attn_resolutions": [32, 16, 8]},
    },
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding_type": ("fourier_scale", {"positional": None, "fourier": 16.0}),
    "encoder_type": ("residual_input", {"standard": False, "residual": True}),
    "decoder_type": ("skip_output", {"standard": False, "skip": True}),
}
"""Kinds of a SongUNet that we have: their argument and ours, their values and ours."""


def open_content(content: Any, path: Path, hints: Hints) -> contents.Checkpoint | None:
    """Return the networks of a snapshot or a training state; None without any."""
    stored = content if isinstance(content, dict) else {}
    models = {
        name: model
        for key, name in SETS.items()
        if isinstance(model := stored.get(key), Object) and isinstance(model.state, dict)
    }
    if not models:
        return None
    card = card_of_module(models.get(hints.weights) or next(iter(models.values())))
    read = partial(module_weights, card.network)
    return contents.Checkpoint(path=path, format=FORMAT, card=card, sets=models, read=read)


def card_of_module(module: Object) -> ModelCard:
    """Return the card of a preconditioned network."""
    known = f"whose preconditioning is not one of {', '.join(ROLES)}"
    check(module.kind in ROLES, f"a model of class {module.kind}, {known}")
    inner: Any = part(module, "_modules").get("model")
    kind = inner.kind if isinstance(inner, Object) else brief(inner)
    check(kind in DEFAULTS, f"a network of class {kind}, which is not one of {', '.join(DEFAULTS)}")
    arguments = inner.state.get("_init_kwargs")
    check(isinstance(arguments, dict), "a network without its settings")
    role = ROLES[module.kind]
    process = replace(contents.PUBLISHED, sigma_data=float(module.state["sigma_data"]))
    if role == "consistency":
        process = replace(process, t_min=float(module.state["sigma_min"]))
    return card_of(settings(kind, arguments), role=role, process=process)


def card_of(network: dict[str, Any], **known: Any) -> ModelCard:
    """Return the card of a network; the second time point is that published for 64 x 64 or for CIFAR-10."""
    second = 1.526 if network["image_size"] == 64 else 0.821
    return contents.card_of(network, contents.C_NOISE_NVLABS, second_time=second, **known)


def module_weights(network: dict[str, Any], module: Object) -> StateDict:
    """Return the parameters and buffers of a preconditioned network."""
    return renamed(network, tensors_below(part(module, "_modules")["model"]))


def tensors_below(root: object) -> StateDict:
    """Return the parameters and buffers of a module by their dotted names. Refuse a module that stands in two places."""
    weights: dict[str, Any] = {}
    seen: set[int] = set()
    waiting = [("", root)]
    for prefix, inner in waiting:  # grows while it is walked
        new = id(inner) not in seen and prefix.count(".") <= 8
        check(new, "modules that contain each other")
        seen.add(id(inner))
        tensors = part(inner, "_parameters") | part(inner, "_buffers")
        weights |= {f"{prefix}{name}": v for name, v in tensors.items() if v is not None}
        modules = part(inner, "_modules").items()
        waiting += [(f"{prefix}{name}.", m) for name, m in modules if isinstance(m, Object)]
    return weights


def part(module: object, name: str) -> dict[str, Any]:
    """Return a dictionary in the state of a module."""
    found: Any = state_of(module).get(name)
    check(isinstance(found, dict), f"a module without its {name}")
    return found  # type: ignore[no-any-return]


def state_of(persistent: object) -> dict[str, Any]:
    """Return the attributes of a persistent object; none of anything else."""
    state = persistent.state if isinstance(persistent, Object) else None
    return state if isinstance(state, dict) else {}


def renamed(network: dict[str, Any], weights: StateDict) -> StateDict:
    """Return weights without the augmentation layer, and with the constant filters made anew."""
    taps = fir_filter(network.get("resample_filter", [1, 1]))
    return {
        name: taps if name.endswith("resample_filter") else value
        for name, value in weights.items()
        if name != "map_augment.weight"
    }


def settings(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the node of our network from the arguments of theirs."""
    theirs = COMMON | DEFAULTS[kind] | arguments
    require_images(kind, theirs["in_channels"], theirs["out_channels"])
    ours = {"_target_": TARGETS[kind], "num_classes": theirs["label_dim"] or None, "augment_dim": 0}
    ours |= {name: theirs[argument] for argument, name in OTHER.items()}
    ours |= {name: theirs[name] for name in SAME if name in theirs}
    if kind == "SongUNet":
        for name, (own, kinds) in KINDS.items():
            shown = f"{name}={brief(theirs[name])}, which is not one of {', '.join(kinds)}"
            check(theirs[name] in kinds, f"a SongUNet with {shown}")
            ours[own] = kinds[theirs[name]]
    return ours


def require_images(kind: str, channels: object, out: object) -> None:
    """Refuse a network whose output is not an image like its input."""
    sides = f"out_channels={brief(out)} for in_channels={brief(channels)}"
    check(channels == out, f"a {kind} with {sides}, which no consistency model has")


def open_state(weights: dict[str, Tensor], hints: Hints) -> wrapped.OpenedState:
    """Return the card of a state dict, with EDM's noise process; it does not record which scalings belong to it."""
    network, notes = settings_of(weights, hints)
    return card_of(network), notes, partial(renamed, network)


def settings_of(weights: StateDict, hints: Hints) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of our network, read off names (with the sides of feature maps) and shapes; and assumptions."""
    blocks = {*re.findall(r"^enc\.(\d+)x\d+_block(\d+)\.", "\n".join(weights), re.M)}
    sides = sorted({int(side) for side, _ in blocks}, reverse=True)
    halved = sides and sides == [sides[0] >> level for level in range(len(sides))]
    check(halved, "weights of another network than SongUNet and DhariwalUNet")
    top = f"{sides[0]}x{sides[0]}"
    kind = "DhariwalUNet" if "out_norm.weight" in weights else "SongUNet"
    stem = weights[f"enc.{top}_conv.weight"]
    last = "out_conv" if kind == "DhariwalUNet" else f"dec.{top}_aux_conv"
    require_images(kind, stem.shape[1], weights[f"{last}.weight"].shape[0])
    embedding, noise = weights["map_layer0.weight"].shape
    width = stem.shape[0] if kind == "SongUNet" else noise
    label = weights.get("map_label.weight")
    firsts = {side: f"enc.{side}x{side}_block0" for side in sides}
    ours: dict[str, Any] = {
        **{"_target_": TARGETS[kind], "image_size": sides[0], "model_channels": width},
        **{"in_channels": stem.shape[1], "out_channels": stem.shape[1]},
        "channel_mult": [weights[f"{b}.conv1.weight"].shape[0] // width for b in firsts.values()],
        "channel_mult_emb": embedding // width,
        "num_res_blocks": len(blocks) // len(sides),
        "attention_resolutions": [s for s, b in firsts.items() if f"{b}.qkv.weight" in weights],
        "num_classes": None if label is None else label.shape[1],
        **{"dropout": 0.0, "augment_dim": 0},
    }
    if kind == "DhariwalUNet":
        return ours, []
    ours["fourier_scale"] = 16.0 if "map_noise.freqs" in weights else None
    ours["residual_input"] = any(name.endswith("_aux_residual.weight") for name in weights)
    ours["skip_output"] = sum(name.endswith("_aux_norm.weight") for name in weights) > 1
    ours["channel_mult_noise"] = noise // width
    taps = next((v.shape[-1] for n, v in weights.items() if n.endswith("resample_filter")), None)
    wide = ours["residual_input"] if taps is None else taps == 4
    ours["resample_filter"] = [1, 3, 3, 1] if wide else [1, 1]
    note = f"assumes resample_filter={ours['resample_filter']} (the file does not record it)"
    return ours, [note] if taps is None and len(sides) > 1 else []
