"""EMAs of the online network: the target of the loss, and the averages for samples."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from consistency.averaging import WIDEST, frozen_copy, power_decay, update_average
from consistency.checkpoints.posthoc import power_name, set_name, write_snapshot
from consistency.errors import require
from consistency.runtime.ranks import print_once
from consistency.training.callbacks.periodic import Periodic, callback_of
from consistency.training.io_errors import tolerate_write_errors
from consistency.training.module import ConsistencyModule

SHORTEST_RUN = 4
"""A run in lengths of an average that does not hide its best weights."""


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
    """Averages of the online network, for samples only: with constant decays, and by power functions of relative widths
    sigma_rel [Karras et al. 2024, arXiv:2312.02696, Section 3]. `weights=ema` is the first of them.

    Saved in the checkpoint as `averages`, by decay and as `power:<width>`.
    """

    def __init__(self, *, decays: Sequence[float] = (), widths: Sequence[float] = ()) -> None:
        require(
            all(0 <= d < 1 for d in decays),
            "callbacks.evaluation_ema.decays from 0 to below 1",
            list(decays),
            "for example [0.999,0.9999]",
        )
        require(
            all(0 < w <= WIDEST for w in widths),
            f"callbacks.evaluation_ema.widths above 0 and at most {WIDEST:.3f}, relative to the run so far",
            list(widths),
            "for example [0.05,0.1]",
        )
        both = "callbacks.evaluation_ema.decays, .widths or both"
        require(bool(decays or widths), both, "neither", "for example widths=[0.05,0.1]")
        self.decays: dict[str, Callable[[int], float]] = {
            **{str(decay): partial(_constant, decay) for decay in decays},
            **{power_name(width): partial(power_decay, width=width) for width in widths},
        }
        self.steps = {str(d): 1 / (1 - d) for d in decays}  # that an average reaches over
        self.widths = list(widths)
        self.averages: dict[str, nn.Module] = {}
        self._saved: dict[str, dict[str, Tensor]] = {}

    def on_fit_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        for name in self.decays:
            average = self.averages[name] = frozen_copy(module.online.network)
            if name in self._saved:
                average.load_state_dict(self._saved[name])
            module.averages[set_name(name)] = average
        self._saved = {}
        module.after_each_step(lambda: self._update(module))
        self._warn_of_wide(trainer.max_steps)

    def _warn_of_wide(self, steps: int) -> None:
        reach = self.steps | {power_name(width): width * steps for width in self.widths}
        wide = [f"{name} ({n:.0f} steps)" for name, n in reach.items() if steps < SHORTEST_RUN * n]
        if wide and steps > 0:
            print_once(
                f"Averages over more than a quarter of the {steps} steps: {', '.join(wide)}. Their samples are those of "
                "an earlier network; callbacks.evaluation_ema.widths=[0.05,0.1] suits any length"
            )

    def _update(self, module: ConsistencyModule) -> None:
        for name, average in self.averages.items():
            update_average(average, module.online.network, self.decays[name](module.k + 1))

    def state_dict(self) -> dict[str, Any]:
        current = {name: average.state_dict() for name, average in self.averages.items()}
        return {"averages": current or self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["averages"]


def _constant(decay: float, k: int) -> float:
    return decay


class Snapshots(Periodic):
    """Writes the power-function averages every n optimizer steps, for `weights=posthoc:<width>`."""

    def __init__(self, *, folder: str, every_n_train_steps: int) -> None:
        super().__init__(every_n_train_steps)
        self.folder = Path(folder)

    def on_train_end(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        if module.k % self.every == 0:
            self.at_step(trainer, module)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        averages = callback_of(trainer, EvaluationEMA)
        if averages is None or not averages.widths or not trainer.is_global_zero:
            return
        stored = {w: averages.averages[power_name(w)].state_dict() for w in averages.widths}
        with tolerate_write_errors(f"the snapshot of step k={module.k}"):
            write_snapshot(self.folder, module.k, stored)
