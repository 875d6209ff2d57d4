"""All that this project reads or replaces inside of Lightning, except in `loggers` and `runtime/launch`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.trainer import call

from consistency.checkpoints import ours


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writer of checkpoints, replaced: a whole file or none, with its checksum; next.ckpt becomes last.ckpt."""

    def save_checkpoint(self, content: Any, path: Any, storage_options: Any = None) -> None:
        ours.write(content, Path(path))
        if Path(path).name == ours.NEXT:
            ours.promote(Path(path).parent)


def batches_before(trainer: L.Trainer) -> int:
    """Return the number of batches before the current one: `batch_idx`, but over all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready) - 1


def begin_again(trainer: L.Trainer, batch: Any, index: int) -> None:
    """Call all hooks of the start of the batch once more."""
    call._call_callback_hooks(trainer, "on_train_batch_start", batch, index)
    call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, index)


def set_counters(trainer: L.Trainer, content: dict[str, Any]) -> None:
    """Set Lightning's counters between two steps of one endless epoch, which a longer run continues, in any checkpoint."""
    fit, steps = content["loops"]["fit_loop"], trainer.global_step
    batches = steps * trainer.accumulate_grad_batches
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1
    progress = fit["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    for count in ("total", "current"):
        ready = dict.fromkeys(("ready", "started", "processed"), batches)
        progress[count] = {**ready, "completed": batches - 1}
        fit["epoch_progress"][count] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def take_signals(trainer: L.Trainer, note: Callable[..., None]) -> Callable[[int, Any], None]:
    """Have `note(number, requeue=...)` handle signals; return Lightning's handler that requeues a SLURM job.

    Lightning's handlers save in the middle of a step, communicate from inside of a signal, and let the run continue.
    Its agreement of the ranks before every batch, removed as well, hides a rank that hangs.
    """
    connector: Any = trainer._signal_connector
    requeue: Callable[[int, Any], None] = connector._slurm_sigusr_handler_fn
    connector._sigterm_notifier_fn = lambda number, _: note(number)
    connector._slurm_sigusr_handler_fn = lambda number, _: note(number, requeue=True)
    epoch: Any = trainer.fit_loop.epoch_loop
    epoch._broadcast_sigterm_tensor = lambda: None
    return requeue
