"""The callbacks of the method: N(k), the learning rate, the EMAs, and the stages of progressive distillation.

The schedules and stages are functions of the step k, so a run can be resumed without a state of theirs.
"""
# mypy: disable-error-code="override"

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from consistency.averaging import frozen_copy, update_average
from consistency.denoiser import Denoiser
from consistency.errors import require
from consistency.training.module import ConsistencyModule


class ScaleSchedule(Callback):
    """Sets N(k), the `num_scales` of the objective."""

    def __init__(self, *, num_scales: Callable[[int], int]) -> None:
        self.num_scales = num_scales

    def on_train_batch_start(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        module.num_scales = self.num_scales(module.k)
        module.log("N", float(module.num_scales), prog_bar=True)


class LearningRateSchedule(Callback):
    """Sets the learning rate to `factor(k)` times the optimizer's own, and logs it."""

    def __init__(self, *, factor: Callable[[int], float]) -> None:
        self.factor = factor

    def on_train_batch_start(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        for group in groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.factor(module.k)
        module.log("train/learning_rate", groups[0]["lr"])


class TargetEMA(Callback):
    """theta- <- mu(k) theta- + (1 - mu(k)) theta after every optimizer step [Song et al. 2023, Algorithms 2 and 3].

    The target starts as a copy of the online network and is part of the module's state. decay: N(k) -> mu(k).
    """

    def __init__(self, *, decay: Callable[[int], float]) -> None:
        self.decay = decay

    def setup(self, trainer: L.Trainer, module: ConsistencyModule, stage: str) -> None:
        module.target = frozen_copy(module.online)

    def on_fit_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        module.after_each_step(lambda: self._update(module))

    def _update(self, module: ConsistencyModule) -> None:
        assert module.target is not None
        update_average(module.target, module.online, self.decay(module.num_scales))

    def on_train_batch_start(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        module.log("mu", self.decay(module.num_scales), prog_bar=True)


class EvaluationEMA(Callback):
    """Averages of the online network with constant decays, for samples only; `weights=ema` is the first of them.

    Saved in the checkpoint as `averages`, by decay.
    """

    def __init__(self, *, decays: Sequence[float]) -> None:
        require(
            len(decays) > 0 and all(0 <= d < 1 for d in decays),
            "callbacks.evaluation_ema.decays between 0 and 1",
            list(decays),
            "for example [0.999,0.9999]",
        )
        self.decays = list(decays)
        self._saved: dict[str, dict[str, Tensor]] = {}
        self._averages: dict[float, nn.Module] = {}

    def on_fit_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        for decay in self.decays:
            average = self._averages[decay] = frozen_copy(module.online.network)
            if str(decay) in self._saved:
                average.load_state_dict(self._saved[str(decay)])
            module.averages[f"ema:{decay}"] = average
        self._saved = {}
        module.after_each_step(lambda: self._update(module))

    def _update(self, module: ConsistencyModule) -> None:
        for decay, average in self._averages.items():
            update_average(average, module.online.network, decay)

    def state_dict(self) -> dict[str, Any]:
        current = {str(decay): average.state_dict() for decay, average in self._averages.items()}
        return {"averages": current or self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["averages"]


class DistillationStages(Callback):
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
        require(
            teacher == student,
            "a teacher of the same network as model=, because the student will replace it",
            "a teacher of another network",
            "choose the model= of the teacher",
        )
        module.target = frozen_copy(self.teacher)

    def on_train_batch_start(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        assert module.target is not None
        module.target.eval()  # Lightning puts the whole module into train mode; a teacher has no dropout
        if module.k == 0 or self.num_scales(module.k) == self.num_scales(module.k - 1):
            return
        for network in (module.target.network, *module.averages.values()):
            update_average(network, module.online.network, 0.0)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
