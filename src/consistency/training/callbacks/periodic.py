"""What happens every n optimizer steps."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from consistency.errors import require
from consistency.training.module import ConsistencyModule


class Periodic(Callback):
    """Calls `at_step` after every n optimizer steps that were really taken, once each, also under accumulation."""

    def __init__(self, every_n_train_steps: int) -> None:
        require(
            every_n_train_steps >= 1,
            f"every_n_train_steps >= 1 for {type(self).__name__}",
            every_n_train_steps,
            "give the number of optimizer steps in between",
        )
        self.every = every_n_train_steps
        self._before = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, ConsistencyModule)
        self._before = module.k

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, ConsistencyModule)
        if module.k != self._before and module.k % self.every == 0:
            self.at_step(trainer, module)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        """What is done."""
        raise NotImplementedError
