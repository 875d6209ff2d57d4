"""The command `sample`: draws samples of a checkpoint, on one device or several, and goes on after a stop."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import UInt8
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from consistency.checkpoints.load import load
from consistency.commands.cli import require_fresh
from consistency.commands.overrides import shell_line
from consistency.data.decode import to_picture
from consistency.errors import require
from consistency.inference import options, plots
from consistency.inference.generate import Request, drawing, generate, in_batches
from consistency.pixels import to_uint8
from consistency.runtime.devices import chosen_device, require_devices
from consistency.runtime.files import fingerprint, written_whole
from consistency.samplers import Sampler
from consistency.tensors import Data, Label, Time

FREE = ("num_samples", "batch_size", "images", "device", "devices", "trajectory", "output", "compile", "force")  # fmt: skip
"""Options that may differ when a folder of samples is continued: they change no sample but for rounding."""

SHOWN = 8
"""Samples whose trajectory is shown."""


def sample(config: DictConfig, output: Path) -> None:
    """Write grid.png, samples.npz and sample.yaml, and on request single PNGs and the trajectory of the first samples.

    A folder with samples of the same settings is continued: the missing samples are drawn.
    """
    require_devices(chosen_device(config.device), config.devices, config.precision)
    model = load(config.checkpoint, weights=config.weights, role=config.role)
    options.fill_process(config, config.sampler, model, shell_line)
    sampler: Sampler = instantiate(config.sampler, _convert_="all")
    options.require_suited(sampler, model, force=config.force)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    model_options = options.ModelOptions(
        **{field.name: settings[field.name] for field in fields(options.ModelOptions)}
    )
    indices = range(config.num_samples)
    labels = model.card.labels(model_options.labels, config.seed, indices)
    store = SampleStore(output)
    known = store.begin(settings, model.path)
    batches = in_batches([i for i in indices if i not in known], config.batch_size)
    processes = max(1, min(config.devices, len(batches)))
    prepare = partial(model_options.prepare, model if processes == 1 else None)
    with drawing(prepare, processes) as draw:
        samples, total = draw(sampler, batches), len(batches)
        for numbers, images in tqdm(samples, "Sampling", total, unit="batch", disable=not total):
            store.put(numbers, images)
    images = store.collect(len(indices), labels)
    plots.grid(images, plots.columns_for(len(images))).save(output / "grid.png")
    if config.images:
        (output / "images").mkdir(exist_ok=True)
        for number, image in enumerate(images):
            to_picture(image).save(output / "images" / f"{number:05d}.png")
    if config.trajectory:
        request = replace(model_options, compile=False).prepare(model)
        write_trajectory(request, sampler, indices[:SHOWN], output)
    OmegaConf.save(config, output / "sample.yaml", resolve=True)
    print(f"{len(images)} samples of {model.path} ({model.weights}): {output / 'grid.png'}")


@dataclass(frozen=True)
class SampleStore:
    """A folder that fills with samples: batches in parts/, and at the end all of them in samples.npz."""

    folder: Path

    def samples(self) -> dict[int, np.ndarray]:
        """Read the samples in the folder, by number."""
        samples: dict[int, np.ndarray] = {}
        parts = sorted((self.folder / "parts").glob("*.npz"))
        for file in [*self.folder.glob("samples.npz"), *parts]:
            with np.load(file, allow_pickle=False) as arrays:
                pixels = arrays["arr_0"]
                numbers = arrays["numbers"].tolist() if "numbers" in arrays else range(len(pixels))
            samples |= zip(numbers, pixels, strict=True)
        return samples

    def begin(self, settings: dict[str, Any], checkpoint: Path) -> set[int]:
        """Return the numbers of the samples in the folder. Refuse a folder with other settings or content."""
        state, count = self.folder / "progress.json", settings["num_samples"]
        fixed = {k: v for k, v in settings.items() if k not in FREE}
        text = json.dumps(fixed | {"checkpoint": fingerprint(checkpoint)}, default=str)
        if not state.is_file():
            require_fresh(self.folder)
            with written_whole(state) as file:
                file.write(text.encode())
            return set()
        before = json.loads(state.read_text())
        options.require_same_settings(before, json.loads(text), "samples", self.folder)
        known = set(self.samples())
        needed = max(known, default=-1) + 1
        require(
            needed <= count,
            f"num_samples of at least the {needed} in output={self.folder}",
            count,
            "give a larger number, or choose another output=",
        )
        print(f"{self.folder} has {len(known)} of {count} samples: drawing {count - len(known)}")
        return known

    def put(self, numbers: Sequence[int], images: UInt8[Tensor, "n c h w"]) -> None:
        """Write a batch."""
        with written_whole(self.folder / "parts" / f"{numbers[0]:08d}.npz") as file:
            pixels = images.permute(0, 2, 3, 1).cpu().numpy()
            np.savez(file, allow_pickle=False, arr_0=pixels, numbers=np.array(numbers))

    def collect(self, count: int, labels: Label) -> UInt8[Tensor, "n c h w"]:
        """Write all samples in their order into samples.npz, remove the parts, and return the samples."""
        by_number = self.samples()
        pixels = np.stack([by_number[number] for number in range(count)])
        arrays = {"arr_0": pixels} | ({} if labels is None else {"arr_1": labels.numpy()})
        with written_whole(self.folder / "samples.npz") as whole:
            np.savez(whole, allow_pickle=False, **arrays)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def write_trajectory(
    request: Request, sampler: Sampler, numbers: Sequence[int], output: Path
) -> None:
    """Write trajectory.png and trajectory.gif: the estimates of some samples at every evaluation."""
    estimates: list[tuple[float, UInt8[Tensor, "n c h w"]]] = []

    def denoise(x_t: Data, t: Time, label: Label = None) -> Data:
        estimate = request.denoise(x_t, t, label)
        estimates.append((float(t[0]), to_uint8(estimate)))
        return estimate

    for _ in generate(replace(request, denoise=denoise), sampler, [numbers]):
        pass
    panels = [(f"t={t:.2g}", plots.grid(images, 1)) for t, images in estimates]
    step = -(-len(panels) // plots.MOST_COLUMNS)
    plots.side_by_side(panels[::-step][::-1]).save(output / "trajectory.png")
    frames = torch.stack([images for _, images in estimates], 1)
    plots.animation(frames, output / "trajectory.gif", milliseconds=400)
