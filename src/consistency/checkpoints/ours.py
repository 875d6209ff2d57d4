"""Our own checkpoints: tensors and a plain card. No code, no pickled class.

A run's checkpoint (`.ckpt`) is what Lightning saves, with `card` beside it. A converted model is `card` and `weights`;
safetensors and torch files of ours with a card beside the weights are read as such.
The card is the saved form of a `ModelCard`:

    role                consistency (f, samples in one step) or teacher (a denoiser D)
    network             `_target_` and arguments of the network
    preconditioning     `_target_` and arguments of the preconditioning
    process             sigma_data, t_min, t_max, rho, and `times`, the points of two-step sampling
    image               channels, size
    num_classes         number of classes or null
    class_names         their names, if the data has any
"""

from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from consistency.checkpoints import posthoc
from consistency.checkpoints.contents import Checkpoint, Hints, StateDict, check, unreadable
from consistency.checkpoints.pickle_reader import OPENAI, read_zip
from consistency.errors import UserError
from consistency.inference.card import ModelCard
from consistency.runtime.files import verify_checksum, written_whole

FORMAT = "ours"
EMA_CALLBACK = "EvaluationEMA"
"""The callback whose state in a run's checkpoint holds the averages of the network."""


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
    averages = content.get("callbacks", {}).get(EMA_CALLBACK, {}).get("averages", {})
    for name, average in averages.items():
        sets.setdefault("ema", average)
        sets[posthoc.set_name(name)] = average
    kind = OPENAI if content.get("format") == OPENAI else FORMAT
    card = ModelCard.parse(content["card"], path)
    weights = posthoc.Sets(sets, partial(posthoc.reconstruct, path, content.get("k", 0), averages))
    return Checkpoint(path=path, format=kind, card=card, weights=weights)


def read(path: Path) -> dict[str, Any]:
    """Return all that a run's checkpoint holds, checked against its checksum."""
    verify_checksum(path)
    try:
        content: dict[str, Any] = read_zip(path)
        known = isinstance(content, dict) and "card" in content
        check(known, "a checkpoint without a card of ours")
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise unreadable(path, error) from error
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
