"""Schedules N(k) and the learning rate: functions of the step k, so a resumed run needs no state of theirs."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from consistency.training.module import ConsistencyModule


class ScaleSchedule(L.Callback):
    """Sets N(k), the `num_scales` of the objective, or the number that a method has in its place, `shown` under its name."""

    def __init__(self, *, num_scales: Callable[[int], Any], shown: str = "N") -> None:
        self.num_scales, self.shown = num_scales, shown

    def on_train_batch_start(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        module.num_scales = self.num_scales(module.k)
        if module.logs_this_step:
            module.show(f"schedule/{self.shown}", module.num_scales)


class LearningRateSchedule(L.Callback):
    """Sets the learning rate to `factor(k)` times the optimizer's own, and logs it."""

    def __init__(self, *, factor: Callable[[int], float]) -> None:
        self.factor = factor

    def on_train_batch_start(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        for group in groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.factor(module.k)
        if module.logs_this_step:
            # A tensor, as Lightning would wait for the device to send a number there.
            module.log("schedule/learning_rate", torch.tensor(float(groups[0]["lr"])))
