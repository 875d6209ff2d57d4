"""NVlabs/edm and codes that grew from it (ECT): a pickle of whole modules with their settings and their source.

The source is not read. Names are those of our `SongUNet` and `DhariwalUNet`, c_noise = 0.25 ln t, and qkv stands in the
order (head, dim, three), as it does in ours. Augmentation layers are left out: without augmentation labels they add
nothing. `network-snapshot-*.pkl` holds the average of the weights, `training-state-*.pt` the weights in training.
"""

import re
from typing import Any

from torch import Tensor

from consistency.formats.opened import NVLABS, ContentError, Hints, Opened, describe, process
from consistency.formats.pickles import Object, told
from consistency.inference.card import Role
from consistency.networks.unet import fir_filter

FORMAT = "NVlabs"
ROLES: dict[str, Role] = {"EDMPrecond": "teacher", "ECMPrecond": "consistency"}
"""The preconditioning classes whose scalings we have: EDM's, and ECT's with the boundary condition."""

SHARED = {
    "img_resolution": "image_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "channel_mult_emb": "channel_mult_emb",
    "num_blocks": "num_res_blocks",
    "attn_resolutions": "attention_resolutions",
    "dropout": "dropout",
}
SONG = {"channel_mult_noise": "channel_mult_noise", "resample_filter": "resample_filter"}
"""Arguments of the published constructors -> ours."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
    },
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}
ANCHORS = ("map_layer0.weight", "map_layer1.weight")
"""Two names that every network has."""

KINDS = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "residual"),
    "decoder_type": ("standard", "skip"),
}
"""The kinds of a SongUNet that we have."""

COMMON = {"label_dim": 0, "augment_dim": 0, "channel_mult_emb": 4, "dropout": 0.1}


def is_nvlabs(content: object) -> bool:
    """Whether a file's content is a snapshot or a training state."""
    return isinstance(content, dict) and bool(held(content))


def held(content: dict[str, Any]) -> dict[str, Object]:
    """The model of a snapshot as `ema`, that of a training state as `online`."""
    names = {"ema": "ema", "net": "online"}
    found = {ours: content.get(key) for key, ours in names.items()}
    return {
        ours: module
        for ours, module in found.items()
        if isinstance(module, Object) and isinstance(module.state, dict)
    }


def open_module(module: Object) -> Opened:
    """One preconditioned network."""
    if module.kind == "Precond":
        raise ContentError("a model of class Precond, a network of EDM2, which is not built here")
    if module.kind not in ROLES:
        raise ContentError(
            f"a model of class {module.kind}, whose preconditioning is not one of {', '.join(ROLES)}"
        )
    state, inner = module.state, _part(module, "_modules").get("model")
    if not isinstance(inner, Object) or inner.kind not in DEFAULTS:
        kind = inner.kind if isinstance(inner, Object) else told(inner)
        raise ContentError(f"a network of class {kind}, which is not one of {', '.join(DEFAULTS)}")
    arguments = inner.state.get("_init_kwargs")
    if not isinstance(arguments, dict):
        raise ContentError("a network without its settings")
    network = settings(inner.kind, arguments)
    weights = {
        name: value
        for name, value in collect(inner).items()
        if name != "map_augment.weight" and not name.endswith("resample_filter")
    }
    weights |= fir_filters(inner, network.get("resample_filter", [1, 1]))
    role, second_time = ROLES[module.kind], 1.526 if network["image_size"] == 64 else 0.821
    t_min = float(state["sigma_min"]) if role == "consistency" else 0.002
    noise = process(sigma_data=float(state["sigma_data"]), t_min=t_min, second_time=second_time)
    card = describe(
        role=role,
        network=network,
        process=noise,
        c_noise_scale=NVLABS,
        num_classes=network["num_classes"],
    )
    return Opened(format=FORMAT, weights=weights, card=card)


def settings(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The node of our network from the arguments of theirs."""
    given = COMMON | DEFAULTS[kind] | arguments
    require_images(kind, given["in_channels"], given["out_channels"])
    names = SHARED | (SONG if kind == "SongUNet" else {})
    place = "song" if kind == "SongUNet" else "dhariwal"
    ours: dict[str, Any] = {"_target_": f"consistency.networks.{place}.{kind}"}
    ours |= {name: given[theirs] for theirs, name in names.items()}
    ours |= {"num_classes": given["label_dim"] or None, "augment_dim": 0}
    if kind == "SongUNet":
        for name, kinds in KINDS.items():
            if given[name] not in kinds:
                raise ContentError(
                    f"a SongUNet with {name}={told(given[name])}, which is not one of {', '.join(kinds)}"
                )
        ours["fourier_scale"] = 16.0 if given["embedding_type"] == "fourier" else None
        ours["residual_input"] = given["encoder_type"] == "residual"
        ours["skip_output"] = given["decoder_type"] == "skip"
    return ours


def require_images(kind: str, channels: object, out: object) -> None:
    """Refuses a network that gives something else than images like those it is given."""
    if channels != out:
        raise ContentError(
            f"a {kind} with out_channels={told(out)} for in_channels={told(channels)}, which no consistency model has"
        )


def open_state(weights: dict[str, Tensor], hints: Hints) -> Opened:
    """The network that a state dict belongs to, with EDM's noise process; which scalings belong to it is not in it."""
    network, notes = settings_of(weights, hints)
    filters = {
        name: fir_filter(network.get("resample_filter", [1, 1]))
        for name in weights
        if name.endswith("resample_filter")
    }
    own = {name: value for name, value in weights.items() if name != "map_augment.weight"}
    noise = process(second_time=1.526 if network["image_size"] == 64 else 0.821)
    card = describe(
        role=None,
        network=network,
        process=noise,
        c_noise_scale=NVLABS,
        num_classes=network["num_classes"],
    )
    return Opened(format=FORMAT, weights=own | filters, card=card, notes=tuple(notes))


def settings_of(weights: dict[str, Tensor], hints: Hints) -> tuple[dict[str, Any], list[str]]:
    """The arguments of our network for these weights, whose names hold the sides of the feature maps, and what had to be
    assumed.
    """
    blocks = {
        (int(side), int(number))
        for side, number in re.findall(r"^enc\.(\d+)x\d+_block(\d+)\.", "\n".join(weights), re.M)
    }
    sides = sorted({side for side, _ in blocks}, reverse=True)
    if not sides or sides != [sides[0] >> level for level in range(len(sides))]:
        raise ContentError("weights of another network than SongUNet and DhariwalUNet")
    top = f"{sides[0]}x{sides[0]}"
    kind = "DhariwalUNet" if "out_norm.weight" in weights else "SongUNet"
    stem = weights[f"enc.{top}_conv.weight"]
    last = "out_conv" if kind == "DhariwalUNet" else f"dec.{top}_aux_conv"
    require_images(kind, stem.shape[1], weights[f"{last}.weight"].shape[0])
    embedding, noise = weights["map_layer0.weight"].shape
    width = stem.shape[0] if kind == "SongUNet" else noise
    label = weights.get("map_label.weight")
    ours: dict[str, Any] = {
        "_target_": f"consistency.networks.{'song' if kind == 'SongUNet' else 'dhariwal'}.{kind}",
        "image_size": sides[0],
        "in_channels": stem.shape[1],
        "out_channels": stem.shape[1],
        "model_channels": width,
        "channel_mult": [
            weights[f"enc.{side}x{side}_block0.conv1.weight"].shape[0] // width for side in sides
        ],
        "channel_mult_emb": embedding // width,
        "num_res_blocks": len(blocks) // len(sides),
        "attention_resolutions": [
            side for side in sides if f"enc.{side}x{side}_block0.qkv.weight" in weights
        ],
        "dropout": 0.0,
        "num_classes": None if label is None else label.shape[1],
        "augment_dim": 0,
    }
    if kind == "DhariwalUNet":
        return ours, []
    ours["fourier_scale"] = 16.0 if "map_noise.freqs" in weights else None
    ours["residual_input"] = any(name.endswith("_aux_residual.weight") for name in weights)
    ours["skip_output"] = sum(name.endswith("_aux_norm.weight") for name in weights) > 1
    ours["channel_mult_noise"] = noise // width
    filters = (value for name, value in weights.items() if name.endswith("resample_filter"))
    found = next(filters, None)
    wide = ours["residual_input"] if found is None else found.shape[-1] == 4
    ours["resample_filter"] = [1, 3, 3, 1] if wide else [1, 1]
    notes = []
    if found is None and len(sides) > 1:
        notes.append(f"assumes resample_filter={ours['resample_filter']} (the file does not say)")
    return ours, notes


def _part(module: Object, name: str) -> dict[str, Any]:
    found = module.state.get(name)
    if not isinstance(found, dict):
        raise ContentError(f"a module without its {name}")
    return found


def modules(root: Object) -> dict[str, Object]:
    """All modules below `root` by their dotted names. Refuses a module that stands in two places."""
    found: dict[str, Object] = {}
    seen: set[int] = set()
    waiting = [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen or prefix.count(".") > 8:
            raise ContentError("modules that contain each other")
        seen.add(id(module))
        found[prefix] = module
        for name, child in _part(module, "_modules").items():
            if isinstance(child, Object):
                waiting.append((f"{prefix}{name}.", child))
    return found


def collect(root: Object) -> dict[str, Tensor]:
    """All parameters and buffers below `root` by their dotted names."""
    return {
        f"{prefix}{name}": value
        for prefix, module in modules(root).items()
        for part in ("_parameters", "_buffers")
        for name, value in _part(module, part).items()
        if value is not None
    }


def fir_filters(root: Object, taps: list[float]) -> dict[str, Tensor]:
    """The resampling filters, which are constants, in every place where the file has one."""
    return {
        f"{prefix}resample_filter": fir_filter(taps)
        for prefix, module in modules(root).items()
        if _part(module, "_buffers").get("resample_filter") is not None
    }
