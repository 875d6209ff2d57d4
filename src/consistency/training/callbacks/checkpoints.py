"""The checkpoints of a run: last, previous and best."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from consistency import checkpoint
from consistency.errors import require
from consistency.formats import ours
from consistency.training import rotation
from consistency.training.callbacks.evaluation import Evaluation
from consistency.training.callbacks.periodic import Periodic
from consistency.training.faults import tell
from consistency.training.module import ConsistencyModule


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writer with the project's own: whole file or none, with its checksum beside it."""

    def save_checkpoint(
        self, checkpoint_content: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        ours.write(checkpoint_content, Path(path))


class RunCheckpoints(Periodic, Checkpoint):
    """Writes `last.ckpt` every n optimizer steps and at the end, keeps the one before as `previous.ckpt`, and the one
    with the lowest `monitor` as `best.ckpt` (none where nothing is monitored). monitor: a metric, "auto" for the one that the
    evaluation of the run names, if there is an evaluation, or None.

    A run that goes on from any of them ends with the same bits as one that never stopped. A write that fails is told, leaves
    the files of before, and is tried again at the next occasion; the one at the end raises `UserError`. Where a step that is
    not finite stops the run, the state of before that step is kept first.
    """

    def __init__(self, *, folder: str, every_n_train_steps: int, monitor: str | None) -> None:
        super().__init__(every_n_train_steps)
        self.folder, self.monitor = Path(folder), monitor
        self.best_value = self._tried = float("inf")
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
        assert isinstance(module, ConsistencyModule)
        if self._due:
            self._due = False
            self._keep_last_or_tell(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        assert isinstance(module, ConsistencyModule)
        self._keep_best(trainer)
        super().on_train_batch_end(trainer, module, *rest)
        # Weights that are not finite themselves are no state to go back to.
        if module.guard.verdict and all(bool(p.isfinite().all()) for p in module.parameters()):
            self._keep_last_or_tell(trainer, module)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Has the newest kept, but for the end of the run, which does so too."""
        self._due = trainer.global_step < trainer.max_steps

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._keep_best(trainer)
        reason = self.keep_last(trainer)
        require(
            reason is None,
            f"to write the last checkpoint of the run, {self.last}",
            reason,
            "make room or mend the folder; what stands there is the checkpoint before, which resume= continues",
        )

    def keep_last(self, trainer: L.Trainer) -> str | None:
        """Writes `last.ckpt`; returns, on every rank, the reason where that failed, and the old one is still there."""
        fresh = self.folder / checkpoint.NEXT
        return self._reason(trainer, self._written(trainer, fresh) or self._rotated(trainer))

    def _keep_last_or_tell(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        reason = self.keep_last(trainer)
        if reason and trainer.is_global_zero:
            tell(f"the checkpoint of step k={module.k} could not be written: {reason}")

    def _keep_best(self, trainer: L.Trainer) -> None:
        found = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        value = float("inf") if found is None or not torch.isfinite(found) else float(found)
        # One that could not be written is tried once, not at every step until the next measurement.
        if value >= self.best_value or value == self._tried:
            return
        before, self.best_value, self._tried = self.best_value, value, value
        reason = self._reason(trainer, self._written(trainer, self.folder / "best.ckpt"))
        if reason:
            self.best_value = before
            if trainer.is_global_zero:
                tell(f"the best checkpoint so far could not be written: {reason}")

    def _written(self, trainer: L.Trainer, path: Path) -> str | None:
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:
            # The other ranks wait for the writer at the end of `save_checkpoint`, which it has not reached.
            trainer.strategy.barrier()
            return str(error)
        return None

    def _rotated(self, trainer: L.Trainer) -> str | None:
        try:
            if trainer.is_global_zero:
                rotation.promote(self.folder)
        except OSError as error:
            return str(error)
        return None

    @staticmethod
    def _reason(trainer: L.Trainer, reason: str | None) -> str | None:
        """What the rank that writes knows, on every rank."""
        return trainer.strategy.broadcast(reason)
