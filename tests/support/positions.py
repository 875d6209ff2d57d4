"""Record the images of each rank in an uninterrupted run and in resumed ones.

`python positions.py <settings as JSON>` trains a dummy weight on images that encode their index, saves at the steps
`save_at`, resumes from each with every number of workers in `workers`, and writes the indices of each micro-batch to
`output`/<run>_rank_<r>.json. Lightning starts further ranks.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from consistency.data.module import DataModule
from consistency.data.shards import Stream
from consistency.data.source import Source
from consistency.training.build import quiet


class Numbered(Source):
    """Images of 1x2x2 pixels whose first two grey values are their index in base 256."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return torch.tensor([[[index // 256, index % 256], [0, 0]]], dtype=torch.uint8), 0


def numbers(images: Tensor) -> list[int]:
    """Return the indices of `Numbered` images."""
    flat = images.flatten(1).long()
    return (flat[:, 0] * 256 + flat[:, 1]).tolist()


class Watcher(L.LightningModule):
    """A module that records the indices of every micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(numbers(batch[0]))
        return self.weight.sum() * batch[0].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAt(Callback):
    """A callback that saves a checkpoint after each of the optimizer steps `steps`."""

    def __init__(self, steps: list[int], folder: Path) -> None:
        self.steps, self.folder, self.done = steps, folder, 0

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step != self.done:
            self.done = trainer.global_step
            if self.done in self.steps:
                trainer.save_checkpoint(self.folder / f"{self.done}.ckpt")


def data(settings: dict[str, Any], workers: int) -> DataModule:
    """Build the data module of the settings."""

    def source() -> Source:
        if settings.get("stream"):
            return Stream(
                path=settings["stream"], mixing=2, cache=settings.get("cache"), cache_gigabytes=1
            )
        return Numbered(settings["size"])

    return DataModule(
        source=source,
        held_out=None,
        image_size=2,
        channels=1,
        num_classes=None,
        batch_size=settings["batch_size"],
        device_batch_size=settings["device_batch_size"],
        num_workers=workers,
        flip=False,
        seed=0,
    )


def run(
    settings: dict[str, Any], name: str, *, workers: int, save_at: list[int], resume: str | None
) -> None:
    """Train once, from the start or from a checkpoint."""
    output, module = Path(settings["output"]), Watcher()
    module_data = data(settings, workers)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=settings["devices"],
        strategy="ddp" if settings["devices"] > 1 else "auto",
        max_steps=settings["steps"],
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SaveAt(save_at, output)],
    )
    trainer.accumulate_grad_batches = module_data.split(trainer.world_size).accumulated
    trainer.fit(module, datamodule=module_data, ckpt_path=resume)
    (output / f"{name}_rank_{trainer.global_rank}.json").write_text(json.dumps(module.seen))


def main(settings: dict[str, Any]) -> None:
    """Run the settings; with a checkpoint in `from`, only resume from it."""
    quiet()
    output = Path(settings["output"])
    if settings.get("from"):
        run(settings, "other", workers=0, save_at=[], resume=settings["from"])
        return
    run(settings, "whole", workers=0, save_at=settings["save_at"], resume=None)
    for step in settings["save_at"]:
        for workers in settings["workers"]:
            run(
                settings,
                f"from_{step}_{workers}",
                workers=workers,
                save_at=[],
                resume=str(output / f"{step}.ckpt"),
            )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
