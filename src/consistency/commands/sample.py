"""The command `sample`: draws samples of a checkpoint, on one device or several, and goes on after a stop."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import UInt8
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from consistency.checkpoints.load import load
from consistency.errors import require
from consistency.inference import options, plots
from consistency.inference.generate import Request, drawing, fitting_batch, in_batches, trajectory
from consistency.runtime.devices import chosen_device
from consistency.runtime.files import fingerprint, write_text, written_whole
from consistency.samplers import Sampler
from consistency.tensors import Label

FREE = ("autoencoder", "num_samples", "batch_size", "images", "device", "devices", "trajectory", "output", "compile", "force")  # fmt: skip
"""Options that may differ when a folder of samples is continued: they change no sample but for rounding."""


def sample(config: DictConfig, output: Path) -> None:
    """Write grid.png, samples.npz and sample.yaml, and on request single PNGs and the trajectory of the first samples.

    A folder with samples of the same settings is continued: the missing samples are drawn into parts/.
    """
    device = chosen_device(config.device, config.devices, config.precision)
    place = config.autoencoder
    model = load(config.checkpoint, weights=config.weights, role=config.role, autoencoder=place)
    options.fill_process(config, config.sampler, model)
    sampler: Sampler = instantiate(config.sampler, _convert_="all")
    options.require_suited(sampler, model, force=config.force)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    indices = range(config.num_samples)
    labels = model.card.labels(settings["labels"], config.seed, indices)
    known = begin(output, settings, model.path)
    size = config.batch_size or fitting_batch(model.card.shape, device)
    batches = in_batches([i for i in indices if i not in known], size)
    processes = max(1, min(config.devices, len(batches)))
    own = model if processes == 1 else None
    with drawing(partial(options.request_of, settings, own), processes) as draw:
        drawn, total = draw(sampler, batches), len(batches)
        for numbers, images in tqdm(drawn, "Sampling", total, unit="batch", disable=not total):
            with written_whole(output / "parts" / f"{numbers[0]:08d}.npz") as file:
                pixels = images.permute(0, 2, 3, 1).cpu().numpy()
                np.savez(file, allow_pickle=False, arr_0=pixels, numbers=np.array(numbers))
    images = collect(output, indices, labels)
    plots.grid(images, plots.columns_for(len(images))).save(output / "grid.png")
    if config.images:
        (output / "images").mkdir(exist_ok=True)
        for number, image in enumerate(images):
            to_pil_image(image).save(output / "images" / f"{number:05d}.png")
    if config.trajectory:
        request = options.request_of(settings | {"compile": False}, model)
        write_trajectory(request, sampler, min(8, len(images)), output)
    OmegaConf.save(config, output / "sample.yaml", resolve=True)
    print(f"{len(images)} samples of {model.path} ({model.weights}): {output / 'grid.png'}")


def begin(folder: Path, settings: dict[str, Any], checkpoint: Path) -> set[int]:
    """Return the numbers of the samples in a folder. Refuse a folder with other settings or content."""
    state, count = folder / "progress.json", settings["num_samples"]
    fixed = {k: v for k, v in settings.items() if k not in FREE}
    text = json.dumps(fixed | {"checkpoint": fingerprint(checkpoint)}, default=str)
    if not options.record_of(state, json.loads(text), "samples"):
        write_text(state, text)
        return set()
    known = set(read(folder))
    needed = max(known, default=-1) + 1
    expected = f"num_samples of at least the {needed} in output={folder}"
    require(needed <= count, expected, count, "give a larger number, or choose another output=")
    print(f"{folder} has {len(known)} of {count} samples: drawing {count - len(known)}")
    return known


def read(folder: Path) -> dict[int, np.ndarray]:
    """Read the samples in samples.npz and parts/ of a folder, by number."""
    by_number: dict[int, np.ndarray] = {}
    for file in [*folder.glob("samples.npz"), *sorted(folder.glob("parts/*.npz"))]:
        with np.load(file, allow_pickle=False) as arrays:
            pixels = arrays["arr_0"]
            numbers = arrays["numbers"].tolist() if "numbers" in arrays else range(len(pixels))
        by_number |= zip(numbers, pixels, strict=True)
    return by_number


def collect(folder: Path, numbers: Sequence[int], labels: Label) -> UInt8[Tensor, "n c h w"]:
    """Write all samples in their order into samples.npz, remove the parts, and return the samples."""
    by_number = read(folder)
    arrays = {"arr_0": np.stack([by_number[number] for number in numbers])}
    if labels is not None:
        arrays["arr_1"] = labels.numpy()
    with written_whole(folder / "samples.npz") as whole:
        np.savez(whole, allow_pickle=False, **arrays)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)


def write_trajectory(request: Request, sampler: Sampler, count: int, output: Path) -> None:
    """Write trajectory.png and trajectory.gif: the estimates of the first samples at every evaluation."""
    estimates = trajectory(request, sampler, count)
    panels = [(f"t={t:.2g}", plots.grid(images, 1)) for t, images in estimates]
    step = -(-len(panels) // plots.MOST_COLUMNS)
    plots.side_by_side(panels[::-step][::-1]).save(output / "trajectory.png")
    frames = torch.stack([images for _, images in estimates], 1)
    plots.animation(frames, output / "trajectory.gif", milliseconds=400)
