"""The speed of a run's optimizer step, measured inside Lightning's Trainer as `train.py` runs it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import wraps
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from consistency.evaluation.timing import (
    Speed,
    Window,
    begin_peak_memory,
    now,
    peak_memory,
    repeated,
)
from consistency.steps import Frozen
from consistency.training import build
from consistency.training.lightning_patches import batches_before
from consistency.training.module import ConsistencyModule

LEFT_OUT = ("checkpoint", "curves", "evaluation", "samples", "snapshots")
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


class Loop(Protocol):
    """A loop that is compared with the run's."""

    def step(self) -> float: ...


class Stopwatch(Profiler):
    """Seconds of each part of the steps; time in a part within another one is not counted in the outer one.

    Off except inside of `running`. On a GPU it waits for the device wherever a part begins or ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.device = torch.device("cpu")
        self._stack: list[str] = []
        self._last = 0.0

    def enter(self, part: str) -> None:
        if self._stack:
            self._charge()
            self._stack.append(part)

    def leave(self) -> None:
        if len(self._stack) > 1:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        time = now(self.device)
        self.seconds[self._stack[-1]] += time - self._last
        self._last = time

    def start(self, action_name: str) -> None:
        if (part := ACTIONS.get(action_name.rpartition(".")[2])) is not None:
            self.enter(part)

    def stop(self, action_name: str) -> None:
        if action_name.rpartition(".")[2] in ACTIONS:
            self.leave()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time counted under `part`."""

        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return wrapped

    @contextmanager
    def running(self, module: ConsistencyModule) -> Iterator[None]:
        """Measure the steps of the body, by hooks on the parts of the module."""
        with ExitStack() as hooks:
            for part, name in parts_of(module):
                hooks.enter_context(part.register_forward_pre_hook(self._entering(name)))
                leaving = part.register_forward_hook(lambda *_: self.leave(), always_call=True)
                hooks.enter_context(leaving)
            optimizer = module.trainer.optimizers[0]
            hooks.enter_context(optimizer.register_step_pre_hook(self._entering("optimizer")))
            # The last of the hooks behind a step, after those of the averages.
            hooks.enter_context(optimizer.register_step_post_hook(lambda *_: self.leave()))
            members = vars(module.data)
            members["augmented"] = self.timed("data", module.data.augmented)
            hooks.callback(members.pop, "augmented")
            self.device, self._stack = module.device, ["bookkeeping"]
            self._last = now(self.device)
            yield
            self._charge()
            self._stack = []

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # A mode without a target network evaluates the online one a second time, without gradient.
            second = name == "forward" and not torch.is_grad_enabled()
            self.enter("target" if second else name)

        return hook


def parts_of(module: ConsistencyModule) -> Iterator[tuple[nn.Module, str]]:
    """Yield the networks and the objective of a module, with the names of their parts of a step."""
    yield module.online, "forward"
    yield module.objective, "everything else"
    if module.target is not None:
        yield module.target, "target"
    for child in module.objective.children():
        if isinstance(child, Frozen):
            yield child, "teacher"
        elif any(True for _ in child.parameters()):
            yield child, "distance network"


class Measurement(L.Callback):
    """Measures the steps of a fit, and ends it: operations, warm-up, windows with a baseline's in between, parts of a step.

    baseline: (module, trainer) -> a loop with the run's weights, or None.
    parts: the seconds of each part of a step, in a window of its own.
    """

    def __init__(
        self,
        *,
        windows: int,
        seconds: float,
        baseline: Callable[[ConsistencyModule, L.Trainer], Loop] | None = None,
    ) -> None:
        self.windows, self.seconds, self.baseline = windows, seconds, baseline
        self.stopwatch, self.parts = Stopwatch(), dict.fromkeys(PARTS, 0.0)

    def on_train_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        if (bar := trainer.progress_bar_callback) is not None:
            bar.train_progress_bar.total = None  # type: ignore[attr-defined]
        self._plan = self._steps(trainer, module)
        next(self._plan)

    def on_train_batch_end(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        if (batches_before(trainer) + 1) % trainer.accumulate_grad_batches == 0:
            trainer.should_stop = next(self._plan, True)

    def _steps(self, trainer: L.Trainer, module: ConsistencyModule) -> Iterator[bool]:
        """Go through the measurements; at every yield the run takes an optimizer step."""
        device, loop = module.device, None
        speed = self.speed = Speed(module.data.batch_size)
        with FlopCounterMode(display=False) as counter:
            yield False
        speed.flops = counter.get_total_flops()
        window = Window(self.seconds / 2, device)
        while window.open():
            yield False
        begin_peak_memory(device)
        for _ in range(self.windows):
            window = Window(self.seconds, device)
            while window.open():
                yield False
            speed.rates.append(window.rate(speed.batch))
            speed.memory = speed.memory or peak_memory(device)
            if self.baseline is not None:
                loop = loop or self._begun(self.baseline(module, trainer))
                rate = repeated(loop.step, speed.batch, self.seconds, device)
                speed.baseline_rates.append(rate)
        window = Window(self.seconds, device)
        with self.stopwatch.running(module):
            while window.open():
                yield False
        self.parts = {part: s / window.count for part, s in self.stopwatch.seconds.items()}

    def _begun(self, loop: Loop) -> Loop:
        for _ in range(2):
            loop.step()
        return loop


def fit(config: DictConfig, measurement: Measurement) -> None:
    """Measure the step of the configured run on one device, without evaluation, pictures and checkpoints."""
    config = deepcopy(config)
    config.mode.total_steps = (
        config.mode.total_steps
    )  # a number, which the next line leaves as it is
    config.trainer.max_steps, config.trainer.devices = ENDLESS, 1
    config.callbacks = {name: v for name, v in config.callbacks.items() if name not in LEFT_OUT}
    L.seed_everything(config.seed, workers=True, verbose=False)
    loggers, data = build.build_loggers(config), build.build_data(config)
    module = build.build_module(config, data)
    callbacks = [*build.build_callbacks(config), measurement]
    trainer = build.build_trainer(config, callbacks, loggers, data)
    trainer.profiler, register = measurement.stopwatch, module.after_each_step

    def register_timed(action: Callable[[], None]) -> None:
        register(measurement.stopwatch.timed("averages", action))

    vars(module)["after_each_step"] = register_timed
    trainer.fit(module, datamodule=data)
