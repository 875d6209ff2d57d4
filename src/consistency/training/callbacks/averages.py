"""The two averages of the weights: one is part of the algorithm, the other is for samples."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from consistency.averaging import frozen_copy, update_average
from consistency.errors import require
from consistency.training.module import ConsistencyModule


class TargetEMA(Callback):
    """theta- <- mu(k) theta- + (1 - mu(k)) theta after every optimizer step [Song et al. 2023, Algorithms 2 and 3].

    decay: N(k) -> mu(k). The target starts as a copy of the online network and is part of the module's state.
    """

    def __init__(self, *, decay: Callable[[int], float]) -> None:
        self.decay = decay

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        assert isinstance(module, ConsistencyModule)
        module.target = frozen_copy(module.online)

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule)
        self._hook = trainer.optimizers[0].register_step_post_hook(lambda *_: self._update(module))

    def _update(self, module: ConsistencyModule) -> None:
        assert module.target is not None
        update_average(module.target, module.online, self.decay(module.num_scales))

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, ConsistencyModule)
        module.log("mu", self.decay(module.num_scales), prog_bar=True)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._hook.remove()


class EvaluationEMA(Callback):
    """Averages of the online network with one or several constant decays, for samples only.

    The first one listed is what `weights=ema` means. Saved in the checkpoint as `averages`, by decay.
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
        self._module: ConsistencyModule | None = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule)
        self._module = module
        for decay in self.decays:
            average = frozen_copy(module.online.network)
            if (saved := self._saved.get(str(decay))) is not None:
                average.load_state_dict(saved)
            module.averages[f"ema:{decay}"] = average
        self._saved = {}
        self._hook = trainer.optimizers[0].register_step_post_hook(lambda *_: self._update(module))

    def _update(self, module: ConsistencyModule) -> None:
        for decay in self.decays:
            update_average(module.averages[f"ema:{decay}"], module.online.network, decay)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        if self._module is None:
            return {"averages": self._saved}
        averages = self._module.averages
        return {"averages": {str(d): averages[f"ema:{d}"].state_dict() for d in self.decays}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["averages"]
