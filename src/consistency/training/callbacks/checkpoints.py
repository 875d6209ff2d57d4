"""The checkpoints of a run: last, previous and best."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from consistency import checkpoint
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
    """

    def __init__(self, *, folder: str, every_n_train_steps: int, monitor: str | None) -> None:
        super().__init__(every_n_train_steps)
        self.folder, self.monitor = Path(folder), monitor
        self.best_value = float("inf")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.monitor == "auto":
            named = [c.monitor for c in trainer.callbacks if isinstance(c, Evaluation)]  # type: ignore[attr-defined]
            self.monitor = next(iter(named), None)

    @property
    def last(self) -> Path:
        """Where the newest checkpoint stands."""
        return self.folder / "last.ckpt"

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        self._keep_best(trainer)
        super().on_train_batch_end(trainer, module, *rest)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Keeps the newest, but for the end of the run, which does so too."""
        if trainer.global_step < trainer.max_steps:
            self._keep_last(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._keep_best(trainer)
        self._keep_last(trainer)

    def _keep_best(self, trainer: L.Trainer) -> None:
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        if value is not None and torch.isfinite(value) and float(value) < self.best_value:
            self.best_value = float(value)
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=False)

    def _keep_last(self, trainer: L.Trainer) -> None:
        fresh = self.folder / "next.ckpt"
        trainer.save_checkpoint(fresh, weights_only=False)
        if trainer.is_global_zero:
            for old, new in ((self.last, self.folder / "previous.ckpt"), (fresh, self.last)):
                if old.is_file():
                    old.replace(new)
                    digest = checkpoint.checksum_path(old).read_text().split()[0]
                    checkpoint.checksum_path(new).write_text(f"{digest}  {new.name}\n")
            checkpoint.checksum_path(fresh).unlink(missing_ok=True)
        trainer.strategy.barrier()
