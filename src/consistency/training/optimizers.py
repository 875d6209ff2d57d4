"""RAdam in one pass over the memory, and the kernels of an optimizer."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

HIDING = 2.0**60
"""An epsilon beside which sqrt(v) rounds away. To multiply and divide by a power of two rounds nothing."""

KERNELS = ("cpu", "cuda")
"""Devices on which torch has one kernel for a step of Adam, which it never chooses by itself."""

SMALL = 20_000
"""Numbers in the mean tensor of an optimizer up to which a CPU updates all tensors at once faster than one after the other."""


class RAdam(torch.optim.RAdam):
    """RAdam [Liu et al. 2020, arXiv:1908.03265, Algorithm 2] with the numbers and the state of `torch.optim.RAdam`.

    That one passes over the memory about ten times a step; fused, this one passes once, in the kernel of Adam. At an infinite
    step, where Adam has no bias to correct, the kernel takes theta - lr m / (sqrt(v) + eps): RAdam's corrections and its
    rectification are factors of lr.

    params, lr, betas, eps, weight_decay, foreach: as of `torch.optim.RAdam`; fused: as of `torch.optim.Adam`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach)
        for group in (self.defaults, *self.param_groups):
            group["fused"] = fused

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keep the counts on the host: torch moves those of a fused optimizer, and each would be waited for."""
        super().__setstate__(state)
        for moments in self.state.values():
            moments["step"] = moments["step"].cpu()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; return what the closure returns, which computes the gradients."""
        if not all(group.get("fused") for group in self.param_groups):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
            self._init_group(group, *lists)
            counts = [int(count) + 1 for count in lists[-1]]
            for t in set(counts):
                chosen = [[x for x, n in zip(of, counts, strict=True) if n == t] for of in lists]
                _update(*chosen, t=t, group=group, left_out=getattr(self, "found_inf", None))
        return loss


FUSING = (torch.optim.Adam, RAdam)
"""Optimizers with such a kernel, which also reads `found_inf` on the device."""


def choose_kernels(optimizer: torch.optim.Optimizer, device: str) -> None:
    """Have the optimizer take a step in one kernel if it can, else all tensors at once where that is faster.

    Groups that say `foreach` or `fused` keep it. device: type of the device of the weights.
    """
    fusing = isinstance(optimizer, FUSING) and device in KERNELS
    for group in optimizer.param_groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        if group.get("foreach", False) is not None or group.get("fused"):
            continue
        if fusing and group["fused"] is None:
            group["fused"] = True
        elif sum(sizes) <= SMALL * len(sizes):
            group["foreach"] = True  # which torch chooses on a GPU alone


def leaves_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer takes no step where the device says so, in `found_inf`."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and isinstance(optimizer, FUSING)


@contextmanager
def found_inf(optimizer: torch.optim.Optimizer, left_out: Tensor | None) -> Iterator[None]:
    """Have the kernel of the optimizer take no step where `left_out`, one number on the device, is 1."""
    optimizer.found_inf = left_out  # type: ignore[attr-defined]  # the name that torch's gradient scaler sets
    yield
    optimizer.found_inf = None  # type: ignore[attr-defined]


def count_back(optimizer: torch.optim.Optimizer) -> None:
    """Take back the count of a step that the kernel has left out, where it stands on the host: Adam's does not."""
    if isinstance(optimizer, RAdam):
        for weight, state in optimizer.state.items():
            state["step"] -= int(weight.grad is not None)


def factors(t: int, beta_1: float, beta_2: float) -> tuple[float, bool]:
    """Return lr's factor in step t = 1, 2, ... and whether the step is divided by sqrt(v) + eps.

    rho_t is the length of the simple average that v amounts to; it must be above 5 for its variance to be tractable.
    """
    rho_inf = 2 / (1 - beta_2) - 1
    rho = rho_inf - 2 * t * beta_2**t / (1 - beta_2**t)
    if rho <= 5:
        return 1 / (1 - beta_1**t), False
    r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    return r * math.sqrt(1 - beta_2**t) / (1 - beta_1**t), True


def _update(
    weights: list[Tensor],
    gradients: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    counts: list[Tensor],
    *,
    t: int,
    group: dict[str, Any],
    left_out: Tensor | None,
) -> None:
    beta_1, beta_2 = group["betas"]
    factor, adaptive = factors(t, beta_1, beta_2)
    eps = group["eps"] if adaptive else HIDING
    # As in torch, a tensor: of a number one would be made for each count.
    torch._foreach_add_(counts, torch.ones(()), alpha=1)
    adam(
        weights,
        gradients,
        m,
        v,
        [],
        [torch.full((), math.inf, device=weights[0].device)] * len(weights),
        fused=True,
        found_inf=left_out,
        amsgrad=False,
        beta1=beta_1,
        beta2=beta_2,
        lr=group["lr"] * factor * (1 if adaptive else HIDING),
        weight_decay=group["weight_decay"],
        eps=eps,
        maximize=False,
    )
