"""Pictures of a run: samples from fixed noise, and curves of its metrics."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger

from consistency.errors import require
from consistency.inference import plots
from consistency.inference.generate import samples
from consistency.samplers import Sampler
from consistency.training.callbacks.periodic import Periodic
from consistency.training.io_errors import tolerate_write_errors
from consistency.training.loggers import PatientTensorBoardLogger
from consistency.training.module import ConsistencyModule


class SampleGrids(Periodic):
    """Draws a PNG of samples every n steps and at the end: the same noise and classes, one panel a sampler."""

    def __init__(
        self,
        *,
        folder: str,
        samplers: Mapping[str, Sampler],
        weights: str,
        every_n_train_steps: int,
        num_samples: int,
        batch_size: int | None,
        seed: int,
    ) -> None:
        super().__init__(every_n_train_steps)
        expected = "callbacks.samples.num_samples and batch_size >= 1"
        right = num_samples >= 1 and (batch_size is None or batch_size >= 1)
        require(right, expected, (num_samples, batch_size), "give more")
        self.folder, self.samplers, self.weights = Path(folder), samplers, weights
        self.summary = f"Samples:    {self.folder / 'latest.png'}"
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed

    def on_train_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Refuse unknown weights before the first step."""
        with module.sampling(self.weights, self.seed):
            pass

    def on_train_end(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        self.at_step(trainer, module)

    @torch.no_grad()
    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        if not trainer.is_global_zero:
            return
        assert module.card is not None
        classes, count = module.card.num_classes, self.num_samples
        columns, panels = plots.columns_for(count, classes), []
        labels = None if classes is None else list(range(classes))
        with module.sampling(self.weights, self.seed, labels) as request:
            for name, sampler in self.samplers.items():
                images = samples(request, sampler, count, self.batch_size)
                caption = f"{name.replace('_', ' ')}, step {module.k}"
                panels.append((caption, plots.grid(images, columns)))
        sheet = plots.side_by_side(panels)
        with tolerate_write_errors(f"the picture of step k={module.k}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet.save(picture := self.folder / f"step_{module.k:08d}.png")
            shutil.copyfile(picture, self.folder / "latest.png")
        for logger in trainer.loggers:
            if not isinstance(logger, WandbLogger | PatientTensorBoardLogger):
                continue
            for name, panel in zip(self.samplers, panels, strict=True):
                alone = plots.side_by_side([panel])
                logger.log_image(f"samples/{name}", [alone], step=trainer.global_step - 1)


class Curves(Periodic):
    """Draws curves.png from metrics.csv every n steps and at the end."""

    def __init__(self, *, metrics: str, picture: str, every_n_train_steps: int) -> None:
        super().__init__(every_n_train_steps)
        self.metrics, self.picture = Path(metrics), Path(picture)

    def teardown(self, trainer: L.Trainer, module: ConsistencyModule, stage: str) -> None:
        self.at_step(trainer, module)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        for logger in trainer.loggers:
            logger.save()
        if trainer.is_global_zero and self.metrics.is_file():
            with tolerate_write_errors(str(self.picture)):
                plots.draw_curves(self.metrics, self.picture)
