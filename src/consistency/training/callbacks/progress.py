"""Speed, and the bar that shows it."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from consistency.training.module import ConsistencyModule


class Throughput(Callback):
    """Logs `images_per_second` over all devices and `training_seconds`, both without evaluation, pictures and checkpoints.

    A resumed run goes on with the seconds of the run before it.
    """

    def __init__(self) -> None:
        self._seconds, self._images = 0.0, 0
        self.total_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"total_seconds": self.total_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total_seconds = state_dict["total_seconds"]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, ConsistencyModule)
        elapsed = time.perf_counter() - module.step_started
        self.total_seconds += elapsed
        self._seconds += elapsed
        images = batch if isinstance(batch, Tensor) else batch[0]
        self._images += len(images) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            module.log("images_per_second", self._images / self._seconds, prog_bar=True)
            module.log("training_seconds", self.total_seconds)
            self._seconds, self._images = 0.0, 0


class StepBar(TQDMProgressBar):
    """Lightning's progress bar, counting from the first batch to the last of the run."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """A run that goes on stands where it was, and Lightning begins no epoch, which would say how long it is."""
        super().on_train_start(trainer, *_)
        bar = self.train_progress_bar
        bar.total = self.total_train_batches
        bar.n = bar.initial = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        bar.refresh()

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.set_description("Training")
        return bar

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer, *_)
        self.train_progress_bar.set_description("Training")

    def on_exception(self, *_: Any) -> None:
        """Closes the bar, or it is drawn once more below the message that tells why the run has ended."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
