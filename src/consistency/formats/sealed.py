"""safetensors files with a card: the form in which the project writes converted weights.

The metadata of the file hold the card as JSON and a SHA-256 over card and weights, so that a file that changed after
it was written is found out wherever it is copied to. Files of others have neither.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from consistency.formats.opened import ContentError
from consistency.inference.card import ModelCard

CARD, DIGEST = "consistency", "sha256"


def digest(card: str, weights: dict[str, Tensor]) -> str:
    """SHA-256 of a card and of all weights with their names, types and shapes."""
    found = hashlib.sha256(card.encode())
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        found.update(content)
    return found.hexdigest()


def write_sealed(path: Path, card: ModelCard, weights: dict[str, Tensor]) -> None:
    """Writes weights with their card: complete under another name first, then renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    text = json.dumps(card.saved(), sort_keys=True)
    part = path.with_name(f"{path.name}.part")
    save_file(own, part, metadata={"format": "pt", CARD: text, DIGEST: digest(text, own)})
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def read_sealed(path: Path) -> tuple[dict[str, Tensor], ModelCard | None]:
    """The tensors of a safetensors file and its card, None for a file of others. Refuses what has changed."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}
    if CARD not in metadata:
        return weights, None
    if digest(metadata[CARD], weights) != metadata.get(DIGEST):
        raise ContentError("a file that has changed since it was written, by its own checksum")
    card = json.loads(metadata[CARD])
    if not isinstance(card, dict):
        raise ContentError("a card that is not one")
    return weights, ModelCard.parse(card, path)
