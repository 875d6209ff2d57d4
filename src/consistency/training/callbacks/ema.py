"""EMAs of the online network: the target of the loss, and the averages for samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from consistency.averaging import WIDEST, averaging, frozen_copy, power_decay
from consistency.checkpoints.posthoc import POWER, write_snapshot
from consistency.errors import require
from consistency.runtime.ranks import print_once
from consistency.schedules import half_life_decay
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
        assert module.target is not None
        update = averaging(module.target, module.online)
        mu = 0.0

        def step(_: int) -> None:
            nonlocal mu
            mu = self.decay(module.num_scales)
            update(mu)

        def undo() -> None:
            if mu > 0:  # else the target equals the online network, which has not moved
                update(1 / mu)

        module.after_each_step(step, undo)

    def on_train_batch_start(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        if module.logs_this_step:
            module.show("schedule/mu", self.decay(module.num_scales))


class EvaluationEMA(Callback):
    """Averages of the online network, for samples only: with constant decays, with half-lives in images that grow with the
    run [released EDM code], and by power functions of relative widths sigma_rel [Karras et al. 2024, arXiv:2312.02696,
    Section 3]. `weights=ema` is the first of them.

    Saved in the checkpoint as `averages`, by decay, as `half_life:<images>` and as `power:<width>`; those of a head of the
    objective as `heads`.

    ramp_up: share of the run so far that a half-life is at most.

    every: steps between two updates, whose decay is then decay^every; in_double: whether the mean is computed in float64. The
    released code of MeanFlow has 16 and true.

    device: "cpu" for averages in the memory of the host, which takes them off a GPU. They are computed beside the next step,
    from a copy of the weights that nothing waits for; None for the device of the network.
    """

    def __init__(
        self,
        *,
        decays: Sequence[float] = (),
        half_lives: Sequence[int] = (),
        ramp_up: float = 0.05,
        widths: Sequence[float] = (),
        every: int = 1,
        in_double: bool = False,
        device: str | None = None,
    ) -> None:
        name, possible = "parts.average.<name>", all(0 <= d < 1 for d in decays)
        expected = f"{name}.decays from 0 to below 1"
        require(possible, expected, list(decays), "for example [0.999,0.9999]")
        possible = all(0 < w <= WIDEST for w in widths)
        expected = f"{name}.widths above 0 and at most {WIDEST:.3f}, relative to the run so far"
        require(possible, expected, list(widths), "for example [0.05,0.1]")
        possible = all(images > 0 for images in half_lives) and ramp_up > 0
        expected, got = f"{name}.half_lives in images, and ramp_up, above 0", list(half_lives)
        require(possible, expected, f"{got}, {ramp_up}", "500000 and 0.05 are published")
        some = f"some of {name}.decays, .half_lives and .widths"
        require(bool(decays or half_lives or widths), some, "none", "for example widths=[0.05,0.1]")
        remedy = "1 is after every step, 16 is published with MeanFlow"
        apart = every == 1 or not (half_lives or widths)
        require(apart and every >= 1, f"{name}.every >= 1, of decays alone", every, remedy)
        self.every, self.in_double = every, in_double
        self.decays = {str(decay): decay for decay in decays}
        self.half_lives = {f"half_life:{images}": images for images in half_lives}
        self.ramp_up = ramp_up
        self.widths = {f"{POWER}{width:g}": width for width in widths}
        expected, remedy = f"{name}.device=null or cpu", "null is the device of the network"
        require(device in (None, "cpu"), expected, device, remedy)
        self.on_host = device == "cpu"
        self.averages: dict[str, nn.Module] = {}
        self._updates: dict[str, Callable[[float], None]] = {}
        self.heads: dict[str, nn.Module] = {}
        self._weights = self._copy = list[Tensor]()
        self._worker, self._update_in_progress = ThreadPoolExecutor(1), Future[None]()
        self._update_in_progress.set_result(None)
        self._saved: dict[str, dict[str, Tensor]] = {}
        self._saved_heads: dict[str, dict[str, Tensor]] = {}

    def on_fit_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        self._weights = [parameter for _, parameter in module.trained()]
        if self.on_host:
            pinned = module.device.type == "cuda"
            self._copy = [
                torch.empty_like(w, device="cpu", pin_memory=pinned) for w in self._weights
            ]
        if self.half_lives:
            self.batch = module.data.batch_size
        for name in (*self.decays, *self.half_lives, *self.widths):
            average = self.averages[name] = frozen_copy(module.online.network)
            if name in self._saved:
                average.load_state_dict(self._saved[name])
            averaged = nn.ModuleList([average])
            if module.head is not None:
                head = self.heads[name] = frozen_copy(module.head)
                head.load_state_dict(self._saved_heads.get(name, head.state_dict()))
                averaged.append(head)
            if self.on_host:
                averaged.cpu()
            module.averages[name if name in self.widths else f"ema:{name}"] = average
            weights = self._copy or self._weights
            self._updates[name] = averaging(averaged, weights, in_double=self.in_double)
        self._saved = self._saved_heads = {}
        module.settle_averages = self.settle
        module.after_each_step(self._update)
        self._warn_of_wide(trainer.max_steps)

    def _warn_of_wide(self, steps: int) -> None:
        """Name the averages of more than a quarter of the run, which hide its best weights."""
        reach = {name: 1 / (1 - decay) for name, decay in self.decays.items()}
        reach |= {name: width * steps for name, width in self.widths.items()}
        ramp = self.ramp_up * steps
        for name, images in self.half_lives.items():
            reach[name] = min(images / self.batch, ramp) / math.log(2)
        wide = [f"{name} ({n:.0f} steps)" for name, n in reach.items() if steps < 4 * n]
        if wide and steps > 0:
            print_once(
                f"Averages over more than a quarter of the {steps} steps: {', '.join(wide)}. Their samples are those of "
                "an earlier network; mode.average=power suits any length"
            )

    def decays_at(self, k: int) -> dict[str, float]:
        """Return the decay of every average by name, for the update after step k, counted from 0."""
        halves = {
            name: half_life_decay(k, half_life=images / self.batch, ramp_up=self.ramp_up)
            for name, images in self.half_lives.items()
        }
        powers = {name: power_decay(k + 1, width) for name, width in self.widths.items()}
        waits = (k + 1) % self.every != 0
        constant = {name: 1.0 if waits else d**self.every for name, d in self.decays.items()}
        return constant | halves | powers

    @torch.no_grad()
    def _update(self, k: int) -> None:
        if (k + 1) % self.every:
            return
        decays = self.decays_at(k)
        if not self.on_host:
            self._average(decays)
            return
        self.settle()
        torch._foreach_copy_(self._copy, self._weights, non_blocking=True)
        copied = torch.cuda.Event() if self._weights[0].is_cuda else None
        if copied is not None:
            copied.record()
        self._update_in_progress = self._worker.submit(self._average, decays, copied)

    def _average(self, decays: Mapping[str, float], copied: torch.cuda.Event | None = None) -> None:
        if copied is not None:
            copied.synchronize()
        for name, update in self._updates.items():
            update(decays[name])

    def settle(self) -> None:
        """Wait for the update of the last step, before the averages are read."""
        self._update_in_progress.result()

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        current = {name: average.state_dict() for name, average in self.averages.items()}
        heads = {name: head.state_dict() for name, head in self.heads.items()} or self._saved_heads
        return {"averages": current or self._saved} | ({"heads": heads} if heads else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved, self._saved_heads = state_dict["averages"], state_dict.get("heads", {})


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
        ema.settle()
        stored = {name: ema.averages[name].state_dict() for name in ema.widths}
        with tolerate_write_errors(f"the snapshot of step k={module.k}"):
            write_snapshot(self.folder / f"{module.k:08d}.safetensors", stored)
