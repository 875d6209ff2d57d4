"""What a person looks at while a run goes on: samples from fixed noise, and the curves."""

from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger

from consistency import pictures
from consistency.errors import require
from consistency.generation import generate
from consistency.samplers import Sampler
from consistency.training.callbacks.periodic import Periodic
from consistency.training.io_errors import tolerate_write_errors
from consistency.training.logging import PatientTensorBoardLogger
from consistency.training.module import ConsistencyModule


class SampleGrids(Periodic):
    """Every n steps and at the end: a PNG of samples from the same noise and classes, one panel a sampler."""

    def __init__(
        self,
        *,
        folder: str,
        samplers: Mapping[str, Sampler],
        weights: str,
        every_n_train_steps: int,
        num_samples: int,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__(every_n_train_steps)
        require(
            num_samples >= 1 and batch_size >= 1,
            "callbacks.samples.num_samples and batch_size of at least 1",
            (num_samples, batch_size),
            "give positive numbers",
        )
        self.folder, self.samplers, self.weights = Path(folder), samplers, weights
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._drawn = -1

    @property
    def newest(self) -> Path:
        """The picture drawn last."""
        return self.folder / "latest.png"

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Tells now, not at the first picture, where there are no such weights."""
        assert isinstance(module, ConsistencyModule)
        with module.sampling_denoiser(self.weights):
            pass

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Draws the samples."""
        self._draw(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule)
        if module.k != self._drawn:
            self._draw(trainer, module)

    @torch.no_grad()
    def _draw(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        self._drawn = module.k
        if not trainer.is_global_zero:
            return
        card = module.card
        assert card is not None
        num_classes = card.num_classes
        count = self.num_samples
        columns = pictures.columns_for(count, num_classes)
        labels = None if num_classes is None else torch.arange(count) % num_classes
        panels = []
        with module.sampling_denoiser(self.weights) as denoiser:
            for name, sampler in self.samplers.items():
                batches = generate(
                    denoiser,
                    sampler,
                    indices=range(count),
                    labels=labels,
                    shape=card.shape,
                    seed=self.seed,
                    batch_size=self.batch_size,
                    device=module.device,
                )
                caption = f"{name.replace('_', ' ')}, step {module.k}"
                panels.append((caption, pictures.grid(torch.cat(list(batches)).cpu(), columns)))
        sheet = pictures.side_by_side(panels)
        with tolerate_write_errors(f"the picture of step k={module.k}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet.save(self.folder / f"step_{module.k:08d}.png")
            sheet.save(self.newest)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [sheet], step=module.k)
            if isinstance(logger, PatientTensorBoardLogger):
                # With the metrics of the step, which a run that goes on after it keeps.
                logger.log_image("samples", [sheet], step=trainer.global_step - 1)


class Curves(Periodic):
    """Draws curves.png from metrics.csv every n steps and at the end."""

    def __init__(self, *, metrics: str, picture: str, every_n_train_steps: int) -> None:
        super().__init__(every_n_train_steps)
        self.metrics, self.picture = Path(metrics), Path(picture)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Draws the curves."""
        self._draw(trainer)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        if trainer.is_global_zero and self.metrics.is_file():
            with tolerate_write_errors(str(self.picture)):
                pictures.draw_curves(self.metrics, self.picture)
