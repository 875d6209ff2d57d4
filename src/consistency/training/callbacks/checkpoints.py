"""The checkpoints of a run: last, previous and best."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from consistency import checkpoint
from consistency.errors import require
from consistency.training.callbacks.periodic import Periodic
from consistency.training.faults import tell
from consistency.training.module import ConsistencyModule


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writer with the project's own: whole file or none, with its checksum beside it."""

    def save_checkpoint(
        self, checkpoint_content: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        checkpoint.write(checkpoint_content, Path(path))


class RunCheckpoints(Periodic, Checkpoint):
    """Writes `last.ckpt` every n optimizer steps and at the end, keeps the one before as `previous.ckpt`, and the one
    with the lowest `monitor` as `best.ckpt` (none where nothing is monitored).

    A write that fails is told, leaves the files of before, and is tried again at the next occasion; the one at the end
    raises `UserError`. Where a step that is not finite stops the run, the state of before that step is kept first.
    """

    def __init__(self, *, folder: str, every_n_train_steps: int, monitor: str | None) -> None:
        super().__init__(every_n_train_steps)
        self.folder, self.monitor = Path(folder), monitor
        self.best_value = self._tried = float("inf")
        self._kept = -1

    @property
    def last(self) -> Path:
        """Where the newest checkpoint stands."""
        return self.folder / "last.ckpt"

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        assert isinstance(module, ConsistencyModule)
        self._keep_best(trainer)
        super().on_train_batch_end(trainer, module, *rest)
        # Weights that are not finite themselves are no state to go back to.
        if module.guard.verdict and all(bool(p.isfinite().all()) for p in module.parameters()):
            self._keep_last_or_tell(trainer, module)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Keeps the newest, but for the end of the run, which does so too, and where a signal has had it kept."""
        if self._kept != trainer.global_step < trainer.max_steps:
            self._keep_last_or_tell(trainer, module)

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
        fresh = self.folder / "next.ckpt"
        reason = self._reason(
            trainer, self._written(trainer, fresh) or self._rotated(trainer, fresh)
        )
        self._kept = self._kept if reason else trainer.global_step
        return reason

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

    def _rotated(self, trainer: L.Trainer, fresh: Path) -> str | None:
        try:
            if trainer.is_global_zero:
                if self.last.is_file():
                    checkpoint.move(self.last, self.folder / "previous.ckpt")
                checkpoint.move(fresh, self.last)
        except OSError as error:
            return str(error)
        return None

    @staticmethod
    def _reason(trainer: L.Trainer, reason: str | None) -> str | None:
        """What the rank that writes knows, on every rank."""
        return trainer.strategy.broadcast(reason)
