"""Training speed, the cost of a run that follows from it, and the progress bar."""

import time
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor, nn

from consistency.evaluation.timing import figure, peak_memory
from consistency.runtime.ranks import print_once
from consistency.training.module import ConsistencyModule

SHORT = 100
"""Optimizer steps of a run that is over before its cost would be worth a line."""

UNTIMED, TIMED = 5, 20
"""The steps of a start: those in which kernels are chosen and compiled, and the one at which the clock is read."""


class Throughput(L.Callback):
    """Logs the images a second over all devices, and the axes of a run beside its steps: the images that it has seen, and
    its hours without evaluation, pictures and checkpoints, which continue those before in a resumed run.
    """

    def __init__(self) -> None:
        self.total_seconds, self._seconds, self._images = 0.0, 0.0, 0
        self.axes: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"total_seconds": self.total_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total_seconds = state_dict["total_seconds"]

    def on_train_batch_end(
        self, trainer: L.Trainer, module: ConsistencyModule, outputs: Any, batch: Any, index: int
    ) -> None:
        elapsed = time.perf_counter() - module.step_started
        self.total_seconds += elapsed
        self._seconds += elapsed
        images = batch if isinstance(batch, Tensor) else batch[0]
        self._images += (count := len(images) * trainer.world_size)
        seen = trainer.global_step * trainer.accumulate_grad_batches * count
        self.axes = {"speed/images_seen": seen, "speed/hours": self.total_seconds / 3600}
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            module.show("speed/images_per_second", self._images / self._seconds)
            module.log_dict(self.axes)
            self._seconds, self._images = 0.0, 0


class Cost(L.Callback):
    """Prints the cost of a run: before it begins its images, and the memory of a device without activations; after the first
    steps its hours at their rate, which waits for data included, and the peak of memory so far.
    """

    def on_train_start(self, trainer: L.Trainer, module: ConsistencyModule) -> None:
        self.first, self.began, self.left = trainer.global_step, 0.0, trainer.max_steps
        self.left -= self.first
        if self.left > SHORT:
            images = trainer.max_steps * module.data.batch_size
            gib = memory(module) / 2**30
            print_once(
                f"{images:,} images in all; {figure(gib)} GiB on a device for weights, gradients, moments and averages, "
                "without activations"
            )

    def on_train_batch_end(self, trainer: L.Trainer, module: ConsistencyModule, *_: Any) -> None:
        step = trainer.global_step - self.first
        if self.left <= SHORT or step < UNTIMED:
            return
        if not self.began:
            self.began = time.perf_counter()
        elif step >= TIMED:
            seconds = (time.perf_counter() - self.began) / (TIMED - UNTIMED)
            hours, rate = self.left * seconds / 3600, module.data.batch_size / seconds
            gib = peak_memory(module.device) / 2**10
            print_once(  # on a line of its own below the bar
                f"\n{figure(hours)} hours at {figure(rate)} images a second, without evaluation, pictures and checkpoints; "
                f"{figure(gib)} GiB at the peak"
            )
            self.left = 0


def memory(module: ConsistencyModule) -> int:
    """Return the bytes on its device of weights and averages, of the gradients, and of the optimizer's moments."""
    averages = (average.parameters() for average in module.averages.values())
    kept = chain(module.parameters(), module.buffers(), *averages)
    trained = module.online.parameters()
    beside = 1 + moments(module.make_optimizer, module.device)
    return _bytes(p for p in kept if p.device == module.device) + beside * _bytes(trained)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def moments(make_optimizer: Callable[..., torch.optim.Optimizer], device: torch.device) -> int:
    """Return how many numbers an optimizer keeps beside each weight, from its step of one weight."""
    weight = nn.Parameter(torch.zeros(1, device=device))
    weight.grad = torch.zeros_like(weight)
    optimizer = make_optimizer([weight])
    optimizer.step(lambda: 0.0)
    state = optimizer.state[weight].values()
    return sum(isinstance(value, Tensor) and value.shape == weight.shape for value in state)


class StepBar(TQDMProgressBar):
    """Lightning's progress bar, from the first batch of the run to the last."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Set position and length, which Lightning sets at the start of an epoch: a resumed run starts none."""
        super().on_train_start(trainer, *_)
        bar = self.train_progress_bar
        bar.set_description("Training")
        bar.total = self.total_train_batches
        bar.n = bar.initial = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        bar.refresh()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Keep the bar: a run is one epoch."""

    def on_exception(self, *_: Any) -> None:
        """Close the bar, which would otherwise appear once more below the error message."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

    def get_metrics(self, *arguments: Any) -> dict[str, int | str | float | dict[str, float]]:
        """Return the numbers to show, without their sections."""
        shown = super().get_metrics(*arguments).items()
        return {name.rpartition("/")[2]: value for name, value in shown if name != "v_num"}
