"""The checkpoints of a run: last, previous, best, and those that it keeps."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from consistency.checkpoints import ours
from consistency.errors import require
from consistency.evaluation.results import sign_of
from consistency.training.callbacks.evaluation import Evaluation
from consistency.training.callbacks.periodic import Periodic, callback_of
from consistency.training.io_errors import warn
from consistency.training.lightning_patches import set_counters
from consistency.training.module import ConsistencyModule


class RunCheckpoints(Periodic, Checkpoint):
    """Writes `last.ckpt` every n optimizer steps and at the end, the one before as `previous.ckpt`, the best as `best.ckpt`.

    If a write fails, the files of before stay, and the next occasion tries again; at the end of the run it is a
    `UserError`. If a step that is not finite stops the run, the state before that step is saved first.

    monitor: the metric of which best.ckpt has the best value, "auto" for that of the run's evaluation, or None.

    keep_every: optimizer steps between the checkpoints step_<k>.ckpt, which stay; None for none.
    """

    def __init__(
        self,
        *,
        folder: str,
        every_n_train_steps: int,
        monitor: str | None,
        keep_every: int | None = None,
    ) -> None:
        super().__init__(every_n_train_steps)
        expected, remedy = "callbacks.checkpoint.keep_every >= 1, or null", "null keeps none"
        require(keep_every is None or keep_every >= 1, expected, keep_every, remedy)
        self.keep_every = keep_every
        self.folder, self.monitor = Path(folder), monitor
        self.last = self.folder / ours.LAST
        self.summary = f"Checkpoint: {self.last}"
        self.best_value = math.inf
        self._seen = torch.tensor(math.inf)
        self._due = self._kept = False

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]

    def on_save_checkpoint(self, trainer: L.Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        set_counters(trainer, checkpoint)

    def on_train_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Move the files of the run that is resumed: every process has read its checkpoint by now."""
        if self.monitor == "auto":
            evaluation = callback_of(trainer, Evaluation)
            self.monitor = evaluation.monitor if evaluation is not None else None
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            ours.settle(Path(trainer.ckpt_path))

    def on_train_batch_start(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        """Save when the next step begins: only then do the metrics have the row of the last one."""
        self._keep(trainer, module)  # first, so that a run which goes on from last.ckpt lacks none
        if self._due and (reason := self.keep_last(trainer)):
            warn(f"the checkpoint of step k={module.k} could not be written: {reason}")
        self._due = False

    def on_train_batch_end(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        self._save_best(trainer)
        self._kept = self.keep_every is not None and module.reached(self.keep_every)
        super().on_train_batch_end(trainer, module)
        # Weights that are not finite themselves are not worth saving.
        if module.guard.verdict and all(bool(p.isfinite().all()) for p in module.parameters()):
            self._due = True
            self.on_train_batch_start(trainer, module)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        self._due = True

    def on_train_end(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        self._save_best(trainer)
        self._keep(trainer, module)
        self.summary = self._summary()
        expected = f"to write the last checkpoint of the run, {self.last}"
        remedy = "make room or repair the folder; resume= continues the checkpoint before, which is still there"
        require((reason := self.keep_last(trainer)) is None, expected, reason, remedy)

    def keep_last(self, trainer: L.Trainer) -> str | None:
        """Write `last.ckpt`; return on every rank why that failed, with the old one still there, or None."""
        return _written(trainer, self.folder / ours.NEXT)

    def _keep(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Write the checkpoint of this step that stays, if it is due."""
        if self._kept and (reason := _written(trainer, ours.kept_path(self.folder, module.k))):
            warn(f"the checkpoint of step k={module.k} could not be kept: {reason}")
        self._kept = False

    def _summary(self) -> str:
        """Return what the run leaves: its last checkpoint, and the number and size of those that it has kept."""
        last, kept = f"Checkpoint: {self.last}", ours.kept(self.folder)
        if not kept:
            return last
        gib = sum(file.stat().st_size for file in kept.values()) / 2**30
        return f"{last}\nKept:       {len(kept)} checkpoints, {gib:.3g} GiB, {self.folder / 'step_*.ckpt'}"

    def _save_best(self, trainer: L.Trainer) -> None:
        if self.monitor is None:
            return
        # Each measurement is read once, which may wait for the device, and tried once, even if the write fails.
        measured = trainer.callback_metrics.get(self.monitor)
        if measured is None or measured.is_set_to(self._seen):
            return
        self._seen, value = measured, float(measured)
        sign, known = sign_of(self.monitor), math.isfinite(self.best_value)
        if not math.isfinite(value) or (known and sign * value >= sign * self.best_value):
            return
        before, self.best_value = self.best_value, value
        if reason := _written(trainer, self.folder / "best.ckpt"):
            self.best_value = before
            warn(f"the best checkpoint so far could not be written: {reason}")


def _written(trainer: L.Trainer, path: Path) -> str | None:
    """Write a checkpoint; return on every rank why that failed, or None."""
    reason = None
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except OSError as error:
        reason = str(error)
        trainer.strategy.barrier()  # at the end of `save_checkpoint`, where the other ranks wait
    return trainer.strategy.broadcast(reason)
