"""Our own checkpoints: tensors and a plain card. No code, no pickled class.

A run's checkpoint (`.ckpt`) is what Lightning saves, with `card` beside it; other torch files have `card` and `weights`. A
converted model is a safetensors file, whose metadata hold the card as JSON and a SHA-256 over card and weights: a file
that changed is recognised wherever it is copied to. The card is what `ModelCard.saved` returns.

A run keeps its checkpoints next, last and previous, and on request one every n steps. A whole one exists at whatever moment the process dies.
"""

import hashlib
import json
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes

from consistency.checkpoints import posthoc
from consistency.checkpoints.contents import Checkpoint, Hints, StateDict, check, checking
from consistency.checkpoints.pickle_reader import OPENAI, read_zip
from consistency.errors import require
from consistency.inference.card import ModelCard
from consistency.runtime import files

FORMAT = "ours"
SEALED = "model.safetensors"
"""The weights in a folder that we wrote."""

CARD, DIGEST = "consistency", "sha256"
"""Names of the card and of the checksum in the metadata of a safetensors file."""

CHECKPOINTS = "checkpoints"
NEXT, LAST, PREVIOUS = "next.ckpt", "last.ckpt", "previous.ckpt"
"""A run's checkpoints: the newest until it is renamed to `last`; the newest; the one before it."""
KEPT = re.compile(r"step_(\d{7,})\.ckpt")
"""Names of the checkpoints that a run keeps beside these, with their optimizer step."""


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
        sets[name if name.startswith(posthoc.POWER) else f"ema:{name}"] = average
    return Checkpoint(
        path=path,
        format=OPENAI if content.get("format") == OPENAI else FORMAT,
        card=ModelCard.parse(content["card"], path),
        sets=sets,
        reconstruct=partial(posthoc.reconstruct, sets, path, content.get("k", 0)),
    )


def read(path: Path) -> dict[str, Any]:
    """Return all that a run's checkpoint holds, checked against its checksum."""
    files.verify_checksum(path)
    with checking(path):
        content: dict[str, Any] = read_zip(path)
        known = isinstance(content, dict) and "card" in content
        check(known, "a checkpoint without a card of ours")
    return content


def write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its checksum, whole or not at all. Raise OSError if that fails."""
    with files.written_whole(path, checksum=True) as file:
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
    with files.written_whole(path) as file:
        metadata = {"format": "pt", CARD: text, DIGEST: digest(text, own)}
        file.write(safetensors_bytes(own, metadata))  # `save_file` would replace the file, unsynced


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


def promote(folder: Path) -> None:
    """Rename next to last, and last to previous; a second call completes an interrupted first."""
    if (folder / NEXT).is_file():
        if (folder / LAST).is_file():
            files.move(folder / LAST, folder / PREVIOUS)
        files.move(folder / NEXT, folder / LAST)


def kept_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint that a run keeps of an optimizer step."""
    return folder / f"step_{step:07d}.ckpt"


def kept(folder: Path) -> dict[int, Path]:
    """Return the checkpoints that a run has kept in the folder, by optimizer step in rising order."""
    found = {int(m[1]): p for p in folder.glob("step_*.ckpt") if (m := KEPT.fullmatch(p.name))}
    return dict(sorted(found.items()))


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint and its content, or None if there is no checkpoint.

    Raises `UserError` if all are damaged. Changes nothing, so every process of a run chooses the same one.
    """
    paths = [folder / name for name in (NEXT, LAST, PREVIOUS) if (folder / name).is_file()]
    for path in paths:
        with suppress(Exception):  # a damaged file can fail in any way
            files.verify_checksum(path)
            return path, torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    require(
        not paths,
        f"a checkpoint in {folder} as it was written",
        f"{' and '.join(path.name for path in paths)}, damaged",
        "begin a new run; init= may start it from a best.ckpt or another run",
    )
    return None


def settle(start: Path) -> None:
    """Make the checkpoint that `newest` returned the last of a resumed run, and remove the leftovers of a dead process."""
    folder = start.parent
    if start.name == NEXT:
        promote(folder)
    if start.name == PREVIOUS and (folder / LAST).is_file():
        # The damaged last must not become the previous of the next one, in the place of a whole checkpoint.
        (folder / LAST).replace(folder / "damaged.ckpt")
        files.checksum_path(folder / LAST).unlink(missing_ok=True)
    for file in (folder / LAST, folder / PREVIOUS):
        if file.is_file() and not files.checksum_path(file).is_file():
            files.write_checksum(file, files.fingerprint(file))
    for left in (folder / NEXT, files.checksum_path(folder / NEXT), *folder.glob("*.part")):
        left.unlink(missing_ok=True)
