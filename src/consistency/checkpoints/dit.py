"""MeanFlow's diffusion transformer as PyTorch code saves it: a state dict under the names of DiT, with the embedding of a second time.

Names are those of our `DiT`, which is told t - r. DiT and SiT have the names but for `r_embedder`, and shapes that do not
differ; one predicts noise at t of 0..999, the other the velocity of a time that runs backwards, so neither opens.
"""

import math
from typing import Any

from torch import Tensor

from consistency.checkpoints import wrapped
from consistency.checkpoints.contents import Hints, StateDict, assumes, check
from consistency.inference.card import ModelCard, Process

FORMAT = "MeanFlow (PyTorch)"
ANCHORS = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight")
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Width -> attention heads of the published sizes S, B, L and XL."""

FLOW = Process(sigma_data=0.5, t_min=0.0, t_max=1.0, rho=1.0, times=(1.0, 0.5))


def open_state(weights: dict[str, Tensor], hints: Hints) -> wrapped.OpenedState:
    """Return card and assumptions for a flat state dict; the names are ours already."""
    network, notes = settings(weights, hints)
    card = ModelCard(
        role="consistency",
        network=network,
        preconditioning={"_target_": "consistency.preconditioning.RectifiedFlow"},
        process=FLOW,
        channels=network["in_channels"],
        image_size=network["image_size"],
        num_classes=network["num_classes"],
    )
    return card, notes, lambda state: state


def settings(weights: StateDict, hints: Hints) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of `DiT` for these weights, and the assumptions made."""
    of_two = "r_embedder.mlp.0.weight" in weights
    check(of_two, "a DiT or SiT of one time, whose time and output are in neither of our processes")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    side = math.isqrt(weights["pos_embed"].shape[1])
    known, classes = HEADS.get(width), weights.get("y_embedder.embedding_table.weight")
    heads = hints.num_heads or known or max(width // 64, 1)
    assumed = hints.num_heads is None and known is None
    network = {
        **{"_target_": "consistency.networks.dit.DiT", "image_size": side * patch},
        **{"in_channels": channels, "patch_size": patch, "hidden_size": width},
        "depth": len({n.split(".")[1] for n in weights if n.startswith("blocks.")}),
        "num_heads": heads,
        "num_classes": None if classes is None else len(classes) - 1,
        "learn_sigma": len(weights["final_layer.linear.weight"]) == 2 * channels * patch**2,
        "second_time": "gap",
    }
    return network, [assumes(f"{heads} attention heads", "num_heads=")] if assumed else []
