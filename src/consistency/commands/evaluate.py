"""The command `evaluate`: FID, inception score, KID, precision and recall of samples, on any number of devices."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
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

from consistency.checkpoints import ours
from consistency.checkpoints.load import find, load_sets
from consistency.checkpoints.posthoc import POSTHOC, width_of
from consistency.data.decode import MODES, colour_of, read_picture, to_tensor
from consistency.data.listing import files_at
from consistency.data.memory import load_into_memory
from consistency.data.source import Source
from consistency.errors import UserError, require
from consistency.evaluation.metrics import Measure, measure_against
from consistency.inference import options, plots
from consistency.inference.card import ModelCard
from consistency.inference.generate import fitting_batch, generate
from consistency.inference.model import Model
from consistency.runtime.devices import chosen_device, share_threads
from consistency.runtime.files import fingerprint, path_of, require_fresh, write_text
from consistency.runtime.launch import one_job
from consistency.runtime.ranks import batches, print_once, rank_and_size, this_launch
from consistency.runtime.redaction import masked
from consistency.samplers import Sampler
from consistency.tensors import Data, Label, Time
from consistency.training.build import build_loggers, quiet
from consistency.training.loggers import log_results

OF_MODELS = ("snapshots", "role", "autoencoder", "weights", "labels")
"""Options of a checkpoint alone, null by default."""


def evaluate(config: DictConfig, output: Path) -> float:
    """Measure config.num_samples samples of every sampler and every set of weights, or images of samples=.

    Writes evaluation.json and evaluation.md into `output`, and to the loggers. Returns the first value.
    """
    quiet()
    if this_launch().first:
        require_fresh(output)
    one = "checkpoint=<run or file> to draw from, or samples=<folder or .npz> to measure"
    got = "neither" if config.checkpoint is None else "both"
    require((config.checkpoint is None) != (config.samples is None), one, got, "give one of them")
    names = [n for n in OF_MODELS if config.samples is not None and config[n] is not None]
    require(not names, f"checkpoint= with {', '.join(names)}", "samples=", "leave them out")
    device = chosen_device(config.device, config.devices, config.precision)
    with one_job():
        fabric = Fabric(
            accelerator=device.type,
            devices=[device.index] if device.index is not None else config.devices,
            num_nodes=config.num_nodes,
            strategy="ddp" if config.devices * config.num_nodes > 1 else "auto",
        )
        fabric.launch()
        share_threads(device, config.devices)
        measure_all = _evaluate_model if config.samples is None else _evaluate_samples
        return measure_all(config, fabric.device, output).finish()


def _evaluate_model(config: DictConfig, device: torch.device, output: Path) -> "Report":
    # Mistakes in models and samplers are reported before the reference is computed.
    steps = snapshots_of(config)
    places = list(steps.values()) or [config.checkpoint]
    models = models_of(config, places[0])
    samplers = [samplers_of(config, model) for model in models]
    card = models[0].card
    config.batch_size = config.batch_size or fitting_batch(card.shape, device)
    report = Report(config, measure_of(config, card.image_shape, device), output, card, places)
    for number, place in enumerate(places):
        if number > 0:
            models = models_of(config, place)
            samplers = [samplers_of(config, model) for model in models]
        step = {"step": list(steps)[number]} if steps else {}
        _measure_models(config, models, samplers, report, device, step)
    return report


def snapshots_of(config: DictConfig) -> dict[int, Path]:
    """Return the kept checkpoints of the run, by optimizer step, for snapshots=all; none without it."""
    if config.snapshots is None:
        return {}
    expected, remedy = "snapshots=all or null", "leave it out to measure one checkpoint"
    require(config.snapshots == "all", expected, config.snapshots, remedy)
    folder = path_of(config.checkpoint) / ours.CHECKPOINTS
    if not (kept := ours.kept(folder)):
        expected = f"kept checkpoints in {folder}, {ours.kept_path(Path(), 10_000)} and the like"
        remedy = "train with callbacks.checkpoint.keep_every=<steps>, and give the run folder"
        raise UserError(expected, "none", remedy)
    return kept


def models_of(config: DictConfig, checkpoint: Any) -> list[Model]:
    """Open the sets of weights that `weights=` names in a checkpoint."""
    names = [config.weights] if isinstance(config.weights, str) else config.weights
    place = config.autoencoder
    return load_sets(checkpoint, names, role=config.role, autoencoder=place)


def _measure_models(
    config: DictConfig,
    models: Sequence[Model],
    samplers: Sequence[Mapping[str, Sampler]],
    report: "Report",
    device: torch.device,
    step: Mapping[str, int],
) -> None:
    """Measure every set of weights with its samplers; step: of a snapshot."""
    clock, shares = report.measure.clock, batches(config.num_samples, config.batch_size)
    settings: Any = {**config, "device": str(device)}
    for model, named in zip(models, samplers, strict=True):
        request = options.request_of(settings, model)
        for title, sampler in named.items():
            evaluations = list[int]()

            def counted(x_t: Data, t: Time, label: Label = None, **end: Time) -> Data:
                evaluations.append(len(x_t))  # noqa: B023
                with clock.running("network", device):
                    return request.denoise(x_t, t, label, **end)  # noqa: B023

            samples = generate(replace(request, denoise=counted), sampler, shares)
            at = "".join(f", step {k:,}" for k in step.values())
            bar, hidden = f"{title}, {model.weights}{at}", not report.is_writer
            shown = tqdm(samples, bar, len(shares), unit="batch", disable=hidden)
            values = report.measure(iter(shown), config.num_samples)
            nfe = sum(evaluations) / sum(map(len, shares))
            names = {**step, "sampler": title, "weights": model.weights, "nfe": nfe}
            report.write(names, values)
        model.denoiser.cpu()


def _evaluate_samples(config: DictConfig, device: torch.device, output: Path) -> "Report":
    data, count = config.data, config.num_samples
    shape = (data.channels, data.image_size, data.image_size)
    images = given_samples(config.samples, shape, count, data.background)
    config.batch_size = config.batch_size or fitting_batch(shape, device)
    report = Report(config, measure_of(config, shape, device), output)
    shares = batches(count, config.batch_size)
    numbered = ((numbers, images[numbers.start : numbers.stop]) for numbers in shares)
    report.write({"samples": config.samples}, report.measure(numbered, count))
    return report


def samplers_of(config: DictConfig, model: Model) -> dict[str, Sampler]:
    """Build the samplers by name, with the time range and time points of this model."""
    own, samplers = deepcopy(config), {}
    for title, node in own.samplers.items():
        options.fill_process(own, node, model)
        sampler = samplers[str(title)] = instantiate(node, _convert_="all")
        options.require_suited(sampler, model, force=config.force)
    return samplers


def measure_of(config: DictConfig, shape: Sequence[int], device: torch.device) -> Measure:
    """Return the measure against the data set, whose images have the shape of the samples. Collective."""
    data = config.data

    def built(node: DictConfig, in_memory: bool) -> Source:
        source = instantiate(node)
        got, expected = tuple(source.image_shape), f"data of the samples' shape {tuple(shape)}"
        remedy = "choose data= and data.image_size, data.channels as the model was trained"
        require(got == tuple(shape), expected, f"images of shape {got}", remedy)
        return load_into_memory(source) if in_memory else source

    measure = measure_against(
        partial(built, data.source, data.in_memory),
        partial(built, data.held_out, False) if data.held_out else None,
        device,
        **config.evaluation,
        batch_size=config.batch_size,
        num_workers=data.num_workers,
    )
    if config.export is not None and rank_and_size()[0] == 0:
        measure.reference.write(path_of(config.export))
    return measure


def given_samples(
    path: str, shape: Sequence[int], count: int, background: str | None = None
) -> UInt8[Tensor, "n c h w"]:
    """Read the first `count` images of that shape: those below a folder, by name, or the arr_0 of an .npz."""
    file = path_of(path)
    images: Tensor | list[Tensor]
    if file.suffix == ".npz" and file.is_file():
        images = _stored_samples(file)
        total, shapes = len(images), {tuple(images.shape[1:])}
    else:
        files, mode, colour = files_at(path), MODES[shape[0]], colour_of(background)
        total = len(files)
        shown = tqdm(files[:count], "Reading", unit="image", disable=min(total, count) < 1000)
        images = [to_tensor(read_picture(file, mode, colour)) for file in shown]
        shapes = {tuple(image.shape) for image in images}
    remedy = f"set num_samples={total}, or draw more: a measure depends on the number"
    expected = f"num_samples={count} images in samples={path}"
    require(total >= count, expected, f"{total} images", remedy)
    remedy = "choose data= and data.image_size, data.channels of the samples"
    expected = f"samples of the shape of the data, {tuple(shape)}"
    got = f"samples={path} of shape {' and '.join(map(str, sorted(shapes)[:2]))}"
    require(shapes == {tuple(shape)}, expected, got, remedy)
    if total > count:
        print_once(f"samples={path} holds {total:,} images: the first {count:,} are measured")
    return images[:count] if isinstance(images, Tensor) else torch.stack(images)


def _stored_samples(file: Path) -> UInt8[Tensor, "n c h w"]:
    """Read the images of an .npz: arr_0 of 8 bits, channels last, or second if the last axis cannot hold them."""
    pixels: np.ndarray[Any, Any] = np.empty(0)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            got = ", ".join(arrays) or "none"
            if "arr_0" in arrays:
                pixels = arrays["arr_0"]
                got = f"an array of {pixels.dtype} of shape {pixels.shape}"
    except Exception as error:  # damaged files fail in any way
        got = str(error)[:200]
    if pixels.dtype.kind == "f" and pixels.size:
        got += f", from {pixels.min():.3g} to {pixels.max():.3g}"
    is_images = pixels.dtype == np.uint8 and pixels.ndim == 4
    last = is_images and pixels.shape[3] in MODES
    expected = f"an .npz with arr_0, uint8 of shape (n, h, w, 1 or 3), in samples={file}"
    scaled = "(255 * x).round().astype(np.uint8), if x is from 0 to 1"
    remedy = f"write samples as src/sample.py does, np.savez(file, images) of {scaled}"
    require(last or (is_images and pixels.shape[1] in MODES), expected, got, remedy)
    images = torch.from_numpy(pixels)
    return images.permute(0, 3, 1, 2) if last else images


class Report:
    """The results, on the screen, in files and to the loggers of rank 0; written anew after each result."""

    def __init__(
        self,
        config: DictConfig,
        measure: Measure,
        output: Path,
        card: ModelCard | None = None,
        checkpoints: Sequence[str | Path] = (),
    ) -> None:
        self.measure, self.output, self.is_writer = measure, output, rank_and_size()[0] == 0
        self.head: dict[str, Any] = {"seed": config.seed, "precision": config.precision}
        self.results, self.values, self.loggers = list[dict[str, Any]](), list[float](), list[Any]()
        measure.clock.read()
        if not self.is_writer:
            return
        output.mkdir(parents=True, exist_ok=True)
        paths = {str(path): fingerprint(path) for path in map(find, checkpoints)}
        if config.get("snapshots") is not None:
            self.head["snapshots"] = paths
        elif paths:
            self.head["checkpoint"], self.head["sha256"] = next(iter(paths.items()))
        self.head["protocol"] = measure.protocol(config.num_samples, card)
        self.loggers = build_loggers(config)
        settings = masked(OmegaConf.to_container(config, resolve=True))
        for logger in self.loggers:
            logger.log_hyperparams({"evaluation": self.head, "options": settings})

    def write(self, names: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """Write one result; names: its sampler and weights, or its samples."""
        seconds = self.measure.clock.read()
        self.results.append({**names, **values, "seconds": seconds})
        self.values += values.values()
        self.metric = next(iter(values))
        if not self.is_writer:
            return
        text = json.dumps({**self.head, "results": self.results}, indent=2)
        write_text(self.output / "evaluation.json", text + "\n")
        write_text(self.output / "evaluation.md", self.table())
        total, network, extractor = (seconds.get(n, 0) for n in ("total", "network", "extractor"))
        parts = f"{network:.1f} s drawing network, {extractor:.1f} s extractor"
        rest = total - network - extractor
        print(f"{total:.1f} s: {parts}, {rest:.1f} s ({rest / total:.1%}) all else", flush=True)
        title = "/".join(str(names[n]) for n in ("sampler", "weights") if n in names) or "samples"
        for logger in self.loggers:
            step = names.get("step", 0)
            measured = {f"quality/{name}/{title}": v for name, v in values.items()}
            logger.log_metrics(measured, step)

    def table(self) -> str:
        """Return the results as a table, with the protocol under it."""
        names = [name for name in self.results[0] if name != "seconds"]
        rows = [
            [f"{r[n]:.5g}" if isinstance(r[n], float) else str(r[n]) for n in names]
            for r in self.results
        ]
        lines = [f"| {' | '.join(cells)} |" for cells in (names, *rows)]
        lines.insert(1, f"|{'---|' * len(names)}")
        protocol = [f"- {name}: {value}" for name, value in self.head["protocol"].items()]
        return "\n".join([*lines, "", *protocol, ""])

    def finish(self) -> float:
        """Print the table, close the loggers, and return the first value."""
        if self.is_writer:
            print(f"\n{self.table()}\nWritten: {self.output / 'evaluation.json'}")
            self.draw_curve()
            rows = [{n: v for n, v in result.items() if n != "seconds"} for result in self.results]
            log_results(self.loggers, rows, 0)
        for logger in self.loggers:
            logger.finalize("success")
        return self.values[0]

    def draw_curve(self) -> None:
        """Draw the first metric over the steps of snapshots=all or the widths of weights=posthoc:[...]; print each line's
        best point.
        """
        by_step = "step" in self.results[0]
        lines: dict[str, list[tuple[float, float]]] = {}
        for result in self.results:
            if by_step:
                line, x = f"{result['sampler']}, {result['weights']}", result["step"]
            elif str(result.get("weights")).startswith(POSTHOC):
                line, x = result["sampler"], width_of(result["weights"])
            else:
                continue
            lines.setdefault(line, []).append((x, result[self.metric]))
        if max(map(len, lines.values()), default=0) < 2:
            return
        picture = self.output / ("snapshots.png" if by_step else "widths.png")
        label = "optimizer step" if by_step else "relative width of the average"
        scale = "linear" if by_step else "log"
        plots.draw_lines(lines, picture, label, self.metric, scale)
        for line, points in lines.items():
            x, value = min(points, key=lambda point: point[1])
            best = ours.kept_path(Path(), int(x)) if by_step else f"weights={POSTHOC}{x:g}"
            print(f"Best of {line}: {best}, {self.metric} {value:.4g}")
        print(f"Curve:   {picture}")
