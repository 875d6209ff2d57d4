"""safetensors files with a card: the form in which the project writes converted weights.

The metadata hold the card as JSON, and a SHA-256 over card and weights: a file that changed is recognised wherever it
is copied to. Files of other programs have neither.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from consistency.checkpoints.contents import StateDict, check
from consistency.inference.card import ModelCard
from consistency.runtime.files import written_whole

SEALED = "model.safetensors"
"""The weights in a folder that we wrote."""

CARD, DIGEST = "consistency", "sha256"
"""Names of the card and of the checksum in the metadata."""


def digest(card: str, weights: StateDict) -> str:
    """Return the SHA-256 of a card and of all weights with their names, types and shapes."""
    total = hashlib.sha256(card.encode())
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        total.update(content)
    return total.hexdigest()


def write_sealed(path: Path, card: ModelCard, weights: StateDict) -> None:
    """Write weights with their card, whole or not at all."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    text = json.dumps(card.saved(), sort_keys=True)
    with written_whole(path) as file:
        metadata = {"format": "pt", CARD: text, DIGEST: digest(text, own)}
        save_file(own, file.name, metadata=metadata)


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file; `card` and `weights` if it has a card. Refuse a changed file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}
    if CARD not in metadata:
        return weights
    same = digest(metadata[CARD], weights) == metadata.get(DIGEST)
    check(same, "a file that has changed since it was written, by its own checksum")
    card = json.loads(metadata[CARD])
    check(isinstance(card, dict), "a card that is not one")
    return {"card": card, "weights": weights}


def read_card(path: Path) -> dict[str, Any] | None:
    """Return the card of a safetensors file, not yet checked against its weights; None for other programs' files."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    card: dict[str, Any] | None = json.loads(metadata.get(CARD, "null"))
    return card
