"""The LightningModule around an objective: data, random keys, logging. The formula is in the objective."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from consistency.augmentation import EDMAugmentation
from consistency.averaging import frozen_copy
from consistency.data.module import DataModule, unpack_batch
from consistency.denoiser import Denoiser
from consistency.errors import require
from consistency.inference.autoencoder import autoencoder_of
from consistency.inference.card import ModelCard
from consistency.inference.generate import Request
from consistency.networks.edm2 import MPConv, forced_normalisation
from consistency.objectives import Losses
from consistency.preconditioning import Preconditioning
from consistency.randomness import WHOLE, Share, generator, key
from consistency.runtime.devices import compile_in_place, share_threads
from consistency.tensors import Data, Label
from consistency.training.io_errors import warn
from consistency.training.lightning_patches import batches_before, begin_again
from consistency.training.nonfinite import NonfiniteGuard
from consistency.training.optimizers import choose_kernels, count_back, found_inf, leaves_out

OBJECTIVE = "objective."
HEAD = f"{OBJECTIVE}head."

QUEUES = ("cuda",)
"""Devices that compute behind the host, which waits where it reads a result."""


class ConsistencyModule(L.LightningModule):
    """Trains `online` with `objective`, on a `DataModule` or on any loader of (images, labels) (`consistency.data.module`).

    online: the network under its training preconditioning; optimizer: parameters -> optimizer.
    card, config, sources: the description of the denoiser, the resolved plain configuration, and path, weights and SHA-256
    of the teacher and of the initial weights, part of every checkpoint.
    on_nonfinite: policy of `NonfiniteGuard`; compilation: whether to compile the networks, or a mode of `torch.compile`.
    callbacks: builds the callbacks of the method, for a trainer that has none of their kind.

    k counts the optimizer steps that were taken, `k_before` those before this batch; under a gradient scaler
    `trainer.global_step` counts more. Callbacks set N(k) as `num_scales` and, if the mode has them, `target` and `averages`.
    """

    def __init__(
        self,
        *,
        online: Denoiser,
        objective: nn.Module,
        sampling_preconditioning: Preconditioning,
        optimizer: Callable[..., torch.optim.Optimizer],
        card: ModelCard | None,
        config: dict[str, Any],
        seed: int,
        on_nonfinite: str,
        sources: dict[str, dict[str, str]],
        callbacks: Callable[[], Sequence[L.Callback]] = tuple,
        compilation: bool | str = False,
        augmentation: EDMAugmentation | None = None,
    ) -> None:
        super().__init__()
        self.online, self.objective = online, objective.requires_grad_(False)
        if self.head is not None:
            self.head.requires_grad_(True)
        self.sampling_preconditioning = sampling_preconditioning
        self.make_optimizer, self.make_callbacks = optimizer, callbacks
        self.card, self.config, self.seed, self.sources = card, config, seed, sources
        self.guard, self.compilation = NonfiniteGuard(on_nonfinite), compilation
        self.augmentation = augmentation
        self.k = self.k_before = 0
        self.num_scales: Any = 0
        self.target: Denoiser | None = None
        self.settle_averages: Callable[[], None] = lambda: None
        self._averages: dict[str, nn.Module] = {}
        self.register_state_dict_pre_hook(lambda module, *_: module.settle())
        self.step_started = 0.0
        self._range_checked = False

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callbacks of the method, except kinds that the trainer has already."""
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [callback for callback in self.make_callbacks() if type(callback) not in present]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.make_optimizer([parameter for _, parameter in self.trained()])
        # A fused optimizer would skip an overflow inside its kernel, unseen by k and the averages.
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        choose_kernels(optimizer, self.device.type)
        return optimizer

    @property
    def head(self) -> nn.Module | None:
        """The part of the objective that is trained beside the network, if it has one."""
        return getattr(self.objective, "head", None)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Return all that the optimizer updates by name: the parameters of the network, then those of the head."""
        head = [] if self.head is None else list(self.head.named_parameters(prefix="head"))
        return [*self.online.named_parameters(), *head]

    def after_each_step(
        self, action: Callable[[int], None], undo: Callable[[], object] | None = None
    ) -> None:
        """Call `action(k)` after every optimizer step that is taken, k = 0, 1, ...

        Where the look at a step comes later (`optimizer_step`), so does the action. An action with `undo` is called at once,
        and `undo` if the step is left out.
        """
        if undo is None:
            self._when_settled.append(action)
        else:
            self._at_once.append((action, undo))

    def _taken(self, *_: object) -> None:
        for action, _undo in self._at_once:
            action(self.k)
        self.k += 1
        if not self.guard.looking:
            self._complete()

    def _complete(self) -> None:
        for action in self._when_settled:
            action(self.k - 1)

    def settle(self) -> bool:
        """Wait for the look at the last step, unless it has come, and take the step back if it must be left out.

        Return whether the step stays. k, target and averages are valid afterwards; weights and moments always are.
        """
        if not self.guard.looking:
            return True
        if self.guard.passed():
            self._complete()
            return True
        for _, undo in self._at_once:
            undo()
        self.k -= 1
        count_back(self.trainer.optimizers[0])
        self._taken_back = True
        return False

    def reached(self, every: int) -> bool:
        """Whether this batch ended a step after which k is a multiple of `every`. Waits for the look only if it may be."""
        return self.k != self.k_before and self.k % every == 0 and self.settle()

    def setup(self, stage: str) -> None:
        """Give each process of a machine its share of the CPU."""
        share_threads(self.trainer.strategy.root_device, self.trainer.num_devices)
        self._at_once: list[tuple[Callable[[int], None], Callable[[], object]]] = []
        self._when_settled: list[Callable[[int], None]] = []
        self._taken_back = False

    def on_fit_start(self) -> None:
        """Count the steps and compile the networks, whose copies the callbacks' `on_fit_start` has made."""
        self.named = self.trained()
        trained = nn.ModuleList([self.online] if self.head is None else [self.online, self.head])
        self.normalise_weights = forced_normalisation(trained)
        # It changes the weights before the passes behind which the averages are updated.
        self.normalises = any(isinstance(part, MPConv) for part in trained.modules())

        self.trainer.optimizers[0].register_step_post_hook(self._taken)
        denoisers = (part for part in self.modules() if isinstance(part, Denoiser))
        for network in (*(denoise.network for denoise in denoisers), *self.averages.values()):
            compile_in_place(network, self.compilation)

    def on_train_start(self) -> None:
        """Store the moments of a checkpoint as the weights are: fused kernels pair numbers by their place in memory."""
        for weight, state in self.trainer.optimizers[0].state.items():
            for name, value in state.items():
                alike = isinstance(value, Tensor) and value.shape == weight.shape
                if alike and value.stride() != weight.stride():
                    state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)

    def on_fit_end(self) -> None:
        self.guard.report_overflows()

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Seed the global generators, which dropout draws from, by position. All callbacks have run by now."""
        seed = key(self.seed, "dropout", self.global_rank, batches_before(self.trainer))
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        self.k_before, self.step_started = self.k, time.perf_counter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = None if self._taken_back else self._losses(batch)
        self.settle()  # behind the passes, which so need not wait for the step before
        if self.guard.verdict is not None:
            return torch.zeros((), device=self.device, requires_grad=True)
        if losses is None or self._taken_back:  # the schedules are those of another k
            self._taken_back, losses = False, None
            begin_again(self.trainer, batch, batch_idx)
            losses = self._losses(batch)
        loss = losses.loss.mean()
        self.guard.note(losses)
        self._log_losses(losses, loss.detach())
        return loss

    def _losses(self, batch: Any) -> Losses:
        accumulated, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        step, micro = divmod(batches_before(self.trainer), accumulated)
        if micro == 0:
            self.normalise_weights()
        draw = generator(self.seed, "train", 0, step, device=self.device)
        share = Share(micro * ranks + self.global_rank, accumulated * ranks)
        # An objective without a `share` argument is enough for whole batches.
        part = {} if share == WHOLE else {"share": share}
        x_0, label = self._unpacked(batch, draw, **part)
        networks: tuple[Any, Any] = self.online, self.target or self.online
        if self.augmentation is not None:
            numbers = generator(self.seed, "augmentation", step)
            drawn = self.augmentation.draw(share.parts * len(x_0), numbers)
            rows = share.rows(len(x_0))
            x_0, augment = self.augmentation(x_0, {n: d[..., rows] for n, d in drawn.items()})
            networks = tuple(partial(network, augment=augment) for network in networks)  # type: ignore[assignment]
        losses: Losses = self.objective(*networks, x_0, label, self.num_scales, draw, **part)
        return losses

    def _unpacked(self, batch: Any, draw: torch.Generator, **part: Share) -> tuple[Data, Label]:
        """Return the images in [-1, 1] and the labels of a batch."""
        data, card = self.trainer.datamodule, self.card  # type: ignore[attr-defined]
        if isinstance(data, DataModule):
            images, label = batch
            images = data.augmented(images, draw, **part)
            return images, None if data.num_classes is None else label
        shape, classes = (None, None) if card is None else (card.shape, card.num_classes)
        x_0, label = unpack_batch(batch, shape=shape, num_classes=classes)
        if not self._range_checked and self.global_rank == 0 and float(x_0.min()) >= 0:
            text = "the first images lie between 0 and 1 and are taken as they are; the range is -1 to 1"
            warn(f"{text}, so if 0 is black scale them: 2 * x - 1")
        self._range_checked = True
        return x_0, label

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Take the step, unless a loss or gradient is not finite.

        On a GPU the look comes later (`settle`): behind the passes of the next step, so that its kernels are queued before
        anything waits, or before anything else reads the state. Until then the device alone knows whether the step is left
        out: the optimizer's kernel reads it.
        """
        loss = optimizer_closure()
        if self.guard.verdict is not None:
            return
        step = f"in the term {type(self.objective).__name__} at step k={self.k}"
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # A gradient scaler looks for overflows itself.
        gradients = {n: p.grad for n, p in self.named if p.grad is not None and scaler is None}
        inner, later = self.trainer.optimizers[0], scaler is None and self._looks_later()
        left_out = self.guard.begin(gradients, step, exact=later)
        if not later and not self.guard.passed():
            return
        with found_inf(inner, left_out if later else None):
            optimizer.step(closure=lambda: loss)
        if scaler is not None:
            self.guard.scaled(taken=self.k > self.k_before, scale=scaler.get_scale, step=step)

    def _looks_later(self) -> bool:
        """Whether nothing reads the result of this step before the passes of the next one."""
        last = self.trainer.global_step + 1 == self.trainer.max_steps
        able = self.device.type in QUEUES and leaves_out(self.trainer.optimizers[0])
        # Clipping would spread what is not finite over the gradients that the look names.
        clipped = self.trainer.gradient_clip_val is not None
        return able and not (last or self.logs_this_step or clipped or self.normalises)

    def on_train_batch_end(self, *_: object) -> None:
        """Stop here if the guard demands it: the state before the step is complete and saved."""
        if self.guard.verdict is not None:
            raise self.guard.verdict

    def on_train_epoch_end(self) -> None:
        self.settle()
        self.on_train_batch_end()

    @property
    def averages(self) -> dict[str, nn.Module]:
        """The averaged networks by name, after the last step."""
        self.settle()
        self.settle_averages()
        return self._averages

    @property
    def logs_this_step(self) -> bool:
        """Whether the step in progress gets a row of metrics."""
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def show(self, name: str, value: float | Tensor, **options: bool) -> None:
        """Log a number for the progress bar too. It stays on the CPU, as Lightning reads those again in every step."""
        self.log(name, torch.tensor(float(value)), prog_bar=True, **options)  # type: ignore[arg-type]

    def _log_losses(self, losses: Losses, loss: Tensor) -> None:
        if not self.logs_this_step:
            return
        self.show("loss", loss, logger=False)
        self.log("train/loss", loss, sync_dist=True)
        quarters = losses.loss.detach()[losses.t.argsort()].tensor_split(4)
        for number, quarter in enumerate(quarters, start=1):
            if len(quarter):
                self.log(f"train/loss_noise_quartile_{number}", quarter.mean(), sync_dist=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.logs_this_step:
            gradients = [p.grad for _, p in self.named if p.grad is not None]
            self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    @property
    def data(self) -> DataModule:
        """The data module of the run; raises `UserError` if the run trains on a loader."""
        data: DataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        require(
            isinstance(data, DataModule),
            "the data module of a run, for a callback that looks at the training images",
            "a loader" if data is None else type(data).__name__,
            "fit(module, datamodule=consistency.training.build.build_data(config)), or leave the callback out",
        )
        return data

    @contextmanager
    def sampling(self, weights: str, seed: int, labels: object = None) -> Iterator[Request]:
        """Yield a request for samples of these weights: online, target, ema (the first average), ema:<decay>."""
        networks: dict[str, nn.Module] = {"online": self.online.network, **self.averages}
        if self.target is not None:
            networks["target"] = self.target.network
        if self.averages:
            networks["ema"] = next(iter(self.averages.values()))
        require(weights in networks, f"weights among {sorted(networks)}", weights, "choose one")
        network, card = networks[weights], self.card
        before = network.training
        assert card is not None
        if card.latents is not None:
            autoencoder_of(card.latents, self.device)  # refused before the work
        if next(network.parameters()).device != self.device:  # an average on the host
            network = frozen_copy(network).to(self.device)
        try:
            denoise = Denoiser(network, self.sampling_preconditioning).eval()
            yield Request(denoise=denoise, card=card, labels=labels, seed=seed, device=self.device)
        finally:
            network.train(before)

    def forward(self, x_t: Data, t: Tensor, label: Label = None) -> Data:
        """The online denoiser."""
        return self.online(x_t, t, label)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add card, config, k and sources; keep of the objective its head alone: teacher and LPIPS have files of their own."""
        checkpoint["card"] = {} if self.card is None else self.card.saved()
        checkpoint |= {"config": self.config, "k": self.k, "sources": self.sources}
        checkpoint["left_out_in_a_row"] = self.guard.in_a_row
        checkpoint["overflows"] = [self.guard.overflows, self.guard.overflows_in_a_row]
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {
            n: v for n, v in state if not n.startswith(OBJECTIVE) or n.startswith(HEAD)
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.k = checkpoint["k"]
        self.guard.in_a_row = checkpoint["left_out_in_a_row"]
        # Older checkpoints have no such counts.
        self.guard.overflows, self.guard.overflows_in_a_row = checkpoint.get("overflows", (0, 0))
        saved = checkpoint["state_dict"]
        checkpoint["state_dict"] = self.objective.state_dict(prefix=OBJECTIVE) | saved
