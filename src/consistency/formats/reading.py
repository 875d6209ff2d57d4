"""Opens a file or folder of any format: finds out which it is, and turns every failure into one error."""

import json
import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from consistency.errors import UserError
from consistency.formats import diffusers, jcm, nvlabs, openai, wrapped
from consistency.formats.messagepack import read_messagepack
from consistency.formats.opened import ContentError, Hints, Opened, chosen
from consistency.formats.pickles import read_pickle, read_zip
from consistency.formats.sealed import read_sealed
from consistency.inference.card import ModelCard

OURS = "ours"
SEALED = "model.safetensors"
"""The weights in a folder that we wrote."""

KNOWN = (
    "a run folder or checkpoint of ours, an OpenAI .pt, an NVlabs .pkl, a flax file of the JAX code, "
    "or a diffusers folder"
)


STATES: dict[tuple[str, ...], Callable[[dict[str, Tensor], Hints], Opened]] = {
    openai.ANCHORS: openai.open_state,
    nvlabs.ANCHORS: nvlabs.open_state,
    diffusers.ANCHORS: diffusers.open_state,
}
"""Names that every network of a format has -> the reader of its state dicts."""


def read_content(path: Path) -> tuple[str, Any, Any]:
    """What kind of container a file is (zip, pickle, safetensors, flax), its content, and our card if it has one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(16)
    if size == 0:
        raise ContentError("an empty file")
    if first[:4] == b"PK\x03\x04":
        content, card = read_zip(path)
        return "zip", content, None if card is None else ModelCard.parse(json.loads(card), path)
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle", read_pickle(path), None
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= size - 8:
        return ("safetensors", *read_sealed(path))
    if 0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF):
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return "flax", read_messagepack(memoryview(content)), None
    raise ContentError(f"a file that begins with {first[:8]!r}")


def open_content(path: Path, weights: str, hints: Hints) -> Opened | dict[str, Any]:
    """The model in a file of others, or the raw content of a training checkpoint of ours."""
    if path.name.endswith(".index.json"):
        kind, content, card = "index", diffusers.read_shards(path), None
    else:
        kind, content, card = read_content(path)
    if isinstance(content, dict) and isinstance(content.get("card"), dict):
        return content
    if card is not None:
        _require_only(weights, ("ema",))
        return Opened(format=openai.FORMAT if kind == "zip" else OURS, weights=content, card=card)
    if kind == "flax" and jcm.is_jcm(content):
        _require_only(weights, [name for name, key in jcm.PARAMETERS.items() if key in content])
        return jcm.open_state(content, weights, hints)
    if nvlabs.is_nvlabs(content):
        return nvlabs.open_module(chosen(nvlabs.held(content), weights))
    for anchors, open_state in STATES.items():
        places = wrapped.find(content, anchors)
        if places:
            place = wrapped.usable(chosen(places, weights), weights)
            opened = open_state(place.weights, hints)
            return replace(opened, notes=tuple(filter(None, (place.note(places), *opened.notes))))
    names = " or ".join(anchors[0] for anchors in STATES)
    raise ContentError(
        f"a file of kind {kind} whose content is no model of these formats: "
        f"{wrapped.first_names(content)}, where a state dict of ours would have {names}"
    )


def _require_only(weights: str, held: Any) -> None:
    """Refuses weights that the file does not hold."""
    chosen({name: name for name in held}, weights)


def open_path(path: Path, weights: str, hints: Hints) -> Opened | dict[str, Any]:
    """The model at a path: a file of any format, a diffusers folder, or a folder that we wrote."""
    try:
        if path.is_dir() and (path / SEALED).is_file():
            return open_content(path / SEALED, weights, hints)
        if path.is_dir():
            return diffusers.open_folder(path, weights, hints)
        if path.name.startswith(diffusers.WEIGHTS) and (path.parent / "config.json").is_file():
            return diffusers.open_file(path, weights, hints)
        return open_content(path, weights, hints)
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that cannot be used, in the form of the house."""
    reason = f"content that makes no sense ({_short(error)})"
    if isinstance(error, ContentError):
        reason = str(error)
    return UserError(
        f"expected a checkpoint at {path}: {KNOWN}\n"
        f"  got: {reason}\n"
        "  do: check that the file is complete and is the one you mean, or take another"
    )


def _short(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
