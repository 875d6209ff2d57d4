"""The speed of a run's optimizer step, measured inside Lightning's Trainer as `train.py` runs it."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.profilers import Profiler
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from consistency.evaluation.timing import Speed, Window, Work, now
from consistency.steps import Frozen
from consistency.training import build
from consistency.training.lightning_patches import batches_before
from consistency.training.module import ConsistencyModule

LEFT_OUT = ("checkpoint", "cost", "curves", "evaluation", "samples", "snapshots")
"""Callbacks of a run that are no part of its step."""

ENDLESS = 10**12

PARTS = (
    "forward", "backward", "target", "teacher", "distance network", "optimizer", "averages", "data", "everything else",
    "bookkeeping",
)  # fmt: skip
"""Parts of a step. `everything else` is the rest of the objective, `bookkeeping` the rest of the step: Lightning, our module
and callbacks, the look for values that are not finite, logging."""

ACTIONS = {"train_dataloader_next": "data", "batch_to_device": "data", "backward": "backward"}
"""Names that Lightning gives its profiler, behind the last dot -> part."""


class Stopwatch(Profiler):
    """Seconds of each part of the steps, and of the processor in the main thread; a part within another is not counted in it.

    Off except inside of `running`. On a GPU it waits for the device wherever a part begins or ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {part: (0.0, 0.0) for part in PARTS}
        self.device = torch.device("cpu")
        self._stack: list[str] = []
        self._last = (0.0, 0.0)

    def start(self, action_name: str) -> None:
        """Begin a part, or an action of Lightning that is one."""
        part = ACTIONS.get(action_name.rpartition(".")[2], action_name)
        if self._stack and part in PARTS:
            self._charge()
            self._stack.append(part)

    def stop(self, action_name: str) -> None:
        """End it."""
        part = ACTIONS.get(action_name.rpartition(".")[2], action_name)
        if len(self._stack) > 1 and part in PARTS:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        clocks, part = (now(self.device), time.thread_time()), self._stack[-1]
        wall, processor = (c - last for c, last in zip(clocks, self._last, strict=True))
        self.seconds[part] = self.seconds[part][0] + wall, self.seconds[part][1] + processor
        self._last = clocks

    @contextmanager
    def running(self, module: ConsistencyModule) -> Iterator[None]:
        """Measure the steps of the body, by hooks on the parts of the module."""
        optimizer, members = module.trainer.optimizers[0], vars(module.data)

        def started(part: str) -> Callable[..., None]:
            return lambda *_: self.start(part)

        def started_online(*_: Any) -> None:
            # A mode without a target network evaluates the online one a second time, without gradient.
            self.start("forward" if torch.is_grad_enabled() else "target")

        def stopped(*_: Any) -> None:
            self.stop("forward")

        with ExitStack() as hooks:
            for part, name in parts_of(module):
                before = started(name) if name != "forward" else started_online
                hooks.enter_context(part.register_forward_pre_hook(before))
                hooks.enter_context(part.register_forward_hook(stopped, always_call=True))
            hooks.enter_context(optimizer.register_step_pre_hook(started("optimizer")))
            # The last hook behind a step, after those of the averages.
            hooks.enter_context(optimizer.register_step_post_hook(stopped))
            members["augmented"] = self.profile("data")(module.data.augmented)
            hooks.callback(members.pop, "augmented")
            self.device, self._stack = module.device, ["bookkeeping"]
            self._last = now(self.device), time.thread_time()
            yield
            self._charge()
            self._stack = []


def parts_of(module: ConsistencyModule) -> Iterator[tuple[nn.Module, str]]:
    """Yield the networks and the objective of a module, with the names of their parts of a step."""
    yield module.online, "forward"
    yield module.objective, "everything else"
    if module.target is not None:
        yield module.target, "target"
    for child in module.objective.children():
        if isinstance(child, Frozen):
            yield child, "teacher"
        elif child is not module.head and any(True for _ in child.parameters()):
            yield child, "distance network"


class Measurement(L.Callback):
    """Measures the steps of a fit, and ends it: operations, warm-up, windows with a baseline's in between, parts of a step.

    baseline: (module, trainer) -> the step of a loop with the run's weights, or None.
    parts: milliseconds of each part of a step, its share, and milliseconds of the processor in the main thread, measured
    in a window of its own.
    """

    def __init__(
        self, *, windows: int, seconds: float, baseline: Callable[..., Work] | None = None
    ) -> None:
        self.windows, self.seconds, self.baseline = windows, seconds, baseline
        self.stopwatch, self.parts = Stopwatch(), dict[str, dict[str, float]]()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if isinstance(bar := trainer.progress_bar_callback, TQDMProgressBar):
            bar.train_progress_bar.total = None
        self._plan = self._steps(trainer, module)
        next(self._plan)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (batches_before(trainer) + 1) % trainer.accumulate_grad_batches == 0:
            trainer.should_stop = next(self._plan, True)

    def _steps(self, trainer: L.Trainer, module: ConsistencyModule) -> Iterator[bool]:
        """Go through the measurements; at every yield the run takes an optimizer step."""
        device, baseline = module.device, self.baseline and partial(self.baseline, module, trainer)
        self.speed = Speed(module.data.batch_size)
        with FlopCounterMode(display=False) as counter:
            yield False
        self.speed.flops = counter.get_total_flops()
        window = Window(self.seconds / 2, device)
        while window.open():
            yield False
        yield from self.speed.measured(self.windows, self.seconds, device, baseline)
        window = Window(self.seconds, device)
        with self.stopwatch.running(module):
            while window.open():
                yield False
        whole = sum(wall for wall, _ in self.stopwatch.seconds.values())
        for part, (wall, processor) in self.stopwatch.seconds.items():
            ms, busy = 1e3 * wall / window.count, 1e3 * processor / window.count
            self.parts[part] = {"ms": ms, "share": wall / whole, "processor_ms": busy}


def fit(config: DictConfig, measurement: Measurement) -> None:
    """Measure the step of the configured run on one device, without evaluation, pictures and checkpoints."""
    config = deepcopy(config)
    config.mode.total_steps = int(config.mode.total_steps)  # else it would be max_steps
    config.trainer.max_steps, config.trainer.devices = ENDLESS, 1
    config.callbacks = {name: v for name, v in config.callbacks.items() if name not in LEFT_OUT}
    L.seed_everything(config.seed, workers=True, verbose=False)
    loggers, data = build.build_loggers(config), build.build_data(config)
    module = build.build_module(config, data)
    callbacks = [*build.build_callbacks(config), measurement]
    trainer = build.build_trainer(config, callbacks, loggers, data)
    register = module.after_each_step
    vars(trainer)["profiler"] = measurement.stopwatch
    vars(module)["after_each_step"] = lambda action, *undo: register(
        measurement.stopwatch.profile("averages")(action), *undo
    )
    trainer.fit(module, datamodule=data)
