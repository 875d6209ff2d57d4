"""A callback for the tests: what each rank saw, written to a file of its own."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

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
