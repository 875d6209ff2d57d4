"""Sample quality during a run and at its end, in the features of the small classifier."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from consistency.errors import require
from consistency.evaluation.classifier import train_classifier
from consistency.evaluation.quality import ClassifierQuality, Quality, stacked
from consistency.generation import drawn_labels, generate
from consistency.samplers import Sampler
from consistency.training.callbacks.periodic import Periodic
from consistency.training.faults import spared
from consistency.training.module import ConsistencyModule

METRIC = "frechet_classifier"


class ClassifierEvaluation(Periodic):
    """Measures as many samples as there are held-out images, for each sampler, every n steps; at the end over several
    seeds, beside the same numbers for the training images and for noise, and writes `evaluation.json`.

    samplers: by name; the first one's Fréchet distance decides about `best.ckpt`. weights: those samples are drawn with.
    classifier: arguments of `train_classifier`. seeds: sampling seeds averaged over at the end.
    """

    def __init__(
        self,
        *,
        folder: str,
        samplers: Mapping[str, Sampler],
        weights: str,
        every_n_train_steps: int,
        batch_size: int,
        seeds: list[int],
        classifier: dict[str, Any],
    ) -> None:
        super().__init__(every_n_train_steps)
        require(bool(seeds), "at least one of callbacks.evaluation.seeds", seeds, "for example [0]")
        self.file = Path(folder) / "evaluation.json"
        self.samplers, self.weights = samplers, weights
        self.batch_size, self.seeds, self.classifier = batch_size, seeds, classifier
        self.report: dict[str, Any] = {}

    @property
    def monitor(self) -> str:
        """The metric that decides which checkpoint is best."""
        return f"{METRIC}/{next(iter(self.samplers))}"

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule)
        data = module.data
        require(
            data.held_out is not None and data.num_classes is not None,
            "a data set with held-out images and classes for callbacks.evaluation",
            "one without",
            "switch the evaluation off with callbacks.evaluation=null",
        )
        assert data.held_out is not None and data.num_classes is not None
        if trainer.is_global_zero:
            print(
                "Training the small classifier whose features measure the samples ...", flush=True
            )
        model = train_classifier(data.train_source, num_classes=data.num_classes, **self.classifier)
        self.quality = ClassifierQuality(model, data.held_out)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Tells now, not at the first picture, where there are no such weights."""
        assert isinstance(module, ConsistencyModule)
        with module.sampling_denoiser(self.weights):
            pass

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Measures with the first seed; the end of the run has a measurement of its own."""
        if trainer.global_step < trainer.max_steps:
            measured = {
                n: self._measure(module, s, self.seeds[:1]) for n, s in self.samplers.items()
            }
            self._publish(module, measured)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule)
        results = {n: self._measure(module, s, self.seeds) for n, s in self.samplers.items()}
        self._publish(module, results)
        self.report = self._reference(trainer, module) | {
            n: q._asdict() for n, q in results.items()
        }
        if trainer.is_global_zero:
            text = {
                "features": "64 of the small classifier of this repository (not Inception, not FID)",
                "reference": f"{len(self.quality.reference)} held-out images",
                "samples": len(self.quality.reference),
                "seeds": self.seeds,
                "weights": self.weights,
                "k": module.k,
                "results": self.report,
            }
            with spared(str(self.file)):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.write_text(json.dumps(text, indent=2) + "\n")

    def table(self) -> str:
        """The final numbers as text."""
        head = (
            f"{'':<16}{'Fréchet':>9}{'x train':>9}{'precision':>11}{'recall':>8}"
            "   in the small classifier's features (not FID-Inception)"
        )
        base = self.report["train_images"]["frechet"]
        rows = [
            f"{name:<16}{q['frechet']:>9.3f}{q['frechet'] / base:>9.2f}{q['precision']:>11.3f}{q['recall']:>8.3f}"
            for name, q in self.report.items()
        ]
        return "\n".join([head, *rows])

    def _publish(self, module: ConsistencyModule, results: dict[str, Quality]) -> None:
        """Logs once, where `module.log` would repeat the value in every later row; tells the checkpoints."""
        trainer = module.trainer
        for name, quality in results.items():
            values = {f"{field}_classifier/{name}": v for field, v in quality._asdict().items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=module.k)
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})

    def _share(self, trainer: L.Trainer) -> range:
        return range(trainer.global_rank, len(self.quality.reference), trainer.world_size)

    def _measure(self, module: ConsistencyModule, sampler: Sampler, seeds: list[int]) -> Quality:
        trainer, data = module.trainer, module.data
        indices = self._share(trainer)
        found = []
        with module.sampling_denoiser(self.weights) as denoiser:
            for seed in seeds:
                labels = drawn_labels(seed, indices, data.num_classes) if data.num_classes else None
                shares = generate(
                    denoiser,
                    sampler,
                    indices=indices,
                    labels=labels,
                    shape=(data.channels, data.image_size, data.image_size),
                    seed=seed,
                    batch_size=self.batch_size,
                    device=module.device,
                )
                found.append(self.quality.measure(shares, module.device))
        return Quality(*(sum(values) / len(found) for values in zip(*found, strict=True)))

    def _reference(
        self, trainer: L.Trainer, module: ConsistencyModule
    ) -> dict[str, dict[str, float]]:
        """The same numbers for the training images, which bound what can be hoped for, and for noise."""
        train = stacked(module.data.train_source)[trainer.global_rank :: trainer.world_size]
        draw = torch.Generator().manual_seed(self.seeds[0])
        noise = torch.randint(256, self.quality.reference.shape, generator=draw, dtype=torch.uint8)[
            trainer.global_rank :: trainer.world_size
        ]
        measured = {"train_images": train, "noise": noise}
        return {
            name: self.quality.measure(iter([images]), module.device)._asdict()
            for name, images in measured.items()
        }
