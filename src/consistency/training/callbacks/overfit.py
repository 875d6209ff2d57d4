"""Training on one batch, whose loss a run that works makes small."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from consistency.errors import require
from consistency.runtime.ranks import print_once


class Overfit(L.Callback):
    """Trains on the first batch alone, and stops when the mean loss of `window` steps is below `share` of the first mean.

    Times and noise are new in every step, so that one loss says little. At the end it prints both means.
    """

    def __init__(self, *, share: float, window: int) -> None:
        require(0 < share < 1, "share above 0 and below 1", share, "give it, for example 0.1")
        require(window >= 1, "window >= 1", window, "give a number of steps")
        self.share, self.window = share, window
        self.batch: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.first = self.last = float("nan")

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int
    ) -> None:
        """Put the first batch in the place of each one that follows."""
        tensors = [part for part in batch if isinstance(part, Tensor)]
        self.batch = self.batch or [tensor.clone() for tensor in tensors]
        for tensor, first in zip(tensors, self.batch, strict=True):
            tensor.copy_(first)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Compare the means after every window of steps."""
        self.losses.append(outputs["loss"].detach())
        if len(self.losses) == self.window:
            self.last = torch.stack(self.losses).mean().item()
            self.first = self.last if self.first != self.first else self.first
            self.losses = []
            trainer.should_stop = self.last < self.share * self.first

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Print both means."""
        small = self.last < self.share * self.first
        rest = (
            "" if small else f", still above {self.share:g} of it: try another optimizer.lr first"
        )
        fell = f"{self.first:.4g} to {self.last:.4g} in {trainer.global_step} steps"
        print_once(f"One batch: the mean loss of {self.window} steps went from {fell}{rest}")
