"""Signals that end a run: SIGTERM and SIGUSR1, as schedulers send them before they take a machine away, and Ctrl-C."""

import signal
import threading
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from consistency.runtime import rendezvous, signals
from consistency.training.callbacks.checkpoints import RunCheckpoints
from consistency.training.callbacks.periodic import callback_of
from consistency.training.io_errors import warn
from consistency.training.lightning_patches import batches_before, take_signals
from consistency.training.module import ConsistencyModule


class Preemption(L.Callback):
    """On a signal to any rank: completes the optimizer step, writes `last.ckpt`, and ends every rank.

    The status is 128 + the signal's number: SIGTERM 143, SIGUSR1 138, Ctrl-C 130. Under SLURM with requeueing, Lightning's
    own handler has the job queued again afterwards.
    """

    def setup(self, trainer: L.Trainer, module: ConsistencyModule, stage: str) -> None:
        self.guard = module.guard
        self._requeue = take_signals(trainer, self._note)

    def on_train_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Handle SIGUSR1 if nothing else does (Lightning restores all handlers at the end), and the first Ctrl-C.

        Windows has no SIGUSR1.
        """
        signals.call_instead(lambda: self._note(signal.SIGINT))
        number = getattr(signal, "SIGUSR1", None)
        if number is None or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: self._note(number))

    def _note(self, number: int, *, requeue: bool = False) -> None:
        self.guard.received = (number, int(requeue))

    def on_train_batch_start(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        """Leave before a step: the one before is complete and its metrics are logged."""
        before = batches_before(trainer)
        if before > 0 and before % trainer.accumulate_grad_batches == 0:
            # Ranks leave after the same step: that in which they agreed on the signal.
            several = trainer.world_size > 1
            self._leave(trainer, module, module.guard.agreed if several else module.guard.received)

    def on_train_end(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        received = torch.tensor(module.guard.received, device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        self._leave(trainer, module, received.tolist())
        signals.call_instead(None)

    def on_exception(self, *_: Any) -> None:
        signals.call_instead(None)
        rendezvous.current.leaving.set()

    def _leave(
        self, trainer: L.Trainer, module: ConsistencyModule, received: Sequence[int]
    ) -> None:
        number, requeue = received
        if not number:
            return
        module.settle()
        saved = "no checkpoint of it: callbacks.checkpoint=null"
        if (checkpoints := callback_of(trainer, RunCheckpoints)) is not None:
            error = checkpoints.keep_last(trainer)
            saved = f"no checkpoint of it: {error}" if error else f"checkpoint: {checkpoints.last}"
        warn(f"{signal.Signals(number).name}: stopped after step k={module.k}; {saved}")
        if requeue:
            self._requeue(number, None)
        raise SystemExit(128 + number)
