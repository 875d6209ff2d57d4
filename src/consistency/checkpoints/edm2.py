"""NVlabs/edm2 [Karras et al. 2024, arXiv:2312.02696]: a pickle of a preconditioned network with its encoder and its loss.

The source is not read. Names and rows of qkv are those of our network, and c_noise = 0.25 ln t. Weights are stored in half
precision and computed with in float32. Snapshots of a training and the averages that `reconstruct_phema.py` writes have the
same form, and so do those of ECT's branch for ImageNet, whose networks are consistency models with the scalings of EDM.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints import contents, nvlabs
from consistency.checkpoints.contents import Hints, Object, StateDict, brief, check
from consistency.inference.card import LatentSpace, ModelCard, Role
from consistency.latents import EDM2

FORMAT = "NVlabs EDM2"
KIND = "Precond"
"""The class of the preconditioned network; those of EDM have other names."""

ROLES: dict[str, Role] = {"EDM2Loss": "teacher", "ECMLoss": "consistency"}
"""The losses that such networks are trained with."""

POSITIONS = (
    "img_resolution",
    "img_channels",
    "label_dim",
    "use_fp16",
    "sigma_data",
    "logvar_channels",
)
"""Arguments of the published constructor that may stand without a name, in their order."""

ARGUMENTS: dict[str, tuple[str, Any]] = {
    "img_resolution": ("image_size", None),
    "img_channels": ("in_channels", None),
    "label_dim": ("num_classes", 0),
    "model_channels": ("model_channels", 192),
    "channel_mult": ("channel_mult", [1, 2, 3, 4]),
    "channel_mult_noise": ("channel_mult_noise", None),
    "channel_mult_emb": ("channel_mult_emb", None),
    "num_blocks": ("num_res_blocks", 3),
    "attn_resolutions": ("attention_resolutions", [16, 8]),
    "channels_per_head": ("num_head_channels", 64),
    "dropout": ("dropout", 0.0),
    "dropout_res": ("dropout_resolution", None),
    "label_balance": ("label_balance", 0.5),
    "concat_balance": ("concat_balance", 0.5),
    "res_balance": ("res_balance", 0.3),
    "attn_balance": ("attn_balance", 0.3),
    "clip_act": ("clip_act", 256),
    "resample_filter": ("resample_filter", [1, 1]),
}
"""Arguments of the published constructor: ours and their default."""

OUTSIDE = ("use_fp16", "sigma_data", "logvar_channels")
"""Arguments that the network itself does not take."""


def open_content(content: Any, path: Path, hints: Hints) -> contents.Checkpoint | None:
    """Return the network of a snapshot; None for a file of another program."""
    stored = content if isinstance(content, dict) else {}
    model = stored.get("ema")
    if not isinstance(model, Object) or model.kind != KIND:
        return None
    check(isinstance(model.state, dict), "a network without its state")
    loss, sets = stored.get("loss_fn"), {"ema": model}
    kind = loss.kind if isinstance(loss, Object) else "EDM2Loss"
    check(
        kind in ROLES,
        f"a network of EDM2 trained with {kind}, which is not one of {', '.join(ROLES)}",
    )
    card = card_of(model, ROLES[kind])
    latents, notes = space_of(stored.get("encoder"), card)
    card = replace(card, latents=latents)
    return contents.Checkpoint(
        path=path, format=FORMAT, card=card, sets=sets, read=weights, notes=notes
    )


def card_of(model: Object, role: Role) -> ModelCard:
    """Return the card of a preconditioned network, with the scalings of EDM in either role."""
    given, named = (model.state.get(name) for name in ("_init_args", "_init_kwargs"))
    plain = isinstance(given, tuple) and isinstance(named, dict) and len(given) <= len(POSITIONS)
    check(plain, "a network without its settings")
    network = settings(dict(zip(POSITIONS, given, strict=False)) | named)
    sigma_data = model.state.get("sigma_data")
    known = type(sigma_data) in (int, float) and sigma_data > 0
    check(known, f"a network of EDM2 with sigma_data={brief(sigma_data)}")
    process = replace(contents.PUBLISHED, sigma_data=float(sigma_data))
    return replace(nvlabs.card_of(network, role="teacher", process=process), role=role)


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node of our network from the arguments of theirs."""
    unknown = [name for name in given if name not in ARGUMENTS and name not in OUTSIDE]
    check(
        not unknown,
        f"a network of EDM2 with {', '.join(map(brief, unknown[:3]))}, which ours lacks",
    )
    sizes = [given.get(name) for name in ("img_resolution", "img_channels")]
    sized = all(type(size) is int for size in sizes)
    check(sized, "a network of EDM2 without img_resolution and img_channels")
    ours = {own: given.get(name, default) for name, (own, default) in ARGUMENTS.items()}
    target = "consistency.networks.edm2.EDM2"
    return {"_target_": target, **ours, "num_classes": ours["num_classes"] or None}


def space_of(encoder: Any, card: ModelCard) -> tuple[LatentSpace | None, list[str]]:
    """Return the latents that a network draws, None for pixels in [-1, 1]; and a note on those of an unknown scaling."""
    kind = encoder.kind if isinstance(encoder, Object) else brief(encoder)
    if kind in ("StandardRGBEncoder", "None"):
        return None, []
    check(kind == "StabilityVAEEncoder", f"a network of EDM2 behind an encoder of class {kind}")
    name: Any = nvlabs.state_of(encoder).get("vae_name")
    check(isinstance(name, str), "an encoder without its vae_name")
    scale, shift = (_channels(encoder, part) for part in ("scale", "bias"))
    known = (EDM2.factor, EDM2.shift)
    if all(_same(*pair) for pair in zip((scale, shift), known, strict=True)):
        sides = {"channels": 3, "image_size": 8 * card.image_size}
        return LatentSpace(autoencoder=name, sha256=None, scaling="edm2", **sides), []
    note = f"draws {scale.tolist()} y + {shift.tolist()} of latents y of {brief(name)}, which nothing decodes"
    return None, [note]


def _channels(encoder: Object, name: str) -> Tensor:
    """Return a number for each channel."""
    array = nvlabs.state_of(encoder).get(name)
    values: Any = array.state if isinstance(array, Object) else None
    known = isinstance(values, Tensor) and values.ndim == 1 and len(values) <= 64
    check(known, f"an encoder without its {name}")
    return values.float()  # type: ignore[no-any-return]


def _same(given: Tensor, known: Tensor) -> bool:
    return given.shape == known.flatten().shape and torch.allclose(
        given, known.flatten(), rtol=1e-5
    )


def weights(model: Object) -> StateDict:
    """Return the parameters and buffers of the network F, without those of the learned weighting of its loss."""
    return nvlabs.tensors_below(nvlabs.part(model, "_modules").get("unet"))
