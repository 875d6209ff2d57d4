"""The command that draws samples from a checkpoint: on one device or several, and on where it was stopped."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from hydra.utils import instantiate
from jaxtyping import UInt8
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from consistency import pictures
from consistency.checkpoint import load
from consistency.command import require_fresh
from consistency.commands.overrides import shell_line
from consistency.errors import require
from consistency.generation import generate
from consistency.inference.model import Model
from consistency.pixels import to_uint8
from consistency.preconditioning import TrigFlow
from consistency.randomness import SampleNoise
from consistency.runtime import signals
from consistency.runtime.files import fingerprint
from consistency.samplers import NEED_DENOISER, UNDER_TRIGFLOW, Sampler
from consistency.tensors import Data, Denoise, Label, Time

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What the network computes in, by the names that `trainer.precision` has too."""

ON_THE_WAY = ("num_samples", "batch_size", "images", "device", "devices", "trajectory", "output", "compile", "force")  # fmt: skip
"""Options that may differ when a folder of samples is continued: they change no sample but for rounding."""

SHOWN = 8
"""Samples whose way is shown."""


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


def plain(value: object) -> object:
    """A list of the configuration as a list."""
    return list(value) if isinstance(value, ListConfig) else value


def fill_process(config: DictConfig, loaded: Model) -> None:
    """Puts the time range and points of the checkpoint's own process where the configuration has null."""
    for name, value in asdict(loaded.card.process).items():
        if config.process[name] is None:
            config.process[name] = list(value) if isinstance(value, tuple) else value


def bound_sampler(node: DictConfig, config: DictConfig, loaded: Model) -> Sampler:
    """A sampler of the configuration, with the time range and points of the checkpoint's own process."""
    fill_process(config, loaded)
    place = searched_path(loaded.path)
    if config.process.searched is None and place.is_file():
        config.process.searched = searched_times(place)
    asked = "${process.searched}" in OmegaConf.to_yaml(node, resolve=False)
    require(
        not asked or config.process.searched is not None,
        f"the time points that a search found, in {place}",
        "nothing there",
        f"choose sampler=multistep, or first run\n      {shell_line('search', f'checkpoint={config.checkpoint}')}",
    )
    return instantiate(node, _convert_="all")


def searched_path(path: Path) -> Path:
    """Where the time points found for a checkpoint stand."""
    return path.with_name(f"{path.name}.searched.json")


def searched_times(place: Path) -> list[float]:
    """The time points in such a file, which may come from elsewhere: numbers and nothing else."""
    content = json.loads(place.read_text())
    found = content.get("times") if isinstance(content, dict) else None
    listed: list[Any] = found if isinstance(found, list) else [None]
    numbers = all(type(t) in (int, float) for t in listed)
    require(numbers, f"time points in {place}", str(found)[:80], "delete it and search again")
    return [float(t) for t in listed]


def require_suited(sampler: Sampler, loaded: Model, *, force: bool) -> None:
    """Refuses a sampler that asks the model for what it has not learnt, unless that is what is wanted."""
    function = sampler.func if isinstance(sampler, partial) else sampler
    require(
        force or loaded.card.role != "consistency" or function not in NEED_DENOISER,
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
    # Wrong time points are told before anything is written.
    sampler(lambda x, t, label=None: 0 * x, lambda: torch.zeros(1, 1, 1, 1), None)


def in_precision(denoise: Denoise, precision: str, device: torch.device) -> Denoise:
    """The denoiser with its network in half precision; the state of the sampler stays float32."""
    half = PRECISIONS[precision]
    if half is None:
        return denoise

    def halved(x_t: Data, t: Time, label: Label = None) -> Data:
        with torch.autocast(device.type, dtype=half):
            return denoise(x_t, t, label)

    return halved


# ------------------------------------------------------------------------ the command


def sample(config: DictConfig, output: Path) -> None:
    """Writes grid.png, samples.npz and sample.yaml, and on request single PNGs and the way of the first samples.

    A folder with samples of the same settings is continued: what is there is kept, what is missing is drawn.
    """
    device = chosen_device(config.device)
    require_devices(config, device)
    loaded = load(config.checkpoint, weights=config.weights, role=config.role)
    sampler = bound_sampler(config.sampler, config, loaded)
    require_suited(sampler, loaded, force=config.force)
    indices = range(config.num_samples)
    labels = loaded.card.labels(plain(config.labels), config.seed, indices)
    shelf = Shelf(output)
    there = shelf.claim(settings_of(config, loaded), config.num_samples)
    missing = [i for i in indices if i not in there]
    batches = [
        missing[first : first + config.batch_size]
        for first in range(0, len(missing), config.batch_size)
    ]
    if there:
        print(f"{output} has {len(there)} of {len(indices)} samples: drawing {len(missing)}")
    text = OmegaConf.to_yaml(config, resolve=True)
    processes = min(config.devices, len(batches))
    if processes > 1:
        with signals.blocked():
            drawing = torch.multiprocessing.spawn(
                draw, (processes, text, output, batches), nprocs=processes, join=False
            )
        while not drawing.join():
            pass
    else:
        draw(0, 1, text, output, batches)
    images = shelf.collect(len(indices), labels)
    write(images, output, single=config.images)
    if config.trajectory:
        write_trajectory(config, loaded, sampler, labels, device, output)
    OmegaConf.save(config, output / "sample.yaml", resolve=True)
    print(f"{len(images)} samples of {loaded.path} ({loaded.weights}): {output / 'grid.png'}")


def require_devices(config: DictConfig, device: torch.device) -> None:
    """Refuses more devices than there are, and a precision that the device does not have."""
    require(
        config.precision in PRECISIONS,
        f"precision among {', '.join(PRECISIONS)}",
        config.precision,
        "choose one",
    )
    require(
        config.precision != "16-mixed" or device.type != "cpu",
        "bf16-mixed or 32-true on a CPU",
        config.precision,
        "say precision=bf16-mixed",
    )
    if device.type == "cpu" or config.devices == 1:
        return
    count = torch.accelerator.device_count()
    require(
        device.index is None and config.devices <= count,
        f"devices=1 to {count} on this machine, and a device without a number",
        f"devices={config.devices} device={config.device}",
        f"say devices={count} device={device.type}",
    )


def settings_of(config: DictConfig, loaded: Model) -> dict[str, Any]:
    """All that samples depend on: the options, and the content of the checkpoint."""
    options = OmegaConf.to_container(config, resolve=True)
    assert isinstance(options, dict)
    kept = {str(k): v for k, v in options.items() if k not in (*ON_THE_WAY, "checkpoint")}
    # Through JSON, so that it equals what is read back.
    return json.loads(json.dumps(kept | {"checkpoint": fingerprint(loaded.path)}, default=str))


def draw(
    rank: int, processes: int, text: str, output: Path, batches: Sequence[Sequence[int]]
) -> None:
    """Draws every batch that falls to this process, and puts it on the shelf."""
    if processes > 1:
        # Its own is shared by processes, and one that is killed leaves it behind.
        tqdm.set_lock(RLock())
    config = OmegaConf.create(text)
    device = chosen_device(config.device)
    if processes > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    elif processes > 1:
        device = torch.device(device.type, rank)
    loaded = load(config.checkpoint, weights=config.weights, role=config.role)
    loaded.denoiser.to(device)
    if config.compile:
        loaded.denoiser.network.compile()
    sampler: Sampler = instantiate(config.sampler, _convert_="all")
    denoise, shelf = in_precision(loaded, config.precision, device), Shelf(output)
    mine = batches[rank::processes]
    for numbers in tqdm(mine, desc="Sampling", unit="batch", disable=rank > 0 or not mine):
        images = generate(
            denoise,
            sampler,
            indices=numbers,
            labels=loaded.card.labels(plain(config.labels), config.seed, numbers),
            shape=loaded.shape,
            seed=config.seed,
            batch_size=len(numbers),
            device=device,
        )
        shelf.put(numbers, torch.cat(list(images)).cpu())


# ------------------------------------------------------------------------ the folder


@dataclass(frozen=True)
class Shelf:
    """A folder of samples that fills up: batches as they come in parts/, all of them in samples.npz at the end."""

    folder: Path

    @property
    def parts(self) -> list[Path]:
        return sorted((self.folder / "parts").glob("*.npz"))

    def claim(self, settings: dict[str, Any], count: int) -> set[int]:
        """The numbers of the samples that are there; refuses a folder with anything else in it."""
        state = self.folder / "progress.json"
        if not state.is_file():
            require_fresh(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
            return set()
        before = json.loads(state.read_text())
        other = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
        require(
            not other,
            f"the settings with which the samples in output={self.folder} were begun",
            f"others: {', '.join(other)}",
            "choose another output=, or the same settings to continue",
        )
        there: set[int] = set()
        for file in [*self.parts, *self._whole]:
            there |= set(self._read(file)[0])
        require(
            all(number < count for number in there),
            f"num_samples of at least the {max(there, default=-1) + 1} in output={self.folder}",
            count,
            "ask for more, or choose another output=",
        )
        return there

    def put(self, numbers: Sequence[int], images: UInt8[Tensor, "n c h w"]) -> None:
        """Keeps a batch: complete under another name first, then renamed into place."""
        place = self.folder / "parts" / f"{numbers[0]:08d}.npz"
        place.parent.mkdir(exist_ok=True)
        unfinished = place.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            pixels = images.permute(0, 2, 3, 1).numpy()
            np.savez(file, allow_pickle=False, arr_0=pixels, numbers=np.array(numbers))
        unfinished.replace(place)

    def collect(self, count: int, labels: Label) -> UInt8[Tensor, "n c h w"]:
        """All samples in their order, which samples.npz holds from now on."""
        found: dict[int, np.ndarray] = {}
        for file in [*self._whole, *self.parts]:
            numbers, pixels = self._read(file)
            found |= dict(zip(numbers, pixels, strict=True))
        pixels = np.stack([found[number] for number in range(count)])
        arrays = {"arr_0": pixels} | ({} if labels is None else {"arr_1": labels.numpy()})
        unfinished = self.folder / "samples.unfinished"
        with unfinished.open("wb") as content:
            np.savez(content, allow_pickle=False, **arrays)
        unfinished.replace(self.folder / "samples.npz")
        for part in self.parts:
            part.unlink()
        if (self.folder / "parts").is_dir():
            for rest in (self.folder / "parts").iterdir():
                rest.unlink()
            (self.folder / "parts").rmdir()
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    @property
    def _whole(self) -> list[Path]:
        whole = self.folder / "samples.npz"
        return [whole] if whole.is_file() else []

    def _read(self, file: Path) -> tuple[list[int], np.ndarray]:
        with np.load(file, allow_pickle=False) as arrays:
            pixels = arrays["arr_0"]
            numbers = arrays["numbers"].tolist() if "numbers" in arrays else range(len(pixels))
        return list(numbers), pixels


def write(images: UInt8[Tensor, "n c h w"], output: Path, *, single: bool) -> None:
    """What is made of the samples for people: a grid to look at, single PNGs."""
    pictures.grid(images, pictures.columns_for(len(images))).save(output / "grid.png")
    if single:
        folder = output / "images"
        folder.mkdir(exist_ok=True)
        for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image.squeeze()).save(folder / f"{number:05d}.png")


def write_trajectory(
    config: DictConfig,
    loaded: Model,
    sampler: Sampler,
    labels: Label,
    device: torch.device,
    output: Path,
) -> None:
    """trajectory.png and trajectory.gif: what the first samples were estimated to be at every evaluation."""
    loaded.denoiser.to(device)
    denoise = in_precision(loaded, config.precision, device)
    seen: list[tuple[float, UInt8[Tensor, "n c h w"]]] = []

    def watched(x_t: Data, t: Time, label: Label = None) -> Data:
        estimate = denoise(x_t, t, label)
        seen.append((float(t[0]), to_uint8(estimate)))
        return estimate

    indices = range(min(SHOWN, config.num_samples))
    noise = SampleNoise(config.seed, indices, loaded.shape, device)
    with torch.inference_mode():
        sampler(watched, noise, None if labels is None else labels[: len(indices)].to(device))
    panels = [(f"t={t:.2g}", pictures.grid(images, 1)) for t, images in seen]
    step = -(-len(panels) // pictures.MOST_COLUMNS)
    pictures.side_by_side(panels[::-step][::-1]).save(output / "trajectory.png")
    frames = torch.stack([images for _, images in seen], 1)
    pictures.animation(frames, output / "trajectory.gif", milliseconds=400)
