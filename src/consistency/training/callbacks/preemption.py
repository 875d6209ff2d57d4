"""What a run does where it is told to go: SIGTERM and SIGUSR1, as schedulers send them before they take a machine away,
and Ctrl-C.
"""

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from consistency.runtime import rendezvous, signals
from consistency.training.callbacks.checkpoints import RunCheckpoints
from consistency.training.io_errors import warn
from consistency.training.module import ConsistencyModule


class Preempted(SystemExit):
    """The end of a run by a signal; its status is 128 + the signal's number: 143 for SIGTERM, 138 for SIGUSR1, 130 for
    Ctrl-C.
    """


class Preemption(Callback):
    """At SIGTERM, SIGUSR1 or Ctrl-C (SIGINT), to any rank: finishes the optimizer step, writes `last.ckpt`, ends every rank with
    `Preempted`.

    Under SLURM with requeueing, Lightning's own answer to its signal (SIGUSR1, or another) follows the checkpoint: it
    asks for the job to be queued again.
    """

    def __init__(self) -> None:
        self._received = (0, 0)  # the signal, and whether the job is to be queued again

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Takes the place of Lightning's handlers before it registers them: they save in the middle of a step, speak to
        the other ranks from inside a signal, and let the run go on to the end of its only epoch. Its own agreement of
        the ranks before every batch also hides that one of them does not answer.
        """
        connector: Any = trainer._signal_connector
        self._requeue = connector._slurm_sigusr_handler_fn
        connector._sigterm_notifier_fn = lambda number, _: self._note(number, requeue=False)
        connector._slurm_sigusr_handler_fn = lambda number, _: self._note(number, requeue=True)
        epoch: Any = trainer.fit_loop.epoch_loop
        epoch._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Adds SIGUSR1, where nobody listens to it; Lightning restores all handlers at the end. From here to the end of
        the training a command's first Ctrl-C is a signal as the others.
        """
        signals.call_instead(lambda: self._note(signal.SIGINT, requeue=False))
        free = signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        if free and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number, requeue=False)

    def _note(self, number: int, *, requeue: bool) -> None:
        self._received = (number, int(requeue))

    def _agreed(self, trainer: L.Trainer) -> tuple[int, int]:
        """What any rank has received: they must leave at the same step, or those that stay wait for ever."""
        if trainer.world_size == 1:
            return self._received
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        number, requeue = received.tolist()
        return number, requeue

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Leaves before a step, when all is done that belongs to the one before and its metrics are logged."""
        if batch_idx > 0 and batch_idx % trainer.accumulate_grad_batches == 0:
            self._leave(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._leave(trainer, module)
        signals.call_instead(None)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        signals.call_instead(None)
        rendezvous.current.leaving.set()

    def _leave(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule)
        number, requeue = self._agreed(trainer)
        if not number:
            return
        kept = _keep(trainer)
        if trainer.is_global_zero:
            warn(f"{signal.Signals(number).name}: stopped after step k={module.k}; {kept}")
        if requeue:
            self._requeue(number, None)
        raise Preempted(128 + number)


def _keep(trainer: L.Trainer) -> str:
    """Writes the checkpoint; says where it stands, or why there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, RunCheckpoints):
            reason = callback.keep_last(trainer)
            return f"no checkpoint of it: {reason}" if reason else f"checkpoint: {callback.last}"
    return "no checkpoint of it: callbacks.checkpoint=null"
