"""Losses and gradients that are not finite: which steps are skipped, and when the run stops."""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from consistency.errors import DivergenceError, UserError
from consistency.objectives import Losses
from consistency.runtime.ranks import gathered
from consistency.tensors import sent
from consistency.training.io_errors import warn

SHOWN = 4

OVERFLOWS = 40
"""Steps in a row that a gradient scaler may skip, each of which halves its scale: from 2^16 to the smallest of float16."""

REMEDY = (
    "lower optimizer.lr, use trainer.precision=32-true or bf16-mixed, or look at the data; "
    "last.ckpt is the state before that step"
)


class Receipt:
    """Numbers on their way from the device to the host, which nothing waits for until they are read."""

    def __init__(self, numbers: Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        self.numbers = numbers
        if numbers.is_cuda:
            self.numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return [int(number) for number in self.numbers.tolist()]


class Look(NamedTuple):
    """A look that has begun."""

    losses: Losses
    gradients: Mapping[str, Tensor]
    step: str
    found: Receipt


class NonfiniteGuard:
    """Skips optimizer steps with a loss or a gradient that is not finite, and stops the run after too many in a row.

    A skipped step changes no weight, no average and no schedule. One bad sample in any batch or rank spoils a step.
    Overflows under a gradient scaler count apart: `OVERFLOWS` in a row stop the run under any policy.

    policy: "stop" at the first such step, or "skip:<n>" to stop at the n-th in a row.
    """

    def __init__(self, policy: str) -> None:
        match = re.fullmatch(r"stop|skip:([1-9]\d*)", policy)
        if match is None:
            expected = "on_nonfinite=stop, or skip:<n> to stop after n such steps in a row"
            raise UserError(expected, f"on_nonfinite={policy}", "for example on_nonfinite=skip:10")
        self.limit = int(match[1] or 1)
        self.in_a_row = self.overflows = self.overflows_in_a_row = 0
        self.verdict: UserError | None = None  # why the run must stop, on every rank
        # A signal to this rank, and that to any rank before the last look.
        self.received = self.agreed = (0, 0)
        self._batches: list[Losses] = []
        self._look: Look | None = None
        self._last_times = torch.empty(0)  # t of the last step that was allowed

    def note(self, losses: Losses) -> None:
        """Keep the losses of one batch until its optimizer step."""
        self._batches.append(Losses(*(part.detach() for part in losses)))

    def begin(self, gradients: Mapping[str, Tensor], step: str, *, exact: bool = False) -> Tensor:
        """Begin the look at the losses and gradients of a step, called `step` in messages.

        Return on the device whether it must be left out, 1 or 0, the same on every rank; nothing waits for it before `passed`.

        exact: a sum of squares may overflow without a bad gradient. The largest number cannot, but takes a CPU longer to find.
        """
        losses = Losses(*(torch.cat(parts) for parts in zip(*self._batches, strict=True)))
        self._batches, self._last_times = [], losses.t
        values = list(gradients.values())
        norm = torch.nn.utils.get_total_norm(values, math.inf if exact else 2.0)
        suspected = ~torch.cat([losses.loss, *([norm[None]] if values else [])]).isfinite().all()
        received = sent(torch.tensor(self.received), suspected.device)
        found = torch.cat([suspected[None], received])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        self._look = Look(losses, gradients, step, Receipt(found))
        return found[0].float()

    @property
    def looking(self) -> bool:
        """Whether a look has begun and its result is not known yet."""
        return self._look is not None

    def passed(self) -> bool:
        """Return whether the step may be taken, the same on every rank. This waits for the device up to the gradients.

        Nothing else in a step without a row of metrics does.
        """
        assert self._look is not None
        (losses, gradients, step, found), self._look = self._look, None
        suspicion, *signal = found.read()
        self.agreed = (signal[0], signal[1])
        # A suspicion is checked one by one. A rank with bad samples, which spoil the gradients of all ranks, else any.
        reports = gathered(_report(losses, gradients, step)) if suspicion else []
        _, text = min(filter(None, reports), default=(0, ""))
        if not text:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            in_a_row = f", the last of {self.limit} such steps in a row" if self.limit > 1 else ""
            self.verdict = DivergenceError(
                "a finite loss and gradient", f"{text}{in_a_row}", REMEDY
            )
        else:
            rank_zero_warn(f"step left out ({self.in_a_row} in a row): {text}")
        return False

    def scaled(self, *, taken: bool, scale: Callable[[], float], step: str) -> None:
        """Count the allowed steps that a gradient scaler has not taken; scale: returns its factor from now on."""
        if taken:
            self.overflows_in_a_row = 0
            return
        self.overflows += 1
        self.overflows_in_a_row += 1
        if self.overflows == 1:
            skips = f"the scaler skips the step and continues with scale {scale():g}"
            end = "the number of skipped steps follows at the end"
            warn(f"gradients overflowed half precision {step}: {skips}; {end}")
        if self.overflows_in_a_row >= OVERFLOWS:
            in_a_row = f"the last of {self.overflows_in_a_row} in a row, down to scale {scale():g}"
            got = f"an overflow {step}, {_span(self._last_times)}, {in_a_row}"
            self.verdict = DivergenceError(
                "gradients that fit half precision at some scale", got, REMEDY
            )

    def report_overflows(self) -> None:
        """Print how many steps the scaler has skipped, if more than the reported first."""
        if self.overflows > 1:
            warn(f"the gradient scaler left out {self.overflows} steps whose gradients overflowed")


def _report(losses: Losses, gradients: Mapping[str, Tensor], step: str) -> tuple[int, str] | None:
    """Describe the samples that are not finite, or else the gradients; the number orders the reports of several ranks."""
    loss, t, r = losses
    if (bad := ~loss.isfinite()).any():
        pairs = zip(t[bad].tolist(), r[bad].tolist(), strict=True)
        times = [f"t={t:.4g} r={r:.4g}" for t, r in pairs]
        span = f" ({_span(t[bad])})" if len(times) > SHOWN else ""
        return 0, f"{len(times)} of {len(loss)} samples not finite {step}, {_some(times)}{span}"
    names = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    where = f"{step}, {_span(t)}, in {_some(list(modules))}"
    return (1, f"a gradient that is not finite, of a finite loss, {where}") if names else None


def _some(texts: list[str]) -> str:
    more = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _span(t: Tensor) -> str:
    return f"t={float(t.min()):.4g} to {float(t.max()):.4g}"
