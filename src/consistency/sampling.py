"""The command that draws samples from a checkpoint."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import UInt8
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from consistency import pictures
from consistency.checkpoint import Loaded, load
from consistency.command import require_fresh
from consistency.errors import require
from consistency.generation import drawn_labels, generate
from consistency.preconditioning import TrigFlow
from consistency.samplers import NEED_DENOISER, UNDER_TRIGFLOW, Sampler
from consistency.tensors import Label


def chosen_device(name: str) -> torch.device:
    """The device by name; `auto` is the accelerator there is, else the CPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        require(False, "a device of this machine", f"device={name} ({reason})", "use device=auto")
    return device


def chosen_labels(labels: object, seed: int, indices: range, num_classes: int | None) -> Label:
    """Class of each sample: given ones repeated in turn, drawn ones where `labels` is None."""
    if num_classes is None:
        require(labels is None, "labels=null for a model without classes", labels, "leave it out")
        return None
    if labels is None:
        return drawn_labels(seed, indices, num_classes)
    given = list(labels) if isinstance(labels, ListConfig) else [labels]
    valid = bool(given) and all(isinstance(c, int) and 0 <= c < num_classes for c in given)
    require(valid, f"labels from 0 to {num_classes - 1}", given, "for example labels=[0,1,2]")
    return torch.tensor([given[i % len(given)] for i in indices])


def fill_process(config: DictConfig, loaded: Loaded) -> None:
    """Puts the time range and points of the checkpoint's own process where the configuration has null."""
    for name, value in loaded.card["process"].items():
        if config.process[name] is None:
            config.process[name] = value


def bound_sampler(config: DictConfig, loaded: Loaded) -> Sampler:
    """The sampler of the configuration, with the time range and points of the checkpoint's own process."""
    fill_process(config, loaded)
    return instantiate(config.sampler, _convert_="all")


def require_suited(sampler: Sampler, loaded: Loaded, *, force: bool) -> None:
    """Refuses a sampler that asks the model for what it has not learnt, unless that is what is wanted."""
    function = sampler.func if isinstance(sampler, partial) else sampler
    require(
        force or loaded.card["role"] != "consistency" or function not in NEED_DENOISER,
        "a sampler for consistency functions: onestep or multistep",
        "one that follows the PF-ODE of a denoiser, with a consistency checkpoint",
        "choose sampler=onestep, or add force=true to draw all the same",
    )
    trigflow = isinstance(loaded.denoiser.preconditioning, TrigFlow)
    require(
        force or trigflow == (function in UNDER_TRIGFLOW),
        f"a sampler {'for' if trigflow else 'for other networks than those of'} TrigFlow",
        "one for another noise process than the checkpoint's",
        f"choose sampler={'trigflow_onestep' if trigflow else 'onestep'}, or add force=true",
    )


def sample(config: DictConfig, output: Path) -> None:
    """Writes grid.png, samples.npz and sample.yaml, and with `images` one PNG a sample, into the folder `output`."""
    for name in ("num_samples", "batch_size"):
        require(config[name] >= 1, f"{name} >= 1", config[name], "give a positive number")
    require_fresh(output)
    loaded = load(config.checkpoint, weights=config.weights, role=config.role)
    sampler, card = bound_sampler(config, loaded), loaded.card
    require_suited(sampler, loaded, force=config.force)
    indices = range(config.num_samples)
    labels = chosen_labels(config.labels, config.seed, indices, card["num_classes"])
    device = chosen_device(config.device)
    size = card["image"]["size"]
    batches = generate(
        loaded.denoiser.to(device),
        sampler,
        indices=indices,
        labels=labels,
        shape=(card["image"]["channels"], size, size),
        seed=config.seed,
        batch_size=config.batch_size,
        device=device,
    )
    total = -(-len(indices) // config.batch_size)
    images = torch.cat(list(tqdm(batches, total=total, desc="Sampling", unit="batch")))
    write(images, labels, output, single=config.images)
    OmegaConf.save(config, output / "sample.yaml", resolve=True)
    print(f"{len(images)} samples of {loaded.path} ({loaded.weights}): {output / 'grid.png'}")


def write(images: UInt8[Tensor, "n c h w"], labels: Label, output: Path, *, single: bool) -> None:
    """The three forms of output: a grid to look at, arrays for evaluators, single PNGs."""
    output.mkdir(parents=True, exist_ok=True)
    pictures.grid(images, pictures.columns_for(len(images))).save(output / "grid.png")
    pixels = images.permute(0, 2, 3, 1).numpy()
    arrays = {"arr_0": pixels} | ({} if labels is None else {"arr_1": labels.numpy()})
    np.savez(output / "samples.npz", allow_pickle=False, **arrays)
    if single:
        folder = output / "images"
        folder.mkdir()
        for number, image in enumerate(pixels):
            Image.fromarray(image.squeeze()).save(folder / f"{number:05d}.png")
