"""Sample quality during a run and at its end."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch

from consistency.errors import require
from consistency.evaluation.metrics import Measure, measure_against
from consistency.evaluation.reference import images_of
from consistency.evaluation.results import INCEPTION
from consistency.inference.generate import Numbered, counting, fitting_batch, generate
from consistency.randomness import generator
from consistency.runtime.files import write_text
from consistency.runtime.ranks import batches, print_once
from consistency.samplers import Sampler
from consistency.training.callbacks.periodic import Periodic, callback_of
from consistency.training.callbacks.progress import Throughput
from consistency.training.io_errors import tolerate_write_errors
from consistency.training.loggers import log_results
from consistency.training.module import ConsistencyModule

Values = dict[str, dict[str, float]]
"""Values by metric, by sampler and weights."""


class Evaluation(Periodic):
    """Measures samples of each sampler and each set of weights every n steps, and at the end for evaluation.json.

    A metric is called quality/<metric>/<sampler>/<weights>. If the reference is held out, the final results have those of the
    training images and of noise beside them. conf/evaluation and conf/metrics explain the arguments.
    """

    def __init__(
        self,
        *,
        folder: str,
        samplers: Mapping[str, Sampler],
        weights: Sequence[str],
        every_n_train_steps: int,
        num_samples: int | None,
        batch_size: int | None,
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
        self.nfe: dict[str, float] = {}
        metrics: dict[str, Any] = {"extractor": extractor, "reference": reference, "cache": cache}
        metrics |= {"reference_features": reference_features}
        self.measure_against: Callable[..., Measure] = partial(measure_against, **metrics)

    @property
    def monitor(self) -> str:
        """The metric that decides which checkpoint is best: the Fréchet distance of the first sampler and weights."""
        metric = self.measure.extractor.named("frechet")
        return f"quality/{metric}/{next(iter(self.samplers))}/{self.weights[0]}"

    def on_fit_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        data, device = module.data, module.device
        self.batch = self.batch_size or fitting_batch(data.train_source.shape, device)
        loading = {"batch_size": self.batch, "num_workers": data.num_workers}
        sources = (lambda: data.train_source), data.held_out
        self.measure = self.measure_against(*sources, device, **loading)
        self.count = self.measure.count(self.num_samples)

    def on_train_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Refuse unknown weights before the first step."""
        for weights in self.weights:
            with module.sampling(weights, self.seeds[0]):
                pass

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        self._measure_all(module, self.seeds[:1])

    def on_train_end(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        results = self._bounds(module) | self._measure_all(module, self.seeds)
        self.summary = self._table(results)
        log_results(
            trainer.loggers,
            [{"samples": n, **v} for n, v in results.items()],
            trainer.global_step - 1,
        )
        if trainer.is_global_zero:
            protocol = self.measure.protocol(self.count, module.card)
            content = dict(protocol=protocol, seeds=self.seeds, k=module.k, nfe=self.nfe)
            content["results"] = results
            with tolerate_write_errors(str(self.file)):
                write_text(self.file, json.dumps(content, indent=2) + "\n")

    def _table(self, results: Values) -> str:
        extractor, reference = self.measure.extractor, self.measure.reference
        shown = [name for name in next(iter(results.values())) if "_std" not in name]
        title = f"{self.count} samples against {reference.count} images"
        if extractor.name != INCEPTION:
            title += f" in the features of {extractor.name}: not FID"
        bound = results.get("train_images", {}).get(shown[0])
        times = f"{'x train':>9}" if bound else ""
        lines = [title, f"{'':<24}{times}" + "".join(f"{name:>{len(name) + 2}}" for name in shown)]
        for title, values in results.items():
            times = f"{values[shown[0]] / bound:>9.2f}" if bound else ""
            cells = "".join(f"{values[name]:>{len(name) + 2}.4g}" for name in shown)
            lines.append(f"{title:<24}{times}{cells}")
        return "\n".join(lines)

    def _measure_all(self, module: ConsistencyModule, seeds: Sequence[int]) -> Values:
        """Measure every sampler and set of weights, and log the means over the seeds and the time."""
        trainer, results, began = module.trainer, {}, time.perf_counter()
        for weights, (name, sampler) in product(self.weights, self.samplers.items()):
            runs = []
            for seed in seeds:
                with module.sampling(weights, seed) as request:
                    request, evaluations = counting(request)
                    shares = batches(self.count, self.batch)
                    images = generate(request, sampler, shares)
                    runs.append(self.measure(images, self.count))
            self.nfe[name] = sum(evaluations) / sum(map(len, shares))
            means = {metric: sum(run[metric] for run in runs) / len(runs) for metric in runs[0]}
            results[f"{name}/{weights}"] = means
        seconds = time.perf_counter() - began
        drawn = self.count * len(results) * len(seeds)
        print_once(f"Evaluation at step {module.k}: {drawn:,} samples in {seconds:.1f} s")
        values = {
            f"quality/{metric}/{title}": value
            for title, means in results.items()
            for metric, value in means.items()
        }
        values["speed/evaluation_seconds"] = seconds
        if (throughput := callback_of(trainer, Throughput)) is not None:
            values |= throughput.axes
        # `module.log` would repeat the values in every later row.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)  # the row of this step
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})
        return results

    def _bounds(self, module: ConsistencyModule) -> Values:
        """Measure the training images, which bound the samples, and noise; nothing if they are the reference."""
        if self.measure.reference.protocol["reference"].get("set") != "held_out":
            return {}
        train = module.data.train_source
        workers, device = module.data.num_workers, module.device
        images = images_of(train, self.batch, workers, "Train images", device)
        return {
            "train_images": self.measure(images, len(train)),
            "noise": self.measure(self._noise(module), self.count),
        }

    def _noise(self, module: ConsistencyModule) -> Iterator[Numbered]:
        assert module.card is not None
        for numbers in batches(self.count, self.batch):
            draws = (generator(self.seeds[0], "noise_image", number) for number in numbers)
            shape = module.card.image_shape
            images = [torch.randint(256, shape, generator=d, dtype=torch.uint8) for d in draws]
            yield numbers, torch.stack(images)
