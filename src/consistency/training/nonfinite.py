"""What a run does where a loss is not finite."""

import re

import torch.distributed
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from consistency.errors import UserError, require
from consistency.objectives import Losses

SHOWN = 4


class NonfiniteGuard:
    """Leaves out optimizer steps with a loss that is not finite, and stops the run after too many of them in a row.

    policy: "stop" at the first one, or "skip:<n>" at the n-th in a row; a step that is left out changes no weight, no
    average and no schedule. An optimizer step may have several batches and several ranks; one bad sample in any of them
    spoils it. Gradients that overflow while the loss is finite are the gradient scaler's matter and never count.
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
        self._found: str | None = None

    def note(self, losses: Losses, term: str, k: int) -> None:
        """Looks at the losses of one batch of optimizer step k; `term` is what computed them."""
        bad = (~torch.isfinite(losses.loss)).nonzero().flatten().tolist()
        if bad and self._found is None:
            times = ", ".join(f"t={losses.t[i]:.4g} r={losses.r[i]:.4g}" for i in bad[:SHOWN])
            self._found = (
                f"{len(bad)} of {len(losses.loss)} samples not finite in the term {term} "
                f"at step k={k}, {times}"
            )

    def allows(self, strategy: Strategy) -> bool:
        """Whether the step may be taken, the same answer on every rank; raises `UserError` where the run must stop."""
        found, self._found = self._found, None
        if not strategy.reduce_boolean_decision(found is not None, all=False):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        report = _first_of_all_ranks(found)
        if self.in_a_row >= self.limit:
            in_a_row = f", the last of {self.limit} such steps in a row" if self.limit > 1 else ""
            raise UserError(
                f"expected a finite loss\n  got: {report}{in_a_row}\n"
                "  do: lower optimizer.lr, use trainer.precision=32-true or bf16-mixed, or look at the data"
            )
        rank_zero_warn(f"step left out ({self.in_a_row} in a row): {report}")
        return False


def _first_of_all_ranks(report: str | None) -> str | None:
    if not torch.distributed.is_initialized():
        return report
    reports: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, report)
    return next(found for found in reports if found is not None)
