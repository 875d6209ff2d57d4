"""The training step in the structure of the published PyTorch code, beside which the benchmark puts ours."""

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, TypeVar, cast

import lightning as L
import torch
from torch import nn

from consistency.networks.adm import AttentionBlock
from consistency.networks.unet import UNetBlock
from consistency.objectives import Losses, Objective
from consistency.randomness import generator
from consistency.runtime.devices import PRECISIONS
from consistency.training.callbacks.ema import EvaluationEMA, TargetEMA
from consistency.training.callbacks.periodic import callback_of
from consistency.training.callbacks.schedules import ScaleSchedule
from consistency.training.module import ConsistencyModule
from consistency.training.speed import ENDLESS

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def plain(module: ModuleT) -> ModuleT:
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


class PlainLoop:
    """The published loop (openai/consistency_models) around copies of a run's networks and objective, from the run's step on.

    Networks are contiguous (NCHW) with plain attention; online, teacher and target are passes of their own; optimizer,
    gradients to zero, norms and averages go tensor by tensor in Python. As published, the host waits for the device
    three times for the logged losses of a batch (their mean, the times, the losses) and once for the norm of every
    weight and of every gradient. Loader, draws and parts of the objective are the run's own.

    precision: of the networks, as `trainer.precision`, which this loop does not follow; half ones without a gradient scaler.
    """

    part: ClassVar[str] = "train"

    def __init__(self, module: ConsistencyModule, trainer: L.Trainer, *, precision: str) -> None:
        self.device, self.k, self.data = module.device, module.k, module.data
        self.half = PRECISIONS[precision]
        self.online, self.objective = plain(module.online), cast(Objective, plain(module.objective))
        self.target = self.online if module.target is None else plain(module.target)
        head = [] if self.objective.head is None else self.objective.head.parameters()
        self.optimizer = module.make_optimizer([*self.online.parameters(), *head])
        for group in self.optimizer.param_groups:
            group["foreach"] = group["fused"] = False
        schedule, target_ema = callback_of(trainer, ScaleSchedule), callback_of(trainer, TargetEMA)
        self.num_scales = (lambda _: 0) if schedule is None else schedule.num_scales
        self.mu, self.ema = target_ema and target_ema.decay, callback_of(trainer, EvaluationEMA)
        averaged = [self.target.network] if self.mu else []
        averaged += [plain(average) for average in module.averages.values()]
        self.averages = [[p.detach() for p in network.parameters()] for network in averaged]
        self.split = self.data.split(1)
        first = self.k * self.split.accumulated
        order = self.data.batches(split=self.split, start=first, total=ENDLESS)
        self.batches: Iterator[Any] = iter(self.data.loader(order))
        self.draw = generator(module.seed, "train", 0, self.k, device=self.device)
        self.logged: dict[str, float] = defaultdict(float)

    def _decays(self) -> list[float]:
        """Return the decays of this step: of the target network and of the averages for samples."""
        target = [self.mu(self.num_scales(self.k))] if self.mu else []
        if self.ema is None:
            return target
        return [*target, *self.ema.decays_at(self.k).values()]

    def __call__(self) -> float:
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
            for average, rate in zip(self.averages, self._decays(), strict=True):
                for mean, parameter in zip(average, self.online.parameters(), strict=True):
                    mean.mul_(rate).add_(parameter, alpha=1 - rate)
        self.k += 1
        return loss

    def _backward(self) -> float:
        images, label = next(self.batches)
        x_0 = self.data.augmented(images.to(self.device), self.draw).contiguous()
        label = None if self.data.num_classes is None else label.to(self.device)
        drawn = self.objective.draw(len(x_0), self.num_scales(self.k), self.draw)
        z = torch.randn(x_0.shape, generator=self.draw, device=self.device)
        networks = (self.online, self.target) if self.objective.needs_target else (self.online,)
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            losses = self.objective.losses_at(*networks, x_0, label, *drawn, z)
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
