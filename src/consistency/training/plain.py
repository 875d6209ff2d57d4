"""The training step in the structure of the published PyTorch code, beside which the benchmark puts ours."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import singledispatch
from typing import Any, ClassVar, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from consistency.averaging import power_decay
from consistency.errors import require
from consistency.networks.adm import AttentionBlock
from consistency.networks.unet import UNetBlock
from consistency.objectives import ConsistencyObjective, Losses, Objective
from consistency.processes import variance_exploding
from consistency.randomness import DropoutState, generator
from consistency.runtime.devices import PRECISIONS
from consistency.tensors import Data, Denoise, Label, Time, broadcast_time
from consistency.training.callbacks.ema import EvaluationEMA, TargetEMA
from consistency.training.callbacks.periodic import callback_of
from consistency.training.callbacks.schedules import ScaleSchedule
from consistency.training.module import ConsistencyModule

ENDLESS = 10**12
Module = TypeVar("Module", bound=nn.Module)


def plain(module: Module) -> Module:
    """Return a copy with contiguous weights and attention by the formula, as in the published networks."""
    module = copy.deepcopy(module)
    for tensor in (*module.parameters(), *module.buffers()):
        # `contiguous` would keep the strides of a 1x1 kernel with its channels last, and the convolution follows them.
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    for part in module.modules():
        if isinstance(part, AttentionBlock):
            part.attention = "plain"
        elif isinstance(part, UNetBlock):
            part.style = replace(part.style, attention="plain")
    module.zero_grad()
    return module


@singledispatch
def losses_of(
    objective: Objective, online: Denoise, target: Denoise, x_0: Data, label: Label, *drawn: Any
) -> Losses:
    """Return the losses of an objective for its draws: its own, if it does nothing that the published code does not."""
    networks = (online, target) if objective.needs_target else (online,)
    return objective.losses_at(*networks, x_0, label, *drawn)


@losses_of.register
def _(
    objective: ConsistencyObjective,
    online: Denoise,
    target: Denoise,
    x_0: Data,
    label: Label,
    t: Time,
    r: Time,
    z: Data,
) -> Losses:
    """Online network, step and target network in three passes, whatever `ConsistencyObjective` makes of them."""
    x_t = variance_exploding(x_0, z, t)
    dropout = DropoutState(x_0.device)
    estimate = online(x_t, t, label)
    x_r = objective.step(x_0, z, x_t, t, r, label)
    with torch.set_grad_enabled(not objective.stop_gradient), dropout.replayed():
        clean = r == 0
        reference = target(x_r, torch.where(clean, t, r), label)
        reference = torch.where(broadcast_time(clean, x_0), x_0, reference)
    return Losses(objective.weighting(t, r) * objective.distance(estimate, reference), t, r)


class PlainLoop:
    """The published loop (openai/consistency_models) around copies of a run's networks and objective, from the run's step on.

    Networks are contiguous (NCHW) with plain attention; online, teacher and target are passes of their own; optimizer,
    gradients to zero, norms and averages go tensor by tensor in Python. As published, the host waits for the device
    three times for the logged losses of a batch (their mean, the times, the losses) and once for the norm of every
    weight and of every gradient. Loader, draws and parts of the objective are the run's own.

    precision: of the networks, as `trainer.precision`, which this loop does not follow: 32-true or bf16-mixed.
    """

    part: ClassVar[str] = "train"

    def __init__(self, module: ConsistencyModule, trainer: L.Trainer, *, precision: str) -> None:
        possible = ("32-true", "bf16-mixed")
        wanted = f"baseline.precision among {', '.join(possible)}"
        require(precision in possible, wanted, precision, "choose one")
        self.device, self.k, self.data = module.device, module.k, module.data
        self.half = PRECISIONS[precision]
        self.online, self.objective = plain(module.online), plain(module.objective)
        self.target = self.online if module.target is None else plain(module.target)
        self.optimizer = module.make_optimizer(self.online.parameters())
        for group in self.optimizer.param_groups:
            group["foreach"] = group["fused"] = False
        schedule, target_ema = callback_of(trainer, ScaleSchedule), callback_of(trainer, TargetEMA)
        self.num_scales = (lambda _: 0) if schedule is None else schedule.num_scales
        self.averages: list[tuple[list[Tensor], Callable[[int], float]]] = []
        if target_ema is not None:
            mu = target_ema.decay
            self._average(self.target, lambda k: mu(self.num_scales(k)))
        if (ema := callback_of(trainer, EvaluationEMA)) is not None:
            for rate in ema.decays.values():
                self._average(plain(self.online), lambda k, rate=rate: rate)
            for width in ema.widths.values():
                self._average(plain(self.online), lambda k, width=width: power_decay(k + 1, width))
        self.split = self.data.split(1)
        first = self.k * self.split.accumulated
        order = self.data.batches(split=self.split, start=first, total=ENDLESS)
        self.batches: Iterator[Any] = iter(self.data.loader(order))
        self.draw = generator(module.seed, "train", 0, self.k, device=self.device)
        self.logged: dict[str, float] = defaultdict(float)

    def _average(self, average: nn.Module, decay: Callable[[int], float]) -> None:
        self.averages.append(([p.detach() for p in average.parameters()], decay))

    def step(self) -> float:
        """Take one optimizer step and return its loss."""
        loss = 0.0
        for parameter in self.online.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        for _ in range(self.split.accumulated):
            loss += self._backward() / self.split.accumulated
        self._log_norms()
        self.optimizer.step()
        with torch.no_grad():
            for average, decay in self.averages:
                rate = decay(self.k)
                for mean, parameter in zip(average, self.online.parameters(), strict=True):
                    mean.mul_(rate).add_(parameter, alpha=1 - rate)
        self.k += 1
        return loss

    def _backward(self) -> float:
        images, label = next(self.batches)
        x_0 = self.data.augmented(images.to(self.device), self.draw).contiguous()
        label = None if self.data.num_classes is None else label.to(self.device)
        drawn = self.objective.draw(len(x_0), self.num_scales(self.k), self.draw)  # type: ignore[operator]
        z = torch.randn(x_0.shape, generator=self.draw, device=self.device)
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            losses = losses_of(self.objective, self.online, self.target, x_0, label, *drawn, z)
        mean = losses.loss.mean()
        self._log_losses(losses)
        (mean / self.split.accumulated).backward()
        return self.logged["loss"]

    def _log_losses(self, losses: Losses) -> None:
        """Log the mean loss and the sums of its quarters by time, sample by sample on the host."""
        self.logged["loss"] = losses.loss.mean().item()
        times, values = losses.t.cpu().numpy(), losses.loss.detach().cpu().numpy()
        for t, value in zip(times, values, strict=True):
            self.logged[f"loss_q{int(3.999 * t / times.max())}"] += value

    def _log_norms(self) -> None:
        gradient = weight = 0.0
        with torch.no_grad():
            for parameter in self.online.parameters():
                weight += parameter.norm(dtype=torch.float32).item() ** 2
                if parameter.grad is not None:
                    gradient += parameter.grad.norm(dtype=torch.float32).item() ** 2
        self.logged["grad_norm"], self.logged["param_norm"] = gradient**0.5, weight**0.5
