"""The command that converts a checkpoint between formats, and the one that checks a checkpoint."""

import hashlib
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from consistency import checkpoint
from consistency.checkpoint import Loaded
from consistency.command import require_fresh
from consistency.commands.overrides import shell_line
from consistency.errors import UserError, require
from consistency.formats.diffusers import write_diffusers
from consistency.formats.openai import require_openai, write_openai
from consistency.formats.opened import Hints
from consistency.formats.reading import OURS, SEALED
from consistency.formats.sealed import write_sealed
from consistency.randomness import generator

TORCH = (".pt", ".pth", ".ckpt")
TARGETS = (OURS, "openai", "diffusers")
TIMES = 9
"""Noise levels at which `verify` looks at the outputs."""


def convert(config: DictConfig, target: Path) -> None:
    """Converts `source` to the format `to` at `output`, or checks `verify`."""
    require(
        (config.source is None) != (config.verify is None),
        "source=<checkpoint> to convert, or verify=<checkpoint> to check",
        f"source={config.source} and verify={config.verify}",
        "give one of the two",
    )
    require(config.to in TARGETS, f"to= among {', '.join(TARGETS)}", config.to, "choose one")
    roles = ("teacher", "consistency", None)
    require(config.role in roles, "role=teacher or role=consistency", config.role, "choose one")
    sides = config.attention_resolutions
    hints = Hints(
        config.image_size,
        config.num_head_channels,
        None if sides is None else list(sides),
        config.num_heads,
        config.num_heads_upsample,
    )
    source = config.verify if config.source is None else config.source
    if config.source is not None:
        require_target(target, config.to)
    loaded = checkpoint.load(source, weights=config.weights, role=config.role, hints=hints)
    for line in facts(loaded):
        print(line)
    if config.verify is not None:
        verify(loaded)
        return
    written = write(loaded, config.to, target)
    print(f"written     {written} ({config.to})")
    print(f"check it    {shell_line('convert', f'verify={target}')}")


def require_target(target: Path, to: str) -> None:
    """Refuses to write over something, and a file's name for what is a folder."""
    require_fresh(target)
    require(
        to != "diffusers" or target.suffix not in (".safetensors", *TORCH),
        "a folder at output=, because diffusers reads folders",
        target.name,
        "leave the suffix out",
    )


def write(loaded: Loaded, to: str, target: Path) -> Path:
    """Writes the model in the format; what is written holds its card, so that its role need not be given again."""
    weights = loaded.denoiser.network.state_dict()
    if to == "diffusers":
        write_diffusers(target, loaded.card, weights)
        return target
    if to == "openai":
        require_openai(loaded.card)
    if target.suffix in TORCH and to == "openai":
        write_openai(target, loaded.card, weights)
        return target
    if target.suffix in TORCH:
        checkpoint.write({"card": loaded.card.saved(), "weights": dict(weights)}, target)
        return target
    file = target if target.suffix == ".safetensors" else target / SEALED
    write_sealed(file, loaded.card, weights)
    return file


# ------------------------------------------------------------------------------------ checking


def facts(loaded: Loaded) -> list[str]:
    """Format, role, network, keys and parameters, a line each."""
    card, network = loaded.card, loaded.denoiser.network
    classes = card.num_classes or "no"
    count = sum(p.numel() for p in network.parameters())
    shape = " x ".join(map(str, card.shape))
    kind = type(loaded.denoiser.preconditioning).__name__
    return [
        f"source      {loaded.path}",
        f"format      {loaded.format}",
        f"role        {card.role} ({kind} scalings)",
        f"network     {type(network).__name__}, images {shape}, {classes} classes",
        f"keys        {len(network.state_dict())}, all expected, finite and of the right shapes",
        f"parameters  {count:,}",
    ]


def verify(loaded: Loaded) -> None:
    """Prints what a use of the model would show; raises `UserError` where it is not what it says it is."""
    error, scale = boundary_error(loaded)
    levels = finite_outputs(loaded)
    student = loaded.card.role == "consistency"
    kept = error <= 1e-6 * scale
    note = "" if student else " (a denoiser has no boundary condition)"
    print(f"boundary    max |f(x, t_min) - x| = {error:.3g}{note}")
    print(f"outputs     finite at {sum(levels.values())} of {len(levels)} noise levels")
    print(f"sample      {sample_hash(loaded)} (hash of one fixed sample)")
    bad = [f"{t:.4g}" for t, finite in levels.items() if not finite]
    if bad:
        raise UserError(_failed(loaded, f"outputs that are not finite at t = {', '.join(bad)}"))
    if student and not kept:
        raise UserError(_failed(loaded, f"|f(x, t_min) - x| = {error:.3g} for |x| = {scale:.3g}"))
    print("verified")


def _failed(loaded: Loaded, got: str) -> str:
    return (
        f"expected a {loaded.card.role} model that keeps its definition at {loaded.path}\n"
        f"  got: {got}\n"
        "  do: check role=, and that the file is the one you mean"
    )


def boundary_time(loaded: Loaded) -> float:
    """The time at which the model should be the identity: t_min of its scalings, 0 for scalings without one."""
    if loaded.card.role == "teacher":
        return float(loaded.card.process.t_min)
    return float(getattr(loaded.denoiser.preconditioning, "t_min", 0.0))


def _noisy(loaded: Loaded, t: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images of the size at noise level t, the same at every call: x_t, t, label."""
    draw, classes = generator(0, "verify", 0), loaded.card.num_classes
    shape = (1, *loaded.shape)
    deviation = (t**2 + loaded.card.process.sigma_data**2) ** 0.5
    label = None if classes is None else torch.zeros(1, dtype=torch.long)
    return deviation * torch.randn(shape, generator=draw), torch.full((1,), t), label


@torch.no_grad()
def boundary_error(loaded: Loaded) -> tuple[float, float]:
    """max |f(x, t_0) - x| at the time t_0 of the boundary condition, and max |x|."""
    x, t, label = _noisy(loaded, boundary_time(loaded))
    return float((loaded.denoise(x, t, label) - x).abs().max()), float(x.abs().max())


@torch.no_grad()
def finite_outputs(loaded: Loaded) -> dict[float, bool]:
    """Whether the outputs are finite, by noise level from t_min to t_max."""
    found = {}
    for t in loaded.card.process.grid.points(TIMES).flip(0).tolist():
        x, level, label = _noisy(loaded, t)
        found[t] = bool(torch.isfinite(loaded.denoise(x, level, label)).all())
    return found


@torch.no_grad()
def sample_hash(loaded: Loaded) -> str:
    """SHA-256, shortened, of the grey values of the estimate from fixed noise at t_max: equal for equal models."""
    x, t, label = _noisy(loaded, loaded.card.process.t_max)
    grey = (loaded.denoise(x, t, label).clamp(-1, 1) * 127.5).round().to(torch.int16)
    return hashlib.sha256(grey.contiguous().numpy().tobytes()).hexdigest()[:16]
