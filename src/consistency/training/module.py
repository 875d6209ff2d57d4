"""The LightningModule around an objective: it moves data, draws keys, logs; the formula stays in the objective."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from consistency.data.feed import fed
from consistency.data.module import DataModule
from consistency.denoiser import Denoiser
from consistency.errors import UserError, require
from consistency.objectives import Losses, Objective
from consistency.preconditioning import Preconditioning
from consistency.randomness import WHOLE, Share, generator, key
from consistency.tensors import Data, Label
from consistency.training.io_errors import warn
from consistency.training.nonfinite import NonfiniteGuard

OBJECTIVE = "objective."


class ConsistencyModule(L.LightningModule):
    """Trains `online` with `objective`.

    online: the network under its training preconditioning; sampling_preconditioning: the one its samples are drawn
    with; card: the plain description of the denoiser that every checkpoint carries; config: the resolved plain config
    of the run; seed: of every draw; on_nonfinite: policy of `NonfiniteGuard`; sources: which files the run read its
    teacher and initial weights from; callbacks: builds what the method does beside the loss, for a trainer that has no
    such callbacks yet.

    Trains on a `DataModule`, whose images it mirrors where that says so, or on any loader of (images, labels), see
    `consistency.data.feed`.

    k counts the optimizer steps that were really taken, which `trainer.global_step` does not under a gradient scaler.
    Callbacks publish N(k) as `num_scales` and, where the mode has them, set `target` and `averages`.
    """

    def __init__(
        self,
        *,
        online: Denoiser,
        objective: nn.Module,
        sampling_preconditioning: Preconditioning,
        optimizer: Callable[..., torch.optim.Optimizer],
        card: dict[str, Any],
        config: dict[str, Any],
        seed: int,
        on_nonfinite: str,
        sources: dict[str, dict[str, str]],
        callbacks: Callable[[], Sequence[Callback]] = tuple,
    ) -> None:
        super().__init__()
        self.online, self.objective = online, objective.requires_grad_(False)
        self.sampling_preconditioning = sampling_preconditioning
        self.make_optimizer = optimizer
        self.card, self.config, self.seed = card, config, seed
        self.guard, self.sources = NonfiniteGuard(on_nonfinite), sources
        self.make_callbacks = callbacks
        self.k = 0
        self.num_scales = 0
        self.target: Denoiser | None = None
        self.averages: dict[str, nn.Module] = {}
        self.step_started = 0.0
        self._told_range = False

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that come with the module, but for those of a kind that the trainer has."""
        there = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [callback for callback in self.make_callbacks() if type(callback) not in there]

    # The optimizer and k

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.make_optimizer(self.online.parameters())
        # A fused one would leave out what overflows inside its kernel, where neither k nor an average notices.
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return optimizer

    def on_fit_start(self) -> None:
        """Counts real steps; callbacks have registered their hooks before, so these see k before it grows."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self._counter = optimizer.register_step_post_hook(lambda *_: self._count())

    def _count(self) -> None:
        self.k += 1

    def on_fit_end(self) -> None:
        self._counter.remove()
        self.guard.tell_overflows()

    # The step

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Dropout draws from the global generators: keyed by place, like every other draw. All callbacks are done by now."""
        place = key(self.seed, "dropout", self.global_rank, self._position)
        torch.default_generator.manual_seed(place)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(place)
        self.step_started = time.perf_counter()

    @property
    def _position(self) -> int:
        """Batches before this one: `batch_idx` in the one epoch of our runs, where a script has several."""
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready) - 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        accumulated = self.trainer.accumulate_grad_batches
        step, micro = divmod(self._position, accumulated)
        draw = generator(self.seed, "train", 0, step, device=self.device)
        share = Share(
            micro * self.trainer.world_size + self.global_rank,
            accumulated * self.trainer.world_size,
        )
        # An objective of one's own needs to know nothing of shares where the batch is whole.
        part = {} if share == WHOLE else {"share": share}
        x_0, label = self._seen(batch, draw, **part)
        objective: Objective = self.objective
        losses = objective(
            self.online, self.target or self.online, x_0, label, self.num_scales, draw, **part
        )
        loss = losses.loss.mean()
        self.guard.note(losses)
        self._log_losses(losses, loss.detach())
        return loss

    def _seen(self, batch: Any, draw: torch.Generator, **part: Share) -> tuple[Data, Label]:
        """Images in [-1, 1] and labels of a batch."""
        if isinstance(data := self._datamodule, DataModule):
            images, classes = batch
            label = None if data.num_classes is None else classes
            return data.augmented(images, draw, **part), label
        image = self.card.get("image")
        shape = None if image is None else (image["channels"], image["size"], image["size"])
        x_0, label = fed(batch, shape=shape, num_classes=self.card.get("num_classes"))
        if not self._told_range:
            self._told_range = True
            if self.global_rank == 0 and float(x_0.min()) >= 0:
                warn(
                    "the first images lie between 0 and 1 and are taken as they are; the range is -1 to 1, "
                    "so where 0 is black scale them: 2 * x - 1"
                )
        return x_0, label

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Computes the gradients first, so that the step can be left out where loss or gradients are not finite."""
        assert optimizer_closure is not None
        loss = optimizer_closure()
        term, k = type(self.objective).__name__, self.k
        strategy = self.trainer.strategy
        if self.guard.allows(self._gradients(), strategy=strategy, term=term, k=k):
            optimizer.step(closure=lambda: loss)
            if (scaler := self._scaler) is not None:
                self.guard.scaled(taken=self.k > k, scale=scaler.get_scale, term=term, k=k)

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _gradients(self) -> dict[str, Tensor]:
        """By parameter, for the guard; a gradient scaler looks for overflows itself."""
        if self._scaler is not None:
            return {}
        return {n: p.grad for n, p in self.online.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Stops where the guard says so; here, because the state of before is complete and callbacks have kept it."""
        if self.guard.verdict is not None:
            raise UserError(self.guard.verdict)

    def _log_losses(self, losses: Losses, loss: Tensor) -> None:
        self.log("loss", loss, prog_bar=True, logger=False)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self.log("train/loss", loss, sync_dist=True)
        quarters = losses.loss.detach()[losses.t.argsort()].tensor_split(4)
        for number, quarter in enumerate(quarters, start=1):
            if len(quarter):
                self.log(f"train/loss_noise_quartile_{number}", quarter.mean(), sync_dist=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        gradients = [p.grad for p in self.online.parameters() if p.grad is not None]
        self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    @property
    def _datamodule(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def data(self) -> DataModule:
        """The run's data module; `UserError` where it trains on a loader."""
        data = self._datamodule
        require(
            isinstance(data, DataModule),
            "the data module of a run, for a callback that looks at the training images",
            "a loader" if data is None else type(data).__name__,
            "say fit(module, datamodule=consistency.training.run.build_data(config)), or leave that callback out",
        )
        assert isinstance(data, DataModule)
        return data

    # Samples

    @contextmanager
    def sampling_denoiser(self, weights: str) -> Iterator[Denoiser]:
        """The denoiser that samples are drawn with, in eval mode meanwhile; `weights` is online, target, ema (the first
        average) or ema:<decay>.
        """
        networks: dict[str, nn.Module] = {"online": self.online.network, **self.averages}
        if self.target is not None:
            networks["target"] = self.target.network
        if self.averages:
            networks["ema"] = next(iter(self.averages.values()))
        require(
            weights in networks, f"weights among {sorted(networks)}", weights, "choose one of them"
        )
        network = networks[weights]
        before = network.training
        try:
            yield Denoiser(network, self.sampling_preconditioning).eval()
        finally:
            network.train(before)

    def forward(self, x_t: Data, t: Tensor, label: Label = None) -> Data:
        """The online denoiser."""
        return self.online(x_t, t, label)

    # Checkpoints: tensors and plain values only

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds card, config, k and sources; leaves out teacher and perceptual weights, which come from files of their own."""
        checkpoint["card"], checkpoint["config"], checkpoint["k"] = self.card, self.config, self.k
        checkpoint["sources"] = self.sources
        checkpoint["left_out_in_a_row"] = self.guard.in_a_row
        checkpoint["overflows"] = [self.guard.overflows, self.guard.overflows_in_a_row]
        checkpoint["state_dict"] = {
            name: value
            for name, value in checkpoint["state_dict"].items()
            if not name.startswith(OBJECTIVE)
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.k = checkpoint["k"]
        self.guard.in_a_row = checkpoint["left_out_in_a_row"]
        # Those of older checkpoints were not counted.
        self.guard.overflows, self.guard.overflows_in_a_row = checkpoint.get("overflows", (0, 0))
        own = {f"{OBJECTIVE}{name}": v for name, v in self.objective.state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **own}
