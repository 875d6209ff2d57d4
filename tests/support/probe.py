"""Callbacks, a logger and a weighting that record a rank's batches or cause faults."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger

from consistency.errors import UserError
from consistency.runtime.ranks import this_launch
from consistency.tensors import PerSample, Time
from consistency.training.module import ConsistencyModule


class RankProbe(Callback):
    """Writer of rank_<r>.json: learning rate, seed, N, k, threads, digests of the weights and of each batch's images."""

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
        threads = torch.get_num_threads()
        text = json.dumps({"same": seen, "images": self.images, "threads": threads})
        (self.folder / f"rank_{trainer.global_rank}.json").write_text(text)


class Poisoned:
    """A weighting of 1 that is NaN for the first sample in the calls number `calls` (from 0), on one rank or all."""

    def __init__(self, *, calls: Sequence[int], rank: int | None = None) -> None:
        self.calls, self.made = set(calls), 0
        self.here = rank in (None, this_launch().global_rank(1))

    def __call__(self, t: Time, r: Time) -> PerSample:
        weight = torch.ones_like(t)
        if self.here and self.made in self.calls:
            weight[0] = torch.nan
        self.made += 1
        return weight


class At(Callback):
    """A callback that acts at the start of micro-batch `batch` (from 0), on one rank or all."""

    def __init__(self, *, batch: int, rank: int | None = None) -> None:
        self.batch = batch
        self.here = rank in (None, this_launch().global_rank(1))

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.here and batch_idx == self.batch:
            self.act(trainer)

    def act(self, trainer: L.Trainer) -> None:
        """Act."""
        raise NotImplementedError


class Signal(At):
    """Sender of a signal to its own process or process group."""

    def __init__(self, *, name: str, group: bool = False, **place: Any) -> None:
        super().__init__(**place)
        self.number, self.group = signal.Signals[name], group

    def act(self, trainer: L.Trainer) -> None:
        if self.group:
            os.killpg(0, self.number)
        else:
            os.kill(os.getpid(), self.number)


class KillService(At):
    """Killer of the W&B service that this process started."""

    def act(self, trainer: L.Trainer) -> None:
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):  # another process of the machine may end while it is read
                text = status.read_text()
                if f"PPid:\t{os.getpid()}\n" in text and "wandb" in text.splitlines()[0]:
                    os.kill(int(status.parent.name), signal.SIGKILL)


class Remove(At):
    """Remover of a folder."""

    def __init__(self, *, folder: str, **place: Any) -> None:
        super().__init__(**place)
        self.folder = folder

    def act(self, trainer: L.Trainer) -> None:
        shutil.rmtree(self.folder)


class Fill(At):
    """Filler of a file system to the last byte, until the start of micro-batch `until`."""

    def __init__(self, *, folder: str, until: int | None, **place: Any) -> None:
        super().__init__(**place)
        self.file, self.until = Path(folder) / "filler", until

    def on_train_batch_start(self, *arguments: Any) -> None:
        if arguments[-1] == self.until:
            self.file.unlink()
        super().on_train_batch_start(*arguments)

    def act(self, trainer: L.Trainer) -> None:
        with self.file.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass


class Seal(At):
    """A callback that makes the file system of a folder read-only."""

    def __init__(self, *, folder: str, **place: Any) -> None:
        super().__init__(**place)
        self.folder = folder

    def act(self, trainer: L.Trainer) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)


class Obstruct(At):
    """A callback that creates folders at the paths of files that a run writes."""

    def __init__(self, *, folders: Sequence[str], **place: Any) -> None:
        super().__init__(**place)
        self.folders = [Path(folder) for folder in folders]

    def act(self, trainer: L.Trainer) -> None:
        for folder in self.folders:
            folder.mkdir(parents=True)


class Loud(At):
    """A callback that raises a `UserError` or an unexpected error."""

    def __init__(self, *, user: bool, **place: Any) -> None:
        super().__init__(**place)
        self.error = UserError("expected quiet\n  got: noise") if user else ValueError("a bug")

    def act(self, trainer: L.Trainer) -> None:
        raise self.error


class Unsteady(Logger):
    """A logger that raises an I/O error at a step."""

    name, version = "unsteady", ""

    def __init__(self, *, step: int) -> None:
        super().__init__()
        self.step = step

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Log nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step == self.step:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere")


class Exploding(Callback):
    """A callback that makes one gradient infinite in one step, while the loss is finite."""

    def __init__(self, *, parameter: str, batch: int) -> None:
        self.parameter, self.batch = parameter, batch

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1 == self.batch:
            gradient = module.get_parameter(self.parameter).grad
            assert gradient is not None
            gradient.view(-1)[0] = torch.inf
