"""Checkpoints: tensors plus a plain card that says how to build the denoiser. No code, no pickled class.

The card of a checkpoint is a dictionary of plain values:

    role                consistency (f, samples in one step) or teacher (a denoiser D)
    network             `_target_` and arguments of the network
    preconditioning     `_target_` and arguments of the preconditioning that samples are drawn with
    process             sigma_data, t_min, t_max, rho, and `times`, the points of two-step sampling
    image               channels, size
    num_classes         number of classes or null
"""

import hashlib
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from consistency.denoiser import Denoiser
from consistency.errors import UserError, require

Role = Literal["teacher", "consistency"]
NETWORKS = "consistency.networks."
PRECONDITIONING = "consistency.preconditioning."


@dataclass(frozen=True)
class Loaded:
    """A denoiser read from a file, with its card and the path and weights it came from."""

    denoiser: Denoiser
    card: dict[str, Any]
    path: Path
    weights: str


def checksum_path(path: Path) -> Path:
    """Where the SHA-256 of a checkpoint stands."""
    return path.with_name(f"{path.name}.sha256")


def write(content: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint and its checksum: complete under another name first, then renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    torch.save(content, part)
    with part.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    checksum_path(path).unlink(missing_ok=True)
    part.replace(path)
    checksum_path(path).write_text(f"{digest}  {path.name}\n")


def find(checkpoint: str | os.PathLike[str]) -> Path:
    """The checkpoint file that a path names: the file itself, or the `last` of a run folder."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        inside = path / "checkpoints" / "last.ckpt"
        require(
            inside.is_file(),
            f"a run folder with checkpoints/last.ckpt at {path}",
            "a folder without it",
            "give a run folder that has trained, or a checkpoint file",
        )
        return inside
    require(
        path.is_file(),
        f"a run folder or a checkpoint file at {path}",
        "nothing there",
        "check the path; it is taken relative to the folder the command runs in",
    )
    return path


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of ours, checked against its checksum where that stands beside it."""
    beside = checksum_path(path)
    if beside.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        require(
            beside.read_text().split()[:1] == [digest],
            f"{path} as it was written (its checksum is in {beside.name})",
            "a file that has changed or is damaged",
            "take previous.ckpt or best.ckpt beside it",
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way inside the reader
        raise UserError(
            f"expected a checkpoint of this project at {path}\n"
            f"  got: a file that cannot be read ({type(error).__name__})\n"
            "  do: check that it is complete, or take previous.ckpt or best.ckpt beside it"
        ) from error
    require(
        isinstance(content, dict) and isinstance(content.get("card"), dict),
        f"a checkpoint of this project at {path}, with its card",
        "a file without one",
        "give a checkpoint that src/train.py wrote",
    )
    return content


def build(node: dict[str, Any], package: str, base: type) -> Any:
    """Instantiates a node of a card; only a class `base` that is defined in `package` is let in."""
    target = node.get("_target_")
    module, _, name = str(target).rpartition(".")
    known = f"{module}.".startswith(package) and all(p.isidentifier() for p in module.split("."))
    try:
        found = getattr(import_module(module), name, None) if known else None
    except ImportError:
        found = None
    allowed = isinstance(found, type) and issubclass(found, base) and found.__module__ == module
    plain = all(isinstance(v, int | float | str | list | None) for v in node.values())
    require(
        allowed and plain and "${" not in str(node),
        f"a class of {package[:-1]} with plain arguments in the checkpoint's card",
        target,
        "do not use this file unless you know who wrote it",
    )
    return instantiate(node, _convert_="all")


def select_weights(content: dict[str, Any], weights: str) -> dict[str, Tensor]:
    """The network's weights by name: online, target, ema (the first average) or ema:<decay>."""
    state: dict[str, Tensor] = content["state_dict"]
    available: dict[str, dict[str, Tensor]] = {}
    for role in ("online", "target"):
        prefix = f"{role}.network."
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if found:
            available[role] = found
    averages = content.get("callbacks", {}).get("EvaluationEMA", {}).get("averages", {})
    for decay, average in averages.items():
        available.setdefault("ema", average)
        available[f"ema:{decay}"] = average
    require(
        weights in available,
        f"weights among {', '.join(available)}",
        weights,
        "choose one of those that this checkpoint holds",
    )
    return available[weights]


def load(
    checkpoint: str | os.PathLike[str], *, weights: str = "ema", role: Role | None = None
) -> Loaded:
    """The denoiser of a run folder or checkpoint file, on the CPU, in eval mode, without gradient.

    role: what it must be; None accepts either. Raises `UserError` where the file is missing, damaged or of another role.
    """
    path = find(checkpoint)
    content = read(path)
    card = content["card"]
    require(
        role is None or card["role"] == role,
        f"a {role} checkpoint",
        f"{path}, a {card['role']} checkpoint",
        "train a teacher with mode=edm" if role == "teacher" else "give a consistency model",
    )
    network: nn.Module = build(card["network"], NETWORKS, nn.Module)
    network.load_state_dict(select_weights(content, weights))
    denoiser = Denoiser(network, build(card["preconditioning"], PRECONDITIONING, object))
    return Loaded(denoiser.eval().requires_grad_(False), card, path, weights)


def load_teacher(path: str | None, *, weights: str) -> Denoiser:
    """The teacher denoiser of a distillation, named by `teacher=`."""
    require(
        path is not None,
        "a teacher to distil, teacher=<run folder or checkpoint>",
        "teacher=null",
        "train one on the same data with mode=edm and give its run folder",
    )
    return load(str(path), weights=weights, role="teacher").denoiser
