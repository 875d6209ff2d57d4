"""The stages of progressive distillation: functions of the step k."""

from collections.abc import Callable
from typing import Any

import lightning as L

from consistency.averaging import frozen_copy
from consistency.denoiser import Denoiser
from consistency.errors import require
from consistency.training.callbacks.ema import EvaluationEMA
from consistency.training.callbacks.periodic import callback_of
from consistency.training.module import ConsistencyModule


class DistillationStages(L.Callback):
    """Sets the module's `target` to the teacher of the stage; a new stage begins when N(k) changes.

    The teacher then takes the student's weights, the optimizer forgets its moments, and the evaluation averages restart
    from the student [released code of Song et al. 2023, `progdist`]. The teacher is part of the module's state.
    num_scales: k -> N(k).
    """

    def __init__(self, *, teacher: Denoiser, num_scales: Callable[[int], int]) -> None:
        self.teacher, self.num_scales = teacher, num_scales

    def setup(self, trainer: L.Trainer, module: ConsistencyModule, stage: str) -> None:
        states = (denoiser.network.state_dict() for denoiser in (self.teacher, module.online))
        teacher, student = ({name: v.shape for name, v in state.items()} for state in states)
        expected = "a teacher of the same network as model=, because the student will replace it"
        remedy = "choose the model= of the teacher"
        require(teacher == student, expected, "a teacher of another network", remedy)
        averages = callback_of(trainer, EvaluationEMA)
        expected = "averages of constant decay, which restart at every stage"
        others = [*averages.half_lives, *averages.widths] if averages else []
        require(not others, expected, ", ".join(others), "say mode.average=constant")
        module.target = frozen_copy(self.teacher)

    def on_train_batch_start(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        assert module.target is not None
        module.target.eval()  # Lightning puts the whole module into train mode; a teacher has no dropout
        if module.k == 0 or self.num_scales(module.k) == self.num_scales(module.k - 1):
            return
        if not module.settle():  # so the stage before has a step left
            return
        for network in (module.target.network, *module.averages.values()):
            network.load_state_dict(module.online.network.state_dict())
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
