"""The checkpoints of a run: last, previous and best."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from consistency import checkpoint
from consistency.training import rotation
from consistency.training.callbacks.evaluation import Evaluation
from consistency.training.callbacks.periodic import Periodic
from consistency.training.module import ConsistencyModule


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writer with the project's own: whole file or none, with its checksum beside it."""

    def save_checkpoint(
        self, checkpoint_content: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        checkpoint.write(checkpoint_content, Path(path))


class RunCheckpoints(Periodic, Checkpoint):
    """Writes `last.ckpt` every n optimizer steps and at the end, keeps the one before as `previous.ckpt`, and the one
    with the lowest `monitor` as `best.ckpt` (none where nothing is monitored). monitor: a metric, "auto" for the one that the
    evaluation of the run names, if there is an evaluation, or None.

    A run that goes on from any of them ends with the same bits as one that never stopped.
    """

    def __init__(self, *, folder: str, every_n_train_steps: int, monitor: str | None) -> None:
        super().__init__(every_n_train_steps)
        self.folder, self.monitor = Path(folder), monitor
        self.best_value = float("inf")
        self._due = False

    @property
    def last(self) -> Path:
        """Where the newest checkpoint stands."""
        return self.folder / checkpoint.LAST

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning's counters as they are between two steps, whichever hook saves: a run has one endless epoch, and
        the checkpoint at its end must not say that it is over, or a longer run could not go on.
        """
        done = trainer.global_step * trainer.accumulate_grad_batches
        fit: dict[str, Any] = checkpoint["loops"]["fit_loop"]
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1
        fit["epoch_loop.batch_progress"]["is_last_batch"] = False
        for count in ("total", "current"):
            batches = {"ready": done, "started": done, "processed": done, "completed": done - 1}
            fit["epoch_loop.batch_progress"][count] = batches
            epochs = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            fit["epoch_progress"][count] = epochs

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Every process has read the checkpoint that it goes on from by now, so the files may be moved."""
        if self.monitor == "auto":
            named = [c.monitor for c in trainer.callbacks if isinstance(c, Evaluation)]  # type: ignore[attr-defined]
            self.monitor = next(iter(named), None)
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            rotation.settle(Path(trainer.ckpt_path))

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Saves when the next step begins: only then do the metrics have the row of the last one."""
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        if self._due:
            self._due = False
            self._keep_last(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        self._keep_best(trainer)
        super().on_train_batch_end(trainer, module, *rest)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Has the newest kept, but for the end of the run, which does so too."""
        self._due = trainer.global_step < trainer.max_steps

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._keep_best(trainer)
        self._keep_last(trainer)

    def _keep_best(self, trainer: L.Trainer) -> None:
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        if value is not None and torch.isfinite(value) and float(value) < self.best_value:
            self.best_value = float(value)
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=False)

    def _keep_last(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / checkpoint.NEXT, weights_only=False)
        if trainer.is_global_zero:
            rotation.promote(self.folder)
        trainer.strategy.barrier()
