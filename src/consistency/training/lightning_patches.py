"""All that this project reads or replaces inside of Lightning: an upgrade is checked here, and in `runtime/launch`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from consistency.checkpoints import ours


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writer of checkpoints, replaced: a whole file or none, with its checksum beside it."""

    def save_checkpoint(
        self, checkpoint_content: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        ours.write(checkpoint_content, Path(path))


def batches_before(trainer: L.Trainer) -> int:
    """Return the number of batches before the current one: `batch_idx`, but over all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready) - 1


def set_counters(content: dict[str, Any], *, steps: int, batches: int) -> None:
    """Give a checkpoint Lightning's counters between two steps of one endless epoch, whichever hook saves it.

    A checkpoint at the end of a run would otherwise say that its epoch is over, and a longer run could not continue.
    """
    fit: dict[str, Any] = content["loops"]["fit_loop"]
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1
    progress = fit["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    for count in ("total", "current"):
        ready = dict.fromkeys(("ready", "started", "processed"), batches)
        progress[count] = {**ready, "completed": batches - 1}
        fit["epoch_progress"][count] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def take_signals(trainer: L.Trainer, note: Callable[..., None]) -> Callable[[int, Any], None]:
    """Replace Lightning's signal handlers, before it registers them; return its handler that requeues a SLURM job.

    Lightning's handlers save in the middle of a step, communicate with other ranks from inside of a signal, and let
    the run continue to the end of its only epoch. Its agreement of the ranks before every batch, removed as well,
    hides a rank that hangs.

    note: called with the number of the signal and `requeue`.
    """
    connector: Any = trainer._signal_connector
    requeue: Callable[[int, Any], None] = connector._slurm_sigusr_handler_fn
    connector._sigterm_notifier_fn = lambda number, _: note(number, requeue=False)
    connector._slurm_sigusr_handler_fn = lambda number, _: note(number, requeue=True)
    epoch: Any = trainer.fit_loop.epoch_loop
    epoch._broadcast_sigterm_tensor = lambda: None
    return requeue


def set_wandb_id(logger: WandbLogger, name: str) -> None:
    """Give the W&B run of a logger its id, before it begins."""
    logger._id = logger._wandb_init["id"] = name


def purge_from(logger: TensorBoardLogger, step: int) -> None:
    """Have TensorBoard ignore the events from `step` on that earlier starts of the run wrote."""
    logger._kwargs["purge_step"] = step
