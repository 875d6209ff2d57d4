"""Checkpoints: tensors plus a plain card that says how to build the denoiser. No code, no pickled class.

The card of a checkpoint is a dictionary of plain values:

    role                consistency (f, samples in one step) or teacher (a denoiser D)
    network             `_target_` and arguments of the network
    preconditioning     `_target_` and arguments of the preconditioning that samples are drawn with
    process             sigma_data, t_min, t_max, rho, and `times`, the points of two-step sampling
    image               channels, size
    num_classes         number of classes or null
    class_names         their names, where the data has any

Files of other programs are opened by `consistency.formats`, which writes such a card for them.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from consistency.denoiser import Denoiser
from consistency.editing import Pairing, Start, edit, grid_times
from consistency.errors import UserError, require
from consistency.formats import diffusers, reading, released
from consistency.formats.opened import ContentError, Hints, Opened
from consistency.inference.card import ModelCard, Role, is_plain
from consistency.inference.generate import Request, edits, samples
from consistency.networks.unet import UNet
from consistency.paths import path_of
from consistency.pixels import to_uint8, to_unit
from consistency.randomness import generator
from consistency.runtime.files import (  # taken from here by other modules
    checksum_path,
    fingerprint,
    move,
    verify_checksum,
    write_checksum,
    write_text,
    written_whole,
)
from consistency.samplers import Sampler
from consistency.tensors import Data, Label, Time
from consistency.trusted import named

__all__ = [
    "checksum_path",
    "fingerprint",
    "move",
    "verify_checksum",
    "write_checksum",
    "write_text",
]

NETWORKS = "consistency.networks."
PRECONDITIONING = "consistency.preconditioning."

CHECKPOINTS = "checkpoints"
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors")
"""What files of weights are called, where a folder may hold others."""

WHOLE = ("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The weights in a folder that accelerate writes, where they are not in `reading.SEALED`."""

NEXT, LAST, PREVIOUS = "next.ckpt", "last.ckpt", "previous.ckpt"
"""Where a run keeps its checkpoints: the newest, on its way to be `last`; the newest; and the one before it."""


@dataclass(frozen=True)
class Loaded:
    """A denoiser read from a file, with its card, the path and weights it came from, and the format of the file."""

    denoiser: Denoiser
    card: ModelCard
    path: Path
    weights: str
    format: str = reading.OURS

    def denoise(self, x_t: Data, t: Time, label: Label = None) -> Data:
        """The estimate of x_0: D(x_t, t) of a teacher, f(x_t, t) of a consistency model.

        x_t: float32 images; t: the noise level of each; label: class indices, or None, which stands for "no class" in
        the networks of NVlabs that have classes.
        """
        network = self.denoiser.network
        if label is None and isinstance(network, UNet) and network.num_classes is not None:
            label = torch.full(x_t.shape[:1], -1, device=x_t.device)
        return self.denoiser(x_t, t, label)

    __call__ = denoise

    @property
    def device(self) -> torch.device:
        """Where the weights are; `model.denoiser.to(device)` moves them."""
        return next(self.denoiser.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        return self.card.shape

    def sample(
        self,
        count: int,
        *,
        steps: int = 1,
        seed: int = 0,
        labels: int | str | Sequence[int | str] | None = None,
        sampler: Sampler | None = None,
        batch_size: int = 64,
    ) -> UInt8[Tensor, "n c h w"]:
        """Draws images as uint8; image i depends on (seed, i) alone.

        steps: evaluations of a consistency model, points of the grid for a teacher; labels: a class or several that
        are repeated in turn, None for drawn ones; sampler: one of `consistency.samplers` with its settings.
        """
        require(count >= 1, "at least one image", count, "ask for more")
        request = Request(
            denoise=self, card=self.card, labels=labels, seed=seed, device=self.device
        )
        return samples(request, sampler or self.card.sampler(steps), count, batch_size)

    def edit(
        self,
        images: UInt8[Tensor, "n c h w"],
        pairing: Pairing,
        *,
        outputs: int = 1,
        seed: int = 0,
        labels: int | str | Sequence[int | str] | None = None,
        times: Sequence[float] | None = None,
        start: Start = "reference",
        batch_size: int = 64,
    ) -> UInt8[Tensor, "n m c h w"]:
        """Edits uint8 images: so many outputs of each, by Algorithm 4 of Song et al. 2023.

        pairing: what is known of an image, `consistency.editing.colorize` or another; times: points of evaluation,
        None for the published grid; labels: a class for each image in turn, None for drawn ones.
        """
        require(
            tuple(images.shape[1:]) == self.shape,
            f"images of shape {self.shape}",
            tuple(images.shape),
            "resize them first",
        )
        grid = self.card.process.grid
        loop = partial(
            edit,
            task=pairing(self.shape, generator(seed, "edit")),
            times=grid_times(grid) if times is None else times,
            t_min=grid.t_min,
            start=start,
            clip=True,
        )
        request = Request(
            denoise=self, card=self.card, labels=labels, seed=seed, device=self.device
        )
        x_0 = edits(request, loop, to_unit(images), outputs=outputs, batch_size=batch_size)
        return to_uint8(x_0).unflatten(0, (len(images), outputs))


def write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its checksum, whole or not at all. Raises OSError."""
    with written_whole(path, checksum=True) as file:
        _save(content, file)


def _save(content: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # What torch says where a write failed is that its own position is wrong.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def snapshot(path: Path) -> Path:
    """The newest content in a folder of the Hugging Face cache (`models--...`), which keeps every revision; other paths as
    they are. A revision of one file is that file.
    """
    parts = [(path / name).is_dir() for name in ("snapshots", "refs", "blobs")]
    if not parts[0] or not any(parts[1:]):
        return path
    refs = sorted((p for p in (path / "refs").rglob("*") if p.is_file()), key=_time)
    named = [path / "refs" / "main", *refs[::-1]]
    hashes = [ref.read_text()[:100].strip() for ref in named if ref.is_file()]
    there = {p.name: p for p in sorted((path / "snapshots").iterdir(), key=_time) if p.is_dir()}
    newest = next(reversed(there.values()), None)
    found = next((there[name] for name in hashes if name in there), newest)
    require(
        found is not None,
        f"a snapshot in {path / 'snapshots'}",
        "none",
        "download the model again",
    )
    assert found is not None
    files = [p for p in found.iterdir() if p.is_file() and p.suffix in SUFFIXES]
    print(f"{path.name}: takes the snapshot {found.name}", file=sys.stderr)
    return files[0] if len(files) == 1 and not diffusers.is_diffusers(found) else found


def _time(path: Path) -> float:
    return path.stat().st_mtime


def find(checkpoint: str | os.PathLike[str]) -> Path:
    """The checkpoint that is meant: a file, a folder of diffusers or of ours, the `last` of a run folder, or the
    downloaded file of a published name.
    """
    if released.is_name(checkpoint):
        return released.fetch(str(checkpoint))
    path = snapshot(path_of(checkpoint))
    if path.is_file() and path.name.startswith(diffusers.WEIGHTS):
        path = diffusers.folder_of(path)
    if path.is_dir() and ((path / reading.SEALED).is_file() or diffusers.is_diffusers(path)):
        return path
    weights = next((path / name for name in WHOLE if (path / name).is_file()), None)
    if weights is not None:
        return weights
    if path.is_dir():
        folder = path / CHECKPOINTS
        # A run that died while it renamed may have its newest under the other name.
        inside = next((folder / n for n in (LAST, NEXT) if (folder / n).is_file()), folder / LAST)
        require(
            inside.is_file(),
            f"a run folder with checkpoints/last.ckpt at {path}, or a diffusers folder",
            "a folder that is neither",
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
    verify_checksum(path)
    content = reading.open_path(path, "ema", Hints())
    if isinstance(content, Opened):
        raise reading.unreadable(path, ContentError(f"a checkpoint of format {content.format}"))
    return content


def build(node: dict[str, Any], package: str, base: type) -> Any:
    """Builds a node of a card; only a class `base` that is defined in `package` is let in, with plain arguments."""
    target = node.get("_target_")
    found = named(target) if str(target).startswith(package) else None
    allowed = isinstance(found, type) and issubclass(found, base)
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    require(
        allowed and all(isinstance(k, str) and is_plain(v) for k, v in arguments.items()),
        f"a class of {package[:-1]} with plain arguments in the checkpoint's card",
        str(target)[:120] if isinstance(target, str) else type(target).__name__,
        "do not use this file unless you know who wrote it",
    )
    assert callable(found)
    return found(**arguments)


def weights_in(content: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """All weights of the network by name: online, target, ema:<decay>, and ema for the first average."""
    available: dict[str, dict[str, Tensor]] = {}
    if isinstance(content.get("weights"), dict):  # a converted model: one set
        available["ema"] = content["weights"]
    state: dict[str, Tensor] = content.get("state_dict", {})
    for role in ("online", "target"):
        prefix = f"{role}.network."
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if found:
            available[role] = found
    averages = content.get("callbacks", {}).get("EvaluationEMA", {}).get("averages", {})
    for decay, average in averages.items():
        available.setdefault("ema", average)
        available[f"ema:{decay}"] = average
    return available


def select_weights(content: dict[str, Any], weights: str) -> dict[str, Tensor]:
    """The network's weights of that name."""
    available = weights_in(content)
    require(
        weights in available,
        f"weights among {', '.join(available)}",
        weights,
        "choose one of those that this checkpoint holds",
    )
    return available[weights]


def assemble(network: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """The network of a card with its weights: all there, of the right shapes, of a floating type, and finite.

    It is built without memory first, so that settings of any size cost nothing until the weights agree with them.
    """
    for name, value in weights.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ContentError(f"weights {name[:80]} that are not of a floating type")
        if not bool(torch.isfinite(value).all()):
            raise ContentError(f"weights {name[:80]} that are not all finite")
    if max(network.get("num_res_blocks", 0), network.get("depth", 0)) > len(weights):
        raise ContentError("a network with more blocks than it has weights")
    with torch.device("meta"):
        found: nn.Module = build(network, NETWORKS, nn.Module)
    expected = found.state_dict()
    for name in [*expected, *weights]:
        there = name in expected and name in weights
        if not there or expected[name].shape != weights[name].shape:
            has, needs = (x[name].shape if name in x else () for x in (weights, expected))
            raise ContentError(
                f"weights {name[:80]} of shape {tuple(has)}, where its network has {tuple(needs)}"
            )
    channels = network.get("in_channels")
    if network.get("out_channels") not in (None, channels):
        raise ContentError(
            f"a network with out_channels={network['out_channels']} for in_channels={channels}, which no consistency model has"
        )
    own = {name: value.detach().float().contiguous() for name, value in weights.items()}
    found.load_state_dict(own, assign=True)
    return found.eval().requires_grad_(False)


def open_sets(path: Path, weights: Sequence[str] | None, hints: Hints) -> dict[str, Opened]:
    """The content of a checkpoint of any format, ours included, in one form, for each set of weights; None stands for all
    that it holds, each once: online, target and ema:<decay>, or ema where it says no more.
    """
    verify_checksum(path)
    first, *others = weights or ["ema"]
    content = reading.open_path(path, first, hints)
    if isinstance(content, Opened):
        found = {first: content} | {name: _foreign(path, name, hints) for name in others}
        return found
    card = ModelCard.parse(content["card"], path)
    names = weights or [name for name in weights_in(content) if name != "ema"] or ["ema"]
    return {
        name: Opened(format=reading.OURS, weights=select_weights(content, name), card=card)
        for name in names
    }


def _foreign(path: Path, weights: str, hints: Hints) -> Opened:
    content = reading.open_path(path, weights, hints)
    assert isinstance(content, Opened)
    return content


def open_checkpoint(path: Path, weights: str, hints: Hints) -> Opened:
    """`open_sets` for one set of weights."""
    return open_sets(path, [weights], hints)[weights]


def load(
    checkpoint: str | os.PathLike[str],
    *,
    weights: str = "ema",
    role: Role | None = None,
    hints: Hints | None = None,
) -> Loaded:
    """The denoiser of a run folder, a file or folder of any format, or a published name; on the CPU, in eval mode,
    without gradient.

    role: what it must be, and what it is where the file does not say; None accepts either. Raises `UserError` where the
    file is missing, damaged, of another role or no checkpoint.
    """
    (found,) = load_sets(checkpoint, [weights], role=role, hints=hints)
    return found


def load_sets(
    checkpoint: str | os.PathLike[str],
    weights: Sequence[str] | None,
    *,
    role: Role | None = None,
    hints: Hints | None = None,
) -> list[Loaded]:
    """`load` for several sets of weights, all that the checkpoint holds where that is None; a file of ours is read once."""
    path = find(checkpoint)
    try:
        sets = open_sets(path, weights, hints or Hints())
        found = [_built(opened, checkpoint, path, name, role) for name, opened in sets.items()]
    except UserError:
        raise
    except Exception as error:  # the settings of a damaged or hostile file can fail in any way
        raise reading.unreadable(path, error) from error
    for note in dict.fromkeys(note for opened in sets.values() for note in opened.notes):
        print(f"{path.name}: {note}", file=sys.stderr)
    return found


def _built(
    opened: Opened,
    checkpoint: str | os.PathLike[str],
    path: Path,
    weights: str,
    role: Role | None,
) -> Loaded:
    card = opened.card
    if released.is_name(checkpoint) and card.role is None:
        card = card.with_role(released.find(str(checkpoint)).role, path)
    card = card.with_role(role, path)
    network = assemble(card.network, opened.weights)
    denoiser = Denoiser(network, build(card.preconditioning, PRECONDITIONING, object))
    return Loaded(denoiser.eval().requires_grad_(False), card, path, weights, opened.format)


def load_teacher(path: str | None, *, weights: str) -> Denoiser:
    """The teacher denoiser of a distillation, named by `teacher=`."""
    require(
        path is not None,
        "a teacher to distil, teacher=<run folder or checkpoint>",
        "teacher=null",
        "train one on the same data with mode=edm and give its run folder",
    )
    return load(str(path), weights=weights, role="teacher").denoiser


def load_initial(
    checkpoint: str, network: nn.Module, *, weights: str, c_noise_scale: float
) -> None:
    """Puts the weights of a checkpoint of any format and either role into a network of the same kind (`init=`).

    c_noise_scale: that of `network`; weights trained with another time input load cleanly and mean nothing.
    """
    path = find(checkpoint)
    try:
        opened = open_checkpoint(path, weights, Hints())
        found = assemble(opened.card.network, opened.weights).state_dict()
        scale = opened.card.preconditioning.get("c_noise_scale")
    except UserError:
        raise
    except Exception as error:
        raise reading.unreadable(path, error) from error
    own = network.state_dict()
    same = {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}
    require(
        same,
        "initial weights of the same network as model=",
        f"{path}, of another network",
        "choose the model= that wrote them, or init=null",
    )
    require(
        scale is None or scale == c_noise_scale,
        f"initial weights of a network with time input {c_noise_scale} ln t",
        f"{path}, with {scale} ln t",
        f"set model.c_noise_scale={scale}",
    )
    network.load_state_dict(found)
