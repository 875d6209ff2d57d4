"""Parts for the tests: what each rank saw, written to a file of its own, and a loss that is not finite at will."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from consistency.tensors import PerSample, Time
from consistency.training.module import ConsistencyModule


class RankProbe(Callback):
    """Writes rank_<r>.json: learning rate, seed, N, k, and a digest of the weights and of the images of each batch."""

    def __init__(self, *, folder: str) -> None:
        self.folder, self.images = Path(folder), []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.images.append([hashlib.md5(i.cpu().numpy().tobytes()).hexdigest() for i in batch[0]])

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule)
        digest = hashlib.md5()
        for parameter in module.online.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        seen = {
            "weights": digest.hexdigest(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "num_scales": module.num_scales,
            "k": module.k,
            "seed": module.seed,
        }
        text = json.dumps({"same": seen, "images": self.images})
        (self.folder / f"rank_{trainer.global_rank}.json").write_text(text)


class Poisoned:
    """A weighting of 1, but NaN for the first sample of the calls number `calls` (from 0), on one rank or on all."""

    def __init__(self, *, calls: Sequence[int], rank: int | None = None) -> None:
        self.calls, self.made = set(calls), 0
        self.here = rank is None or int(os.environ.get("LOCAL_RANK", "0")) == rank

    def __call__(self, t: Time, r: Time) -> PerSample:
        weight = torch.ones_like(t)
        if self.here and self.made in self.calls:
            weight[0] = torch.nan
        self.made += 1
        return weight
