"""The stages of progressive distillation: at each halving of N(k) the student becomes the teacher."""

from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import Callback

from consistency.averaging import frozen_copy, update_average
from consistency.denoiser import Denoiser
from consistency.errors import require
from consistency.training.module import ConsistencyModule


class DistillationStages(Callback):
    """Sets the module's `target` to the teacher of the stage, and begins the next stage where N(k) changes.

    Then the teacher takes the student's weights, the optimizer forgets its moments, and the evaluation averages start
    again from the student [released code of Song et al. 2023, `progdist`]. num_scales: the N(k) of the run. The teacher
    is part of the module's state, so that a resumed run has it; what happens is a function of k alone.
    """

    def __init__(self, *, teacher: Denoiser, num_scales: Callable[[int], int]) -> None:
        self.teacher, self.num_scales = teacher, num_scales

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        assert isinstance(module, ConsistencyModule)
        require(
            _shapes(self.teacher) == _shapes(module.online),
            "a teacher of the same network as model=, because the student will replace it",
            "a teacher of another network",
            "choose the model= that wrote it",
        )
        module.target = frozen_copy(self.teacher)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, ConsistencyModule) and module.target is not None
        # Lightning puts the whole module into train mode; a teacher drops no units.
        module.target.eval()
        k = module.k
        if k > 0 and self.num_scales(k) != self.num_scales(k - 1):
            self._begin_stage(trainer, module)

    def _begin_stage(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        assert module.target is not None
        update_average(module.target.network, module.online.network, 0.0)
        for average in module.averages.values():
            update_average(average, module.online.network, 0.0)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()


def _shapes(denoiser: Denoiser) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in denoiser.network.state_dict().items()}
