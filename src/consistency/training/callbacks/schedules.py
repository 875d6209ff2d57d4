"""Callbacks that publish or apply a schedule: a pure function of the step k, so nothing of it is saved."""

from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import Callback

from consistency.training.module import ConsistencyModule


class ScaleSchedule(Callback):
    """Publishes N(k), `num_scales(k)`, to the objective before every batch."""

    def __init__(self, *, num_scales: Callable[[int], int]) -> None:
        self.num_scales = num_scales

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, ConsistencyModule)
        module.num_scales = self.num_scales(module.k)
        module.log("N", float(module.num_scales), prog_bar=True)


class LearningRateSchedule(Callback):
    """Sets the learning rate to `factor(k)` times the optimizer's own before every batch, and logs it."""

    def __init__(self, *, factor: Callable[[int], float]) -> None:
        self.factor = factor

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, ConsistencyModule)
        for group in trainer.optimizers[0].param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * self.factor(module.k)
        module.log("train/learning_rate", trainer.optimizers[0].param_groups[0]["lr"])
