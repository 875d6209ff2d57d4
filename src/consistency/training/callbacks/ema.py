"""EMAs of the online network: the target of the loss, and the averages for samples."""
# mypy: disable-error-code="override"

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from consistency.averaging import frozen_copy, update_average
from consistency.errors import require
from consistency.training.module import ConsistencyModule


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
