"""EMAs of the online network: the target of the loss, and the averages for samples."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from consistency.averaging import WIDEST, frozen_copy, power_decay, update_average
from consistency.checkpoints.posthoc import POWER, write_snapshot
from consistency.errors import require
from consistency.runtime.ranks import print_once
from consistency.training.callbacks.periodic import Periodic, callback_of
from consistency.training.io_errors import tolerate_write_errors
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
        if module.logs_this_step:
            module.show("mu", self.decay(module.num_scales))


class EvaluationEMA(Callback):
    """Averages of the online network, for samples only: with constant decays, and by power functions of relative widths
    sigma_rel [Karras et al. 2024, arXiv:2312.02696, Section 3]. `weights=ema` is the first of them.

    Saved in the checkpoint as `averages`, by decay and as `power:<width>`.
    """

    def __init__(self, *, decays: Sequence[float] = (), widths: Sequence[float] = ()) -> None:
        name, possible = "callbacks.evaluation_ema", all(0 <= d < 1 for d in decays)
        expected = f"{name}.decays from 0 to below 1"
        require(possible, expected, list(decays), "for example [0.999,0.9999]")
        possible = all(0 < w <= WIDEST for w in widths)
        expected = f"{name}.widths above 0 and at most {WIDEST:.3f}, relative to the run so far"
        require(possible, expected, list(widths), "for example [0.05,0.1]")
        both = f"{name}.decays, .widths or both"
        require(bool(decays or widths), both, "neither", "for example widths=[0.05,0.1]")
        self.decays = {str(decay): decay for decay in decays}
        self.widths = {f"{POWER}{width:g}": width for width in widths}
        self.averages: dict[str, nn.Module] = {}
        self._saved: dict[str, dict[str, Tensor]] = {}

    def on_fit_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        for name in (*self.decays, *self.widths):
            average = self.averages[name] = frozen_copy(module.online.network)
            if name in self._saved:
                average.load_state_dict(self._saved[name])
            module.averages[f"ema:{name}" if name in self.decays else name] = average
        self._saved = {}
        module.after_each_step(lambda: self._update(module))
        self._warn_of_wide(trainer.max_steps)

    def _warn_of_wide(self, steps: int) -> None:
        """Name the averages of more than a quarter of the run, which hide its best weights."""
        reach = {name: 1 / (1 - decay) for name, decay in self.decays.items()}
        reach |= {name: width * steps for name, width in self.widths.items()}
        wide = [f"{name} ({n:.0f} steps)" for name, n in reach.items() if steps < 4 * n]
        if wide and steps > 0:
            print_once(
                f"Averages over more than a quarter of the {steps} steps: {', '.join(wide)}. Their samples are those of "
                "an earlier network; callbacks.evaluation_ema.widths=[0.05,0.1] suits any length"
            )

    def _update(self, module: ConsistencyModule) -> None:
        for name, average in self.averages.items():
            width = self.widths.get(name)
            decay = self.decays[name] if width is None else power_decay(module.k + 1, width)
            update_average(average, module.online.network, decay)

    def state_dict(self) -> dict[str, Any]:
        current = {name: average.state_dict() for name, average in self.averages.items()}
        return {"averages": current or self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["averages"]


class Snapshots(Periodic):
    """Writes the power-function averages every n optimizer steps, for `weights=posthoc:<width>`."""

    def __init__(self, *, folder: str, every_n_train_steps: int) -> None:
        super().__init__(every_n_train_steps)
        self.folder = Path(folder)

    def on_train_end(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        if module.k % self.every == 0:
            self.at_step(trainer, module)

    def at_step(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        ema = callback_of(trainer, EvaluationEMA)
        if ema is None or not ema.widths or not trainer.is_global_zero:
            return
        stored = {name: ema.averages[name].state_dict() for name in ema.widths}
        with tolerate_write_errors(f"the snapshot of step k={module.k}"):
            write_snapshot(self.folder / f"{module.k:08d}.safetensors", stored)
