"""Training speed, and the progress bar that shows it."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from consistency.training.module import ConsistencyModule


class Throughput(L.Callback):
    """Logs `images_per_second` over all devices and `training_seconds`, without evaluation, pictures and checkpoints.

    The seconds of a resumed run continue those before.
    """

    def __init__(self) -> None:
        self.total_seconds, self._seconds, self._images = 0.0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"total_seconds": self.total_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total_seconds = state_dict["total_seconds"]

    def on_train_batch_end(
        self, trainer: L.Trainer, module: ConsistencyModule, outputs: Any, batch: Any, index: int
    ) -> None:
        elapsed = time.perf_counter() - module.step_started
        self.total_seconds += elapsed
        self._seconds += elapsed
        images = batch if isinstance(batch, Tensor) else batch[0]
        self._images += len(images) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            module.show("images_per_second", self._images / self._seconds)
            module.log("training_seconds", self.total_seconds)
            self._seconds, self._images = 0.0, 0


class StepBar(TQDMProgressBar):
    """Lightning's progress bar, from the first batch of the run to the last."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Set position and length, which Lightning sets at the start of an epoch: a resumed run starts none."""
        super().on_train_start(trainer, *_)
        bar = self.train_progress_bar
        bar.set_description("Training")
        bar.total = self.total_train_batches
        bar.n = bar.initial = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        bar.refresh()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Keep the bar: a run is one epoch."""

    def on_exception(self, *_: Any) -> None:
        """Close the bar, which would otherwise appear once more below the error message."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

    def get_metrics(self, *arguments: Any) -> dict[str, int | str | float | dict[str, float]]:
        return {k: v for k, v in super().get_metrics(*arguments).items() if k != "v_num"}
