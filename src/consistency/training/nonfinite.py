"""What a run does where a loss or a gradient is not finite."""

import re
from collections.abc import Callable, Mapping

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from consistency.errors import require
from consistency.objectives import Losses
from consistency.training.io_errors import warn

SHOWN = 4

OVERFLOWS = 40
"""Steps in a row that a gradient scaler may leave out, each of which halves its scale. It begins at 2^16, and a healthy run
finds what fits within some twenty: at 2^-24, the smallest number of float16, what still overflows no scale can help.
"""

REMEDY = (
    "lower optimizer.lr, use trainer.precision=32-true or bf16-mixed, or look at the data; "
    "last.ckpt is the state before that step"
)


class NonfiniteGuard:
    """Leaves out optimizer steps with a loss or a gradient that is not finite, and has the run stopped after too many of
    them in a row.

    policy: "stop" at the first one, or "skip:<n>" at the n-th in a row; a step that is left out changes no weight, no
    average and no schedule. An optimizer step may have several batches and several ranks; one bad sample in any of them
    spoils it. Gradients that overflow under a gradient scaler are its matter and count apart: `OVERFLOWS` of them in a row
    stop the run, under any policy.
    """

    def __init__(self, policy: str) -> None:
        form = re.fullmatch(r"stop|skip:([1-9]\d*)", policy)
        require(
            form is not None,
            "on_nonfinite=stop, or on_nonfinite=skip:<n> to stop after n such steps in a row",
            f"on_nonfinite={policy}",
            "for example on_nonfinite=skip:10",
        )
        assert form is not None
        self.limit = int(form[1] or 1)
        self.in_a_row = 0
        self.overflows = self.overflows_in_a_row = 0
        self.verdict: str | None = None
        """Why the run must stop, the same on every rank, once it must."""
        self._batches: list[Losses] = []
        self._newest: list[Losses] = []
        """The losses of the last step that was allowed."""

    def note(self, losses: Losses) -> None:
        """Remembers the losses of one batch until its optimizer step."""
        self._batches.append(Losses(*(part.detach() for part in losses)))

    def allows(
        self, gradients: Mapping[str, Tensor], *, strategy: Strategy, term: str, k: int
    ) -> bool:
        """Whether optimizer step k may be taken, the same answer on every rank.

        gradients: by parameter, none where a scaler looks at them; term: what computed the losses.
        """
        batches, self._batches = self._batches, []
        self._newest = batches
        place = f"in the term {term} at step k={k}"
        samples = modules = None
        # One look at the device for all losses and gradients of the step. A sum of squares may overflow where no
        # gradient does; what it suspects is looked at one by one.
        looked_at = [batch.loss for batch in batches]
        if gradients:
            looked_at.append(torch.nn.utils.get_total_norm(gradients.values())[None])
        if not torch.cat(looked_at).isfinite().all():
            samples = _bad_samples(batches, place)
            modules = _bad_modules(batches, gradients, place)
        finite = samples is None and modules is None
        if not strategy.reduce_boolean_decision(not finite, all=False):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        report = _first_of_all_ranks(samples, modules)
        if self.in_a_row >= self.limit:
            in_a_row = f", the last of {self.limit} such steps in a row" if self.limit > 1 else ""
            self.verdict = (
                f"expected a finite loss and gradient\n  got: {report}{in_a_row}\n  do: {REMEDY}"
            )
        else:
            rank_zero_warn(f"step left out ({self.in_a_row} in a row): {report}")
        return False

    def scaled(self, *, taken: bool, scale: Callable[[], float], term: str, k: int) -> None:
        """Counts the steps that a gradient scaler leaves out: an allowed step k was taken, or else overflowed.

        scale: what it multiplies the loss with from now on.
        """
        if taken:
            self.overflows_in_a_row = 0
            return
        self.overflows += 1
        self.overflows_in_a_row += 1
        place = f"in the term {term} at step k={k}"
        if self.overflows == 1 and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            warn(
                f"gradients overflowed half precision {place}: the scaler leaves the step out and goes on with scale "
                f"{scale():g}; how many there are is said at the end"
            )
        if self.overflows_in_a_row >= OVERFLOWS:
            self.verdict = (
                "expected gradients that half precision holds at some scale\n"
                f"  got: an overflow {place}, {_span(torch.cat([b.t for b in self._newest]))}, the last of "
                f"{self.overflows_in_a_row} in a row, down to scale {scale():g}\n  do: {REMEDY}"
            )

    def tell_overflows(self) -> None:
        """Says how many steps the scaler has left out, where it was more than the one that was told."""
        if self.overflows > 1 and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            warn(f"the gradient scaler left out {self.overflows} steps whose gradients overflowed")


def _bad_samples(batches: list[Losses], place: str) -> str | None:
    loss, t, r = (torch.cat(parts) for parts in zip(*batches, strict=True))
    bad = ~loss.isfinite()
    if not bad.any():
        return None
    times = [f"t={a:.4g} r={b:.4g}" for a, b in zip(t[bad].tolist(), r[bad].tolist(), strict=True)]
    more = f", ... ({_span(t[bad])})" if len(times) > SHOWN else ""
    return (
        f"{len(times)} of {len(loss)} samples not finite {place}, {', '.join(times[:SHOWN])}{more}"
    )


def _bad_modules(batches: list[Losses], gradients: Mapping[str, Tensor], place: str) -> str | None:
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if not bad:
        return None
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in bad))
    more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
    return (
        f"a gradient that is not finite, of a finite loss, {place}, "
        f"{_span(torch.cat([b.t for b in batches]))}, in {', '.join(modules[:SHOWN])}{more}"
    )


def _span(t: Tensor) -> str:
    return f"t={float(t.min()):.4g} to {float(t.max()):.4g}"


def _first_of_all_ranks(samples: str | None, modules: str | None) -> str | None:
    """The report of a rank with bad samples, whose gradients have spoiled those of the others, or else of any."""
    found = [(samples, modules)]
    if torch.distributed.is_initialized():
        found *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (samples, modules))
    return next(filter(None, [text for kind in zip(*found, strict=True) for text in kind]), None)
