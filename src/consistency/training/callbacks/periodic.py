"""Every n optimizer steps; and how callbacks find each other."""

from typing import Any, TypeVar

import lightning as L

from consistency.errors import require
from consistency.training.module import ConsistencyModule

Kind = TypeVar("Kind", bound=L.Callback)


class Periodic(L.Callback):
    """Calls `at_step` once after every n optimizer steps that are taken, except the last one of the run.

    summary: what the command prints about it at the end of a run.
    """

    summary = ""

    def __init__(self, every_n_train_steps: int) -> None:
        expected = f"every_n_train_steps >= 1 for {type(self).__name__}"
        remedy = "give the number of optimizer steps in between"
        require(every_n_train_steps >= 1, expected, every_n_train_steps, remedy)
        self.every = every_n_train_steps

    def on_train_batch_end(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        if trainer.global_step != trainer.max_steps and module.reached(self.every):
            self.at_step(trainer, module)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """Act, every n steps; the hooks at the end of a run act by themselves."""
        raise NotImplementedError


def callback_of(trainer: L.Trainer, kind: type[Kind]) -> Kind | None:
    """Return the first callback of a kind in a run, or None."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
