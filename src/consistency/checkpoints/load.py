"""Checkpoints of any format -> models: find the file, verify and read it, build the denoiser."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consistency.checkpoints import diffusers, pretrained
from consistency.checkpoints.contents import Checkpoint, ContentError, Hints, unreadable
from consistency.checkpoints.detect import read_checkpoint
from consistency.checkpoints.safetensors import SEALED
from consistency.denoiser import Denoiser
from consistency.errors import UserError, require
from consistency.inference.card import LARGEST, MOST_CHARACTERS, MOST_LISTED, Role
from consistency.inference.model import Model
from consistency.runtime.files import expanded

NETWORKS = "consistency.networks."
PRECONDITIONING = "consistency.preconditioning."

CHECKPOINTS = "checkpoints"
NEXT, LAST, PREVIOUS = "next.ckpt", "last.ckpt", "previous.ckpt"
"""A run's checkpoints: the newest until it is renamed to `last`; the newest; the one before it."""

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors")
"""Suffixes of files of weights in a snapshot of the Hugging Face cache."""

ACCELERATE = ("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Weights in a folder of accelerate, besides `SEALED`."""


def load(
    checkpoint: str | os.PathLike[str],
    role: Role | None = None,
    *,
    weights: str = "ema",
    image_size: int | None = None,
    num_head_channels: int | None = None,
    attention_resolutions: Sequence[int] | None = None,
    num_heads: int | None = None,
    num_heads_upsample: int | None = None,
) -> Model:
    """Open a checkpoint of any format, on the CPU, in eval mode, without gradient.

        model = consistency.load("runs/my_run")
        images = model.sample(16, steps=2, seed=0)
        edited = model.edit(images, consistency.editing.colorize)

    checkpoint: a run folder, a file or folder of one of `consistency.checkpoints`, or a published name such as
        openai:cd_imagenet64_lpips.
    role: refuse any other; needed if the file does not record its role.
    weights: name of the set of weights, if the file holds several.

    The others are settings that some files do not record, see `Hints`. Raise `UserError` if the file is missing, damaged,
    of another role or no checkpoint.
    """
    heads = (num_head_channels, attention_resolutions, num_heads, num_heads_upsample)
    published = pretrained.RELEASED.get(str(checkpoint))
    hints = Hints(image_size, *heads, published.role if published else None, weights)
    return build_model(read_checkpoint(find(checkpoint), hints), weights, role)


def load_sets(
    checkpoint: str | os.PathLike[str], weights: Sequence[str] | None, *, role: Role | None = None
) -> list[Model]:
    """Open several sets of weights of a checkpoint, all if `weights` is None. The file is read once."""
    published = pretrained.RELEASED.get(str(checkpoint))
    content = read_checkpoint(find(checkpoint), Hints(role=published.role if published else None))
    return [build_model(content, name, role) for name in weights or content.names]


def load_teacher(path: str | None, *, weights: str) -> Denoiser:
    """Load the teacher of a distillation, `teacher=`."""
    require(
        path is not None,
        "a teacher to distil, teacher=<run folder or checkpoint>",
        "teacher=null",
        "train one on the same data with mode=edm and give its run folder",
    )
    assert path is not None
    return load(path, "teacher", weights=weights).denoiser


def load_initial(
    checkpoint: str, network: nn.Module, *, weights: str, c_noise_scale: float
) -> None:
    """Copy the weights of a checkpoint of any format and either role into a network of the same kind (`init=`).

    c_noise_scale: that of `network`; weights trained with another time input would load and be meaningless.
    """
    content = read_checkpoint(find(checkpoint), Hints(weights=weights))
    model = build_model(content, weights, content.card.role or "consistency")
    initial, own = model.denoiser.network.state_dict(), network.state_dict()
    require(
        {k: v.shape for k, v in initial.items()} == {k: v.shape for k, v in own.items()},
        "initial weights of the same network as model=",
        f"{content.path}, of another network",
        "choose the model= that wrote them, or init=null",
    )
    scale = content.card.preconditioning.get("c_noise_scale")
    require(
        scale is None or scale == c_noise_scale,
        f"initial weights of a network with time input {c_noise_scale} ln t",
        f"{content.path}, with {scale} ln t",
        f"set model.c_noise_scale={scale}",
    )
    network.load_state_dict(initial)


def find(checkpoint: str | os.PathLike[str]) -> Path:
    """Return the path of a checkpoint: a file, a folder of diffusers or of ours, the last checkpoint of a run folder, or
    the downloaded file of a published name.
    """
    if str(checkpoint).startswith(pretrained.PROGRAMS):
        return pretrained.fetch(str(checkpoint))
    path = Path(expanded(os.fspath(checkpoint)))
    if path.is_dir():
        path = find_inside(path)
    require(
        path.exists(),
        f"a run folder or a checkpoint file at {path}",
        "no such file",
        "check the path; it is relative to the folder in which the command runs",
    )
    return diffusers.folder_of(path) if path.name.startswith(diffusers.WEIGHTS) else path


def find_inside(folder: Path) -> Path:
    """Return the checkpoint in a folder, or the folder if it is a checkpoint itself."""
    path = snapshot(folder)
    if path.is_file() or (path / SEALED).is_file() or diffusers.is_diffusers(path):
        return path
    # A run that died while it renamed may have its newest checkpoint under the other name.
    names = (*ACCELERATE, f"{CHECKPOINTS}/{LAST}", f"{CHECKPOINTS}/{NEXT}")
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise UserError(
            f"a run folder with checkpoints/last.ckpt at {path}, or a diffusers folder",
            "a folder that is neither",
            "give a run folder that has trained, or a checkpoint file",
        )
    return file


def snapshot(path: Path) -> Path:
    """Return the newest revision in a folder of the Hugging Face cache (`models--...`), or its file if it is a single one.

    Return other folders as they are.
    """
    cached = (path / "refs").is_dir() or (path / "blobs").is_dir()
    if not cached or not (path / "snapshots").is_dir():
        return path
    folders = filter(Path.is_dir, (path / "snapshots").iterdir())
    revisions = {folder.name: folder for folder in sorted(folders, key=os.path.getmtime)}
    refs = sorted(filter(Path.is_file, (path / "refs").rglob("*")), key=os.path.getmtime)[::-1]
    refs.sort(key=lambda ref: ref != path / "refs" / "main")
    hashes = [ref.read_text()[:100].strip() for ref in refs]
    name = next((name for name in (*hashes, *reversed(revisions)) if name in revisions), None)
    if name is None:
        raise UserError(f"a snapshot in {path / 'snapshots'}", "none", "download the model again")
    print(f"{path.name}: takes the snapshot {name}", file=sys.stderr)
    revision = revisions[name]
    files = [p for p in revision.iterdir() if p.is_file() and p.suffix in SUFFIXES]
    return files[0] if len(files) == 1 and not diffusers.is_diffusers(revision) else revision


def build_model(checkpoint: Checkpoint, weights: str, role: Role | None) -> Model:
    """Build the denoiser of a checkpoint with the set of weights of that name. `role` is as in `load`.

    The weights must be complete, of the right shapes and finite. The network is built without memory first: settings of
    any size cost nothing until the weights agree with them.
    """
    card, sets = checkpoint.card, checkpoint.weights
    if card.role is None or role not in (None, card.role):
        card = card.with_role(role, checkpoint.path)
    name = next(iter(sets)) if weights == "ema" and len(sets) == 1 else weights
    known = f"weights among {', '.join(sets)}"
    require(name in sets, known, weights, "choose one of those that this checkpoint holds")
    try:
        state, settings = sets[name], card.network
        for key, value in state.items():
            numbers = isinstance(value, Tensor) and value.is_floating_point()
            if not numbers or not value.isfinite().all():
                raise ContentError(f"weights {key[:80]} that are not all finite floating numbers")
        if max(settings.get("num_res_blocks", 0), settings.get("depth", 0)) > len(state):
            raise ContentError("a network with more blocks than it has weights")
        with torch.device("meta"):
            network: nn.Module = build(settings, NETWORKS, nn.Module)
        needs, has = (
            {k: tuple(v.shape) for k, v in x.items()} for x in (network.state_dict(), state)
        )
        for key in [*needs, *has]:
            if needs.get(key) != has.get(key):
                shapes = f"{has.get(key, ())}, where its network has {needs.get(key, ())}"
                raise ContentError(f"weights {key[:80]} of shape {shapes}")
        channels, out = settings.get("in_channels"), settings.get("out_channels")
        if out not in (None, channels):
            raise ContentError(f"a network with out_channels={out} for in_channels={channels}")
        own = {key: value.detach().float().contiguous() for key, value in state.items()}
        network.load_state_dict(own, assign=True)
        denoiser = Denoiser(network, build(card.preconditioning, PRECONDITIONING, object))
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise unreadable(checkpoint.path, error) from error
    denoiser.eval().requires_grad_(False)
    return Model(denoiser, card, checkpoint.path, weights, checkpoint.format)


def build(node: dict[str, Any], package: str, base: type) -> Any:
    """Build a node of a card: a class `base` that is defined in `package`, with plain arguments. Refuse all else."""
    arguments = dict(node)
    target = arguments.pop("_target_", None)
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    part = None
    if f"{module}.".startswith(package):
        with suppress(ImportError):
            part = getattr(import_module(module), name, None)
    lists = [v if isinstance(v, list | tuple) else [v] for v in arguments.values()]
    values = [value for listed in lists for value in listed]
    texts = [value for value in values if isinstance(value, str)]
    require(
        isinstance(part, type)
        and issubclass(part, base)
        and part.__module__ == module
        and all(len(listed) <= MOST_LISTED for listed in lists)
        and all(isinstance(value, int | float | str | None) for value in values)
        and all(abs(value) <= LARGEST for value in values if isinstance(value, int | float))
        and not any(len(text) > MOST_CHARACTERS or "${" in text for text in texts),
        f"a class of {package[:-1]} with plain arguments in the checkpoint's card",
        str(target)[:120] if isinstance(target, str) else type(target).__name__,
        "do not use this file unless you know who wrote it",
    )
    assert callable(part)
    return part(**arguments)
