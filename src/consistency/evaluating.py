"""The command that measures samples: FID, inception score, KID, precision and recall, on any number of devices."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import UInt8
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from consistency.checkpoint import find, load_sets
from consistency.command import require_fresh
from consistency.data.decoding import MODES, colour_of, read_picture, to_tensor
from consistency.data.held import load_into_memory
from consistency.data.listing import files_at
from consistency.data.source import Source
from consistency.errors import UserError, require
from consistency.evaluation.measuring import Measure, Numbered, Settings, drawn
from consistency.paths import path_of
from consistency.runtime.files import fingerprint
from consistency.runtime.launch import one_job
from consistency.runtime.ranks import batches, is_first, rank_and_size
from consistency.sampling import (
    bound_sampler,
    chosen_device,
    in_precision,
    plain,
    require_devices,
    require_suited,
)
from consistency.tensors import Data, Denoise, Label, Time
from consistency.training.build import build_loggers, quiet


def evaluate(config: DictConfig, output: Path) -> float:
    """Measures config.num_samples samples of every sampler and every set of weights, or images already drawn, against a
    data set; writes evaluation.json and evaluation.md into `output`, and to the loggers. Returns the first value measured.
    """
    quiet()
    if is_first():
        require_fresh(output)
    require(
        (config.checkpoint is None) != (config.samples is None),
        "checkpoint=<run or file> to draw from, or samples=<folder or .npz> that are there",
        "neither" if config.checkpoint is None else "both",
        "give one of them",
    )
    device = chosen_device(config.device)
    require_devices(config, device)
    several = config.devices * config.num_nodes > 1
    with one_job():
        fabric = Fabric(
            accelerator=device.type,
            devices=[device.index] if device.index is not None else config.devices,
            num_nodes=config.num_nodes,
            strategy="ddp" if several else "auto",
        )
        fabric.launch()
        if several and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.devices))
        return _evaluate(config, fabric.device, output)


def _evaluate(config: DictConfig, device: torch.device, output: Path) -> float:
    # What can be wrong with models, samplers and images is told before a reference is computed.
    data, settings = config.data, Settings(**config.evaluation, batch_size=config.batch_size)
    wanted = (data.channels, data.image_size, data.image_size)
    models, images = [], torch.empty(0)
    if config.samples is None:
        names = [config.weights] if isinstance(config.weights, str) else config.weights
        models = load_sets(config.checkpoint, names, role=config.role)
        wanted = models[0].shape
    else:
        images = given_samples(config.samples, wanted, config.num_samples, data.background)
    samplers = {
        title: bound_sampler(node, config, models[0])
        for title, node in config.samplers.items()
        if models
    }
    for sampler in samplers.values():
        require_suited(sampler, models[0], force=config.force)

    def train() -> Source:
        source = instantiate(data.source)
        return fitting(load_into_memory(source) if data.in_memory else source, wanted)

    def held_out() -> Source:
        return fitting(instantiate(data.held_out), wanted)

    measure = settings.prepare(
        device,
        train=train,
        held_out=held_out if data.held_out else None,
        num_workers=data.num_workers,
    )
    if config.export is not None and rank_and_size()[0] == 0:
        measure.reference.write(path_of(config.export))
    report = Report(config, measure, output)
    shares = batches(config.num_samples, config.batch_size)
    if config.samples is not None:
        numbered = ((numbers, images[numbers.start : numbers.stop]) for numbers in shares)
        report.add({"samples": config.samples}, measure(numbered, config.num_samples))
        report.end()
        return report.values[0]
    for loaded in models:
        loaded.denoiser.to(device)
        denoise = in_precision(loaded, config.precision, device)
        for title, sampler in samplers.items():
            counted = Counted(measure.clock.timed("network", denoise, device))
            samples = drawn(
                counted,
                sampler,
                loaded.card,
                count=config.num_samples,
                labels=plain(config.labels),
                seed=config.seed,
                batch_size=config.batch_size,
                device=device,
            )
            shown = watched(samples, f"{title}, {loaded.weights}", len(shares))
            found = measure(shown, config.num_samples)
            nfe = counted.evaluations / sum(len(share) for share in shares)
            report.add({"sampler": title, "weights": loaded.weights, "nfe": nfe}, found)
        loaded.denoiser.cpu()
    report.end()
    return report.values[0]


def watched(samples: Iterator[Numbered], title: str, total: int) -> Iterator[Numbered]:
    """The same batches, with a bar for the person who waits."""
    hidden = rank_and_size()[0] > 0 or total < 2
    yield from tqdm(samples, title, total=total, unit="batch", disable=hidden)


def fitting(source: Source, shape: Sequence[int]) -> Source:
    """The source, whose images have to be of that shape."""
    found = tuple(source[0][0].shape)
    require(
        found == tuple(shape),
        f"data of the samples' shape {tuple(shape)}",
        f"images of shape {found}",
        "choose data= and data.image_size, data.channels as the model was trained",
    )
    return source


def given_samples(
    path: str, shape: Sequence[int], count: int, background: str | None = None
) -> UInt8[Tensor, "n c h w"]:
    """The first `count` images, of that shape, of all below a folder, by name, or of the arr_0 of an .npz."""
    file = path_of(path)
    if file.suffix == ".npz" and file.is_file():
        images = _stored_samples(file)
        there = len(images)
    else:
        files = files_at(path)
        there, files, ground = len(files), files[:count], colour_of(background)
        shown = tqdm(files, desc="Reading", unit="image", disable=len(files) < 1000)
        pictures = [to_tensor(read_picture(each, MODES[shape[0]], ground)) for each in shown]
        shapes = {tuple(picture.shape) for picture in pictures}
        require(
            len(shapes) == 1,
            f"images of one size in samples={path}",
            f"{len(shapes)} shapes, {' and '.join(map(str, sorted(shapes)[:2]))} among them",
            "give samples as they were drawn",
        )
        images = torch.stack(pictures)
    require(
        len(images) >= count,
        f"num_samples={count} images in samples={path}",
        f"{len(images)} images",
        f"say num_samples={len(images)}, or draw more: a measure depends on the number",
    )
    require(
        tuple(images.shape[1:]) == tuple(shape),
        f"samples of the shape of the data, {tuple(shape)}",
        f"samples={path} of shape {tuple(images.shape[1:])}",
        "choose data= and data.image_size, data.channels of the samples",
    )
    if there > count and rank_and_size()[0] == 0:
        print(f"samples={path} holds {there:,} images: the first {count:,} are measured")
    return images[:count]


def _stored_samples(file: Path) -> UInt8[Tensor, "n c h w"]:
    """The images of an .npz: arr_0 of 8 bits, its channels last, or second where that is the only way to read it."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            require(
                "arr_0" in arrays,
                f"an array arr_0 in samples={file}",
                f"{', '.join(arrays) or 'none'}",
                "write samples as src/sample.py does: np.savez(file, images), uint8 of shape (n, h, w, 1 or 3)",
            )
            pixels = arrays["arr_0"]
    except UserError:
        raise
    except Exception as error:  # damaged files fail in any way
        pixels, got = np.empty(0), str(error)[:200]
    else:
        got = f"an array of {pixels.dtype} of shape {pixels.shape}"
        if pixels.dtype.kind == "f" and pixels.size:
            got += f", from {pixels.min():.3g} to {pixels.max():.3g}"
    known = pixels.dtype == np.uint8 and pixels.ndim == 4
    if known and pixels.shape[3] not in MODES and pixels.shape[1] in MODES:
        return torch.from_numpy(pixels)
    require(
        known and pixels.shape[3] in MODES,
        f"an .npz with arr_0, uint8 of shape (n, h, w, 1 or 3), in samples={file}",
        got,
        "write samples as src/sample.py does; values from 0 to 1 become (255 * x).round().astype(np.uint8)",
    )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class Counted:
    """A denoiser whose evaluations are counted, one for each image in a batch."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.evaluations = denoise, 0

    def __call__(self, x_t: Data, t: Time, label: Label = None) -> Data:
        self.evaluations += len(x_t)
        return self.denoise(x_t, t, label)


class Report:
    """What was measured, on the screen, in files and to the loggers; written anew after each result."""

    def __init__(self, config: DictConfig, measure: Measure, output: Path) -> None:
        self.measure, self.output = measure, output
        self.head: dict[str, Any] = {"seed": config.seed, "precision": config.precision}
        self.results: list[dict[str, Any]] = []
        self.values: list[float] = []
        self.loggers: list[Any] = []
        measure.clock.read()
        if rank_and_size()[0] > 0:
            return
        output.mkdir(parents=True, exist_ok=True)
        if config.checkpoint is not None:
            path = find(config.checkpoint)
            self.head |= {"checkpoint": str(path), "sha256": fingerprint(path)}
        self.head["protocol"] = measure.protocol(config.num_samples)
        self.loggers = build_loggers(config)
        for logger in self.loggers:
            logger.log_hyperparams(
                {"evaluation": self.head, "config": OmegaConf.to_container(config, resolve=True)}
            )

    def add(self, what: Mapping[str, Any], found: Mapping[str, float]) -> None:
        """Takes in one result."""
        seconds = self.measure.clock.read()
        self.results.append({**what, **found, "seconds": seconds})
        self.values += found.values()
        if rank_and_size()[0] > 0:
            return
        text = json.dumps({**self.head, "results": self.results}, indent=2)
        (self.output / "evaluation.json").write_text(text + "\n")
        (self.output / "evaluation.md").write_text(self.table())
        outside = seconds["total"] - seconds.get("network", 0) - seconds["extractor"]
        print(
            f"{seconds['total']:.1f} s: {seconds.get('network', 0):.1f} s drawing network, {seconds['extractor']:.1f} s "
            f"extractor, {outside:.1f} s ({outside / seconds['total']:.1%}) all else",
            flush=True,
        )
        whose = "/".join(str(what[name]) for name in ("sampler", "weights") if name in what)
        for logger in self.loggers:
            logger.log_metrics({f"{n}/{whose or 'samples'}": v for n, v in found.items()}, 0)

    def table(self) -> str:
        """The results as a table, and the protocol under it."""
        names = [name for name in self.results[0] if name != "seconds"]
        lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        for result in self.results:
            cells = [v if isinstance(v, str) else f"{v:.5g}" for v in (result[n] for n in names)]
            lines.append(f"| {' | '.join(cells)} |")
        protocol = (f"- {name}: {value}" for name, value in self.head["protocol"].items())
        return "\n".join([*lines, "", *protocol, ""])

    def end(self) -> None:
        """Prints the table and closes the loggers."""
        if rank_and_size()[0] > 0:
            return
        print(f"\n{self.table()}\nWritten: {self.output / 'evaluation.json'}")
        for logger in self.loggers:
            logger.finalize("success")
