"""Our own checkpoints: tensors and a plain card. No code, no pickled class.

A run's checkpoint (`.ckpt`) is what Lightning saves, with `card` beside it; other torch files have `card` and `weights`. A
converted model is a safetensors file, whose metadata hold the card as JSON and a SHA-256 over card and weights: a file
that changed is recognised wherever it is copied to. The card is what `ModelCard.saved` returns.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from consistency.checkpoints import posthoc
from consistency.checkpoints.contents import Checkpoint, Hints, StateDict, check, checking
from consistency.checkpoints.pickle_reader import OPENAI, read_zip
from consistency.inference.card import ModelCard
from consistency.runtime.files import verify_checksum, written_whole

FORMAT = "ours"
SEALED = "model.safetensors"
"""The weights in a folder that we wrote."""

CARD, DIGEST = "consistency", "sha256"
"""Names of the card and of the checksum in the metadata of a safetensors file."""


def open_content(content: Any, path: Path, hints: Hints) -> Checkpoint | None:
    """Return the model: `online`, `target`, `ema:<decay>`, `power:<width>` of a run, and `ema`, its first average."""
    if not isinstance(content, dict) or not isinstance(content.get("card"), dict):
        return None
    sets: dict[str, StateDict] = {}
    if isinstance(content.get("weights"), dict):
        sets["ema"] = content["weights"]
    state = content.get("state_dict", {})
    for role in ("online", "target"):
        prefix = f"{role}.network."
        network = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if network:
            sets[role] = network
    averages = content.get("callbacks", {}).get("EvaluationEMA", {}).get("averages", {})
    for name, average in averages.items():
        sets.setdefault("ema", average)
        sets[posthoc.set_name(name)] = average
    return Checkpoint(
        path=path,
        format=OPENAI if content.get("format") == OPENAI else FORMAT,
        card=ModelCard.parse(content["card"], path),
        sets=posthoc.Sets(sets, partial(posthoc.reconstruct, path, content.get("k", 0), averages)),
    )


def read(path: Path) -> dict[str, Any]:
    """Return all that a run's checkpoint holds, checked against its checksum."""
    verify_checksum(path)
    with checking(path):
        content: dict[str, Any] = read_zip(path)
        known = isinstance(content, dict) and "card" in content
        check(known, "a checkpoint without a card of ours")
    return content


def write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its checksum, whole or not at all. Raise OSError if that fails."""
    with written_whole(path, checksum=True) as file:
        save(content, file)


def save(content: dict[str, Any], file: IO[bytes]) -> None:
    """Save by torch, which hides the OSError of a failed write behind its own error; raise that OSError."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


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
    return {"card": json.loads(metadata[CARD]), "weights": weights}


def read_card(path: Path) -> dict[str, Any] | None:
    """Return the card of a safetensors file, not yet checked against its weights; None for other programs' files."""
    with safe_open(path, framework="pt") as file:
        card: dict[str, Any] | None = json.loads((file.metadata() or {}).get(CARD, "null"))
    return card
