"""Checkpoints of any format -> models: find the file, verify and read it, build the denoiser."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from consistency.checkpoints import (
    diffusers,
    dit,
    edm2,
    hub,
    jcm,
    nvlabs,
    openai,
    ours,
    pretrained,
    wrapped,
)
from consistency.checkpoints.contents import Checkpoint, ContentError, Hints, check, checking
from consistency.checkpoints.pickle_reader import read_pickle, read_zip
from consistency.checkpoints.posthoc import POSTHOC, POWER
from consistency.denoiser import Denoiser
from consistency.errors import UserError, require
from consistency.inference.autoencoder import moved
from consistency.inference.card import LARGEST, MOST_CHARACTERS, MOST_LISTED, Role
from consistency.inference.model import Model
from consistency.runtime.files import expanded, verify_checksum

NETWORKS = "consistency.networks."
PRECONDITIONING = "consistency.preconditioning."

CONTAINERS: dict[bytes, Callable[[Path], Any]] = {
    rb"PK\x03\x04": read_zip,
    rb".{4}\0{4}\{": ours.read_sealed,
    rb"\x80[\x02-\x05]": read_pickle,
    rb"\{": diffusers.read_shards,
    rb"[\x81-\x8f\xde\xdf]": jcm.read_messagepack,
}
"""First bytes of a file -> the reader of its container. A safetensors file begins with a length and a brace."""

STATE_DICTS = (nvlabs, openai, diffusers, dit)
"""Formats of state dicts, in the order in which a content is offered to them."""


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
    autoencoder: str | None = None,
) -> Model:
    """Open a checkpoint of any format, on the CPU, in eval mode, without gradient.

        model = consistency.load("runs/my_run")
        images = model.sample(16, steps=2, seed=0)
        edited = model.edit(images, consistency.editing.colorize)

    checkpoint: a run folder, a file or folder of one of `consistency.checkpoints`, a published name such as
        openai:cd_imagenet64_lpips, or hf:<user>/<name> on the Hugging Face Hub, perhaps with @<revision>.
    role: refuse any other; needed if the file does not record its role.
    weights: name of the set of weights, if the file holds several.
    autoencoder: folder or name of that of a model of latents, if it is no longer where the card has it.

    The others are settings that some files do not record, see `Hints`. Raise `UserError` if the file is missing, damaged,
    of another role or no checkpoint.
    """
    heads = (num_head_channels, attention_resolutions, num_heads, num_heads_upsample)
    opened = read(checkpoint, Hints(image_size, *heads, weights))
    return build_model(opened, weights, role, autoencoder)


def load_sets(
    checkpoint: str | os.PathLike[str],
    weights: Sequence[str] | None,
    *,
    role: Role | None = None,
    autoencoder: str | None = None,
) -> list[Model]:
    """Open several sets of weights of a checkpoint, all if `weights` is None. The file is read once."""
    content = read(checkpoint, Hints())
    averages = [name for name in content.sets if name.startswith(("ema:", POWER))]
    names = [name for name in content.sets if name != "ema" or not averages]
    return [build_model(content, name, role, autoencoder) for name in weights or names]


def load_teacher(
    path: str | None, *, weights: str, hints: Mapping[str, Any] | None = None
) -> Denoiser:
    """Load the teacher of a distillation, `teacher=`. hints: settings that its file does not hold, see `Hints`."""
    expected = "a teacher to distil, teacher=<run folder or checkpoint>"
    return _opened(path, Hints.parse(hints, weights), "teacher", expected, "edm")


def load_first_stage(
    path: str | None, *, weights: str, hints: Mapping[str, Any] | None = None
) -> Denoiser:
    """Load the consistency model that a second stage goes on with, `teacher=`. hints: as of a teacher."""
    expected = "the first stage, teacher=<run folder or checkpoint of a consistency model>"
    return _opened(path, Hints.parse(hints, weights), "consistency", expected, "ect")


def _opened(path: str | None, hints: Hints, role: Role, expected: str, mode: str) -> Denoiser:
    """Open the checkpoint of `teacher=`, which a run of `mode` leaves; refuse null."""
    if path is None:
        remedy = f"train one on the same data with mode={mode} and give its run folder"
        raise UserError(expected, "teacher=null", remedy)
    return build_model(read(path, hints), hints.weights, role).denoiser


def load_initial(
    checkpoint: str,
    network: nn.Module,
    *,
    weights: str,
    c_noise_scale: float,
    hints: Mapping[str, Any] | None = None,
) -> None:
    """Copy the weights of a checkpoint of any format and either role into a network of the same kind (`init=`).

    c_noise_scale: that of `network`; weights trained with another time input would load and be meaningless.
    hints: settings that the file does not hold, see `Hints`.
    """
    content = read(checkpoint, Hints.parse(hints, weights))
    model = build_model(content, weights, content.card.role or "consistency")
    initial = model.denoiser.network.state_dict()
    shapes, own = ({k: v.shape for k, v in x.items()} for x in (initial, network.state_dict()))
    require(
        shapes == own,
        "initial weights of the same network as model=",
        f"{content.path}, of another network",
        "choose the model= that wrote them, or init=null",
    )
    given, heads = (attention_heads(part) for part in (model.denoiser.network, network))
    require(
        given == heads,
        f"initial weights of a network with {heads} attention heads, as model= has",
        f"{content.path}, with {given}",
        "set model.network.num_head_channels or num_heads; init_hints={num_heads: ...} if the file does not hold them",
    )
    scale = content.card.preconditioning.get("c_noise_scale")
    require(
        scale is None or scale == c_noise_scale,
        f"initial weights of a network with time input {c_noise_scale} ln t",
        f"{content.path}, with {scale} ln t",
        f"set model.c_noise_scale={scale}",
    )
    network.load_state_dict(initial)


def attention_heads(network: nn.Module) -> list[int]:
    """Return the numbers of heads of the attentions of a network; no shape of a weight depends on them."""
    return [heads for part in network.modules() if (heads := getattr(part, "heads", 0))]


def find(checkpoint: str | os.PathLike[str]) -> Path:
    """Return the path of a checkpoint: a file, a folder of diffusers or of ours, the last checkpoint of a run folder, or
    the downloaded file of a published name, or files of a name on the Hub.
    """
    if str(checkpoint).startswith(tuple(pretrained.PROGRAMS)):
        return pretrained.fetch(str(checkpoint))
    if str(checkpoint).startswith(hub.PREFIX):
        path = _content(hub.fetch(str(checkpoint)))
    else:
        path = Path(expanded(os.fspath(checkpoint)))
    if path.is_dir():
        path = snapshot(path)
    if path.is_dir() and not ((path / ours.SEALED).is_file() or diffusers.is_diffusers(path)):
        weights = "pytorch_model.bin"
        accelerate = (f"{ours.SEALED}.index.json", weights, f"{weights}.index.json")
        # A run that died while it renamed may have its newest checkpoint under the other name.
        names = (*accelerate, f"{ours.CHECKPOINTS}/{ours.LAST}", f"{ours.CHECKPOINTS}/{ours.NEXT}")
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            expected = f"a run folder with checkpoints/last.ckpt at {path}, or a diffusers folder"
            remedy = "give a run folder that has trained, or a checkpoint file"
            raise UserError(expected, "a folder that is neither", remedy)
        path = file
    require(
        path.exists(),
        f"a run folder or a checkpoint file at {path}",
        "no such file",
        "check the path; it is relative to the folder in which the command runs",
    )
    return diffusers.folder_of(path) if path.name.startswith(diffusers.WEIGHTS) else path


def snapshot(path: Path) -> Path:
    """Return the newest revision in a folder of the Hugging Face cache, or its single file; other folders as they are."""
    cached = (path / "refs").is_dir() or (path / "blobs").is_dir()
    if not cached or not (path / "snapshots").is_dir():
        return path
    files = filter(Path.is_file, (path / "refs").rglob("*"))
    refs = {str(p.relative_to(path / "refs")): p.read_text()[:100].strip() for p in files}
    revision = max(
        filter(Path.is_dir, (path / "snapshots").iterdir()),
        key=lambda p: (p.name == refs.get("main"), p.name in refs.values(), os.path.getmtime(p)),
        default=None,
    )
    if revision is None:
        raise UserError(f"a snapshot in {path / 'snapshots'}", "none", "download the model again")
    print(f"{path.name}: takes the snapshot {revision.name}", file=sys.stderr)
    return _content(revision)


def _content(revision: Path) -> Path:
    """Return the single file of weights in a folder from the Hub, or the folder."""
    suffixes = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors")
    weights = [p for p in revision.iterdir() if p.is_file() and p.suffix in suffixes]
    return weights[0] if len(weights) == 1 and not diffusers.is_diffusers(revision) else revision


def read(checkpoint: str | os.PathLike[str], hints: Hints) -> Checkpoint:
    """Find a checkpoint, detect its format by its content, never by its name, open it, and print its notes."""
    path, published = find(checkpoint), pretrained.RELEASED.get(str(checkpoint))
    file = path / ours.SEALED if (path / ours.SEALED).is_file() else path
    beside_settings = (file.parent / "config.json").is_file()
    with checking(path):
        verify_checksum(path)
        if file.is_dir() or (beside_settings and file.name.startswith(diffusers.WEIGHTS)):
            opened: Any = diffusers.open_path(file, hints)
        else:
            with file.open("rb") as stream:
                first = stream.read(16)
            readers = (r for mark, r in CONTAINERS.items() if re.match(mark, first, re.DOTALL))
            reader = next(readers, None)
            if reader is None:
                start = f"a file that begins with {first!r}" if first else "an empty file"
                raise ContentError(start)
            content = reader(file)
            whole = (form.open_content(content, path, hints) for form in (ours, jcm, edm2, nvlabs))
            states = (wrapped.open_sets(content, path, hints, form) for form in STATE_DICTS)
            opened = next(filter(None, chain(whole, states)), None)
            if opened is None:
                anchors = " or ".join(form.ANCHORS[0] for form in STATE_DICTS)
                names = f"{wrapped.first_names(content)}, where a state dict of ours would have"
                fault = "a file whose content is no model of these formats"
                raise ContentError(f"{fault}: {names} {anchors}")
        if published is not None:
            opened = replace(opened, card=opened.card.with_role(published.role, path))
    if hints != Hints(weights=hints.weights):
        hints.require_agreement(opened.card.network, path)
    for note in opened.notes:
        print(f"{path.name}: {note}", file=sys.stderr)
    return opened


def build_model(
    checkpoint: Checkpoint, weights: str, role: Role | None, autoencoder: str | None = None
) -> Model:
    """Build the denoiser of a checkpoint with the set of weights of that name. `role` and `autoencoder` are as in `load`.

    The weights must be complete, of the right shapes and finite. The network is built without memory first: settings of
    any size cost nothing until the weights agree with them.
    """
    card, sets = checkpoint.card, checkpoint.sets
    if autoencoder is not None:
        card = moved(card, autoencoder)
    if card.role is None or role not in (None, card.role):
        card = card.with_role(role, checkpoint.path)
    name = next(iter(sets)) if weights == "ema" and len(sets) == 1 else weights
    known = f"weights among {', '.join(sets)}"
    rebuild = checkpoint.reconstruct if name.startswith(POSTHOC) else None
    remedy = "choose one of those that this checkpoint holds"
    require(name in sets or rebuild is not None, known, weights, remedy)
    with checking(checkpoint.path):
        state, settings = rebuild(name) if rebuild else checkpoint.read(sets[name]), card.network
        for key, value in state.items():
            numbers = isinstance(value, Tensor) and value.is_floating_point()
            finite = numbers and bool(value.isfinite().all())
            check(finite, f"weights {key[:80]} that are not all finite floating numbers")
        deep = max(settings.get("num_res_blocks", 0), settings.get("depth", 0)) > len(state)
        check(not deep, "a network with more blocks than it has weights")
        with torch.device("meta"):
            network: nn.Module = build(settings, NETWORKS, nn.Module)
        needs, has = (
            {k: tuple(v.shape) for k, v in x.items()} for x in (network.state_dict(), state)
        )
        for key in [*needs, *has]:
            shapes = f"{has.get(key, ())}, where its network has {needs.get(key, ())}"
            check(needs.get(key) == has.get(key), f"weights {key[:80]} of shape {shapes}")
        channels, out = settings.get("in_channels"), settings.get("out_channels")
        image = out in (None, channels)
        check(image, f"a network with out_channels={out} for in_channels={channels}")
        own = {key: value.detach().float().contiguous() for key, value in state.items()}
        network.load_state_dict(own, assign=True)
        denoiser = Denoiser(network, build(card.preconditioning, PRECONDITIONING, object))
    denoiser.eval().requires_grad_(False)
    return Model(denoiser, card, checkpoint.path, weights, checkpoint.format)


def build(node: dict[str, Any], package: str, base: type) -> Any:
    """Build a node of a card: a class `base` that is defined in `package`, with plain arguments. Refuse all else."""
    arguments = dict(node)
    target = arguments.pop("_target_", None)
    part: Any = None
    with suppress(ImportError, AttributeError, ValueError):
        if isinstance(target, str) and target.startswith(package):
            part = resolve_name(target)
    lists = [v if isinstance(v, list | tuple) else [v] for v in arguments.values()]
    values = [value for listed in lists for value in listed]
    texts = [value for value in values if isinstance(value, str)]
    require(
        isinstance(part, type)
        and issubclass(part, base)
        and f"{part.__module__}.{part.__qualname__}" == target
        and all(len(listed) <= MOST_LISTED for listed in lists)
        and all(isinstance(value, int | float | str | None) for value in values)
        and all(abs(value) <= LARGEST for value in values if isinstance(value, int | float))
        and not any(len(text) > MOST_CHARACTERS or "${" in text for text in texts),
        f"a class of {package[:-1]} with plain arguments in the checkpoint's card",
        str(target)[:120] if isinstance(target, str) else type(target).__name__,
        "do not use this file unless you know who wrote it",
    )
    return part(**arguments)
