"""The command `convert`: it converts a checkpoint to another format, or checks one."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from consistency.checkpoints import ours
from consistency.checkpoints.contents import HINTS
from consistency.checkpoints.diffusers import write_diffusers
from consistency.checkpoints.load import load
from consistency.checkpoints.openai import require_openai, write_openai
from consistency.checkpoints.ours import SEALED, write_sealed
from consistency.commands.overrides import shell_line
from consistency.errors import require
from consistency.inference.model import Model
from consistency.pixels import to_uint8
from consistency.randomness import generator
from consistency.runtime.files import require_fresh

TORCH = (".pt", ".pth", ".ckpt")
CHOICES = {"to": (ours.FORMAT, "openai", "diffusers"), "role": ("teacher", "consistency", None)}
LEVELS = 9  # noise levels at which `verify` checks the outputs


def convert(config: DictConfig, target: Path) -> None:
    """Convert `source` to the format `to` at `output`, or check `verify`."""
    require(
        (config.source is None) != (config.verify is None),
        "source=<checkpoint> to convert, or verify=<checkpoint> to check",
        f"source={config.source} and verify={config.verify}",
        "give one of the two",
    )
    for name, choices in CHOICES.items():
        expected = f"{name}= among {', '.join(filter(None, choices))}"
        require(config[name] in choices, expected, config[name], "choose one")
    if config.source is not None:
        require_fresh(target)
        folder = config.to != "diffusers" or target.suffix not in (".safetensors", *TORCH)
        expected = "a folder at output=, because diffusers reads folders"
        require(folder, expected, target.name, "leave the suffix out")
    hints: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, HINTS), resolve=True)
    source = config.verify if config.source is None else config.source
    model = load(source, config.role, weights=config.weights, **hints)
    print_facts(model)
    if config.source is None:
        verify(model)
    else:
        print(f"written     {write(model, config.to, target)} ({config.to})")
        print(f"check it    {shell_line('convert', f'verify={target}')}")


def write(model: Model, to: str, target: Path) -> Path:
    """Write a model in a format, together with its card; return the file or folder."""
    card, weights = model.card, model.denoiser.network.state_dict()
    if to == "diffusers":
        write_diffusers(target, card, weights)
        return target
    if to == "openai":
        require_openai(card)
    if target.suffix not in TORCH:
        target = target if target.suffix == ".safetensors" else target / SEALED
        write_sealed(target, card, weights)
    elif to == "openai":
        write_openai(target, card, weights)
    else:
        ours.write({"card": card.saved(), "weights": dict(weights)}, target)
    return target


def print_facts(model: Model) -> None:
    """Print format, role, network, keys and parameters."""
    card, network = model.card, model.denoiser.network
    shape, classes = " x ".join(map(str, card.shape)), card.num_classes or "no"
    print(f"source      {model.path}")
    print(f"format      {model.format}")
    print(f"role        {card.role} ({type(model.denoiser.preconditioning).__name__} scalings)")
    print(f"network     {type(network).__name__}, images {shape}, {classes} classes")
    print(f"keys        {len(network.state_dict())}, all finite and of the right shapes")
    print(f"parameters  {sum(p.numel() for p in network.parameters()):,}")


@torch.no_grad()
def verify(model: Model) -> None:
    """Print the error of the boundary condition, finite outputs and a hash of one sample. Refuse a broken model."""
    card, student = model.card, model.card.role == "consistency"
    t_0 = getattr(model.denoiser.preconditioning, "t_min", 0.0) if student else card.process.t_min
    x, f = estimate(model, float(t_0))
    error, scale = float((f - x).abs().max()), float(x.abs().max())
    levels = card.process.grid.points(LEVELS).flip(0).tolist()
    bad = [f"{t:.4g}" for t in levels if not estimate(model, t)[1].isfinite().all()]
    sample = to_uint8(estimate(model, card.process.t_max)[1])
    digest = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]
    note = "" if student else " (a denoiser has no boundary condition)"
    print(f"boundary    max |f(x, t_min) - x| = {error:.3g}{note}")
    print(f"outputs     finite at {len(levels) - len(bad)} of {len(levels)} noise levels")
    print(f"sample      {digest} (hash of one fixed sample)")
    expected = f"a {card.role} model that keeps its definition at {model.path}"
    remedy = "check role=, and that the file is the one you mean"
    require(not bad, expected, f"outputs that are not finite at t = {', '.join(bad)}", remedy)
    exact = not student or error <= 1e-6 * scale
    require(exact, expected, f"|f(x, t_min) - x| = {error:.3g} for |x| = {scale:.3g}", remedy)
    print("verified")


def estimate(model: Model, t: float) -> tuple[Tensor, Tensor]:
    """Return one fixed noisy image at noise level t, and the model's estimate from it."""
    card = model.card
    deviation = (t**2 + card.process.sigma_data**2) ** 0.5
    x_t = deviation * torch.randn(1, *card.shape, generator=generator(0, "verify", 0))
    label = None if card.num_classes is None else torch.zeros(1, dtype=torch.long)
    return x_t, model.denoise(x_t, torch.full((1,), t), label)
