"""Sample quality during a run and at its end."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import lightning as L
import torch

from consistency.data.source import Source
from consistency.errors import require
from consistency.evaluation.extractors import INCEPTION
from consistency.evaluation.measuring import Measure, Numbered, Settings, drawn
from consistency.evaluation.reference import images_of
from consistency.randomness import generator
from consistency.runtime.ranks import batches
from consistency.samplers import Sampler
from consistency.training.callbacks.periodic import Periodic
from consistency.training.io_errors import tolerate_write_errors
from consistency.training.module import ConsistencyModule


class Evaluation(Periodic):
    """Measures samples of each sampler and each set of weights every n steps, and over several seeds at the end, where it
    writes `evaluation.json`; beside the numbers of the training images and of noise where the reference is held out.

    samplers: by name; weights: the sets that samples are drawn with. A metric is called <measure>/<sampler>/<weights>, and
    the Fréchet distance of the first ones is `monitor`. num_samples: None for as many as the reference has images.
    batch_size: samples that a device draws and measures at once. seeds: sampling seeds, the first on the way, the mean over all
    at the end. The rest: `consistency.evaluation.measuring.Settings`. All ranks draw and all compute.
    """

    def __init__(
        self,
        *,
        folder: str,
        samplers: Mapping[str, Sampler],
        weights: Sequence[str],
        every_n_train_steps: int,
        num_samples: int | None,
        batch_size: int,
        seeds: Sequence[int],
        extractor: str,
        reference: str | None,
        reference_features: int,
        cache: str | None,
    ) -> None:
        super().__init__(every_n_train_steps)
        for name, value in (("seeds", seeds), ("weights", weights), ("samplers", samplers)):
            require(bool(value), f"at least one of callbacks.evaluation.{name}", value, "name one")
        self.file = Path(folder) / "evaluation.json"
        self.samplers, self.weights, self.seeds = samplers, list(weights), list(seeds)
        self.num_samples, self.batch_size = num_samples, batch_size
        self.settings = Settings(
            extractor=extractor,
            reference=reference,
            reference_features=reference_features,
            cache=cache,
            batch_size=batch_size,
        )
        self.report: dict[str, dict[str, float]] = {}

    @property
    def monitor(self) -> str:
        """The metric that decides which checkpoint is best."""
        extractor = self.measure.extractor
        return f"{extractor.named('frechet')}/{next(iter(self.samplers))}/{self.weights[0]}"

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule)
        data = module.data
        held_out = data.held_out
        self.measure: Measure = self.settings.prepare(
            module.device,
            train=lambda: data.train_source,
            held_out=None if held_out is None else lambda: held_out,
            num_workers=data.num_workers,
        )
        self.count = self.measure.count(self.num_samples)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Tells now, not at the first picture, where there are no such weights."""
        assert isinstance(module, ConsistencyModule)
        for weights in self.weights:
            with module.sampling_denoiser(weights):
                pass

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Measures with the first seed; the end of the run has a measurement of its own."""
        if trainer.global_step < trainer.max_steps:
            self._measure_all(module, self.seeds[:1])

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule)
        self.report = self._bounds(module) | self._measure_all(module, self.seeds)
        if trainer.is_global_zero:
            text = {
                "protocol": self.measure.protocol(self.count),
                "seeds": self.seeds,
                "k": module.k,
                "results": self.report,
            }
            with tolerate_write_errors(str(self.file)):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.write_text(json.dumps(text, indent=2) + "\n")

    def table(self) -> str:
        """The final numbers as text."""
        extractor = self.measure.extractor
        names = list(next(iter(self.report.values())))
        shown = [name for name in names if "_std" not in name]
        whose = (
            "" if extractor.name == INCEPTION else f" in the features of {extractor.name}: not FID"
        )
        lines = [f"{self.count} samples against {self.measure.reference.count} images{whose}"]
        bound = self.report.get("train_images", {}).get(names[0])
        times = f"{'x train':>9}" if bound else ""
        lines.append(f"{'':<24}{times}" + "".join(f"{n:>{len(n) + 2}}" for n in shown))
        for title, values in self.report.items():
            times = f"{values[names[0]] / bound:>9.2f}" if bound else ""
            cells = "".join(f"{values[name]:>{len(name) + 2}.4g}" for name in shown)
            lines.append(f"{title:<24}{times}{cells}")
        return "\n".join(lines)

    def _measure_all(
        self, module: ConsistencyModule, seeds: Sequence[int]
    ) -> dict[str, dict[str, float]]:
        """The measures of every sampler and set of weights, logged, told to the checkpoints, and their time printed."""
        began = time.perf_counter()
        trainer, found = module.trainer, {}
        for weights in self.weights:
            for name, sampler in self.samplers.items():
                runs = [
                    self.measure(self._drawn(module, weights, sampler, seed), self.count)
                    for seed in seeds
                ]
                found[f"{name}/{weights}"] = {
                    measure: sum(run[measure] for run in runs) / len(runs) for measure in runs[0]
                }
        seconds = time.perf_counter() - began
        if trainer.is_global_zero:
            samples = self.count * len(self.weights) * len(self.samplers) * len(seeds)
            print(
                f"Evaluation at step {module.k}: {samples:,} samples in {seconds:.1f} s", flush=True
            )
        values = {
            f"{measure}/{title}": value
            for title, measures in found.items()
            for measure, value in measures.items()
        } | {"evaluation_seconds": seconds}
        # Logged once, where `module.log` would repeat the value in every later row.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)  # the row of this step
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})
        return found

    def _drawn(
        self, module: ConsistencyModule, weights: str, sampler: Sampler, seed: int
    ) -> Iterator[Numbered]:
        assert module.card is not None
        with module.sampling_denoiser(weights) as denoiser:
            yield from drawn(
                denoiser,
                sampler,
                module.card,
                count=self.count,
                labels=None,
                seed=seed,
                batch_size=self.batch_size,
                device=module.device,
            )

    def _bounds(self, module: ConsistencyModule) -> dict[str, dict[str, float]]:
        """The same numbers for the training images, which bound what can be hoped for, and for noise; nothing where the
        reference is the training images themselves.
        """
        reference = self.measure.reference
        if reference.protocol["reference"].get("set") != "held_out":
            return {}
        train: Source = module.data.train_source
        images = images_of(train, self.batch_size, module.data.num_workers, "Train images")
        found = {"train_images": self.measure(images, len(train))}
        found["noise"] = self.measure(self._noise(module), self.count)
        return found

    def _noise(self, module: ConsistencyModule) -> Iterator[Numbered]:
        data = module.data
        shape = (data.channels, data.image_size, data.image_size)
        for numbers in batches(self.count, self.batch_size):
            draws = (generator(self.seeds[0], "noise_image", number) for number in numbers)
            images = [torch.randint(256, shape, generator=d, dtype=torch.uint8) for d in draws]
            yield numbers, torch.stack(images)
