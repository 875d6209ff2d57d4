"""The cost of a run in two lines: images and memory before it begins, hours after its first steps."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from consistency.averaging import frozen_copy
from consistency.training.callbacks import progress
from consistency.training.module import ConsistencyModule
from consistency.training.nonfinite import NonfiniteGuard

OPTIMIZERS = [
    (torch.optim.RAdam, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
]


@pytest.mark.parametrize(("kind", "arguments"), OPTIMIZERS)
def test_the_moments_counted_beforehand_are_those_that_a_step_makes(
    kind: Any, arguments: dict[str, Any]
) -> None:
    network = nn.Linear(5, 7)
    make = partial(kind, lr=1e-3, **arguments)
    optimizer = make(network.parameters())
    network(torch.ones(5)).sum().backward()
    optimizer.step()
    weights = list(network.parameters())
    kept = sum(
        v.numel()
        for w in weights
        for v in optimizer.state[w].values()
        if torch.is_tensor(v) and v.shape == w.shape
    )
    counted = progress.moments(make, torch.device("cpu"))
    assert counted * sum(w.numel() for w in weights) == kept


class Parts(ConsistencyModule):
    """The parts of a module that take memory: network, target and teacher, and averages beside them."""

    data: Any = SimpleNamespace(batch_size=8)

    def __init__(self, averages: int, host: int = 0) -> None:
        L.LightningModule.__init__(self)
        network: Any = nn.Linear(3, 4)
        self.online, self.target, self.teacher = network, *map(frozen_copy, (network, network))
        self._averages = {str(n): frozen_copy(network) for n in range(averages)}
        self._averages |= {f"host{n}": frozen_copy(network).to("meta") for n in range(host)}
        self.make_optimizer = partial(torch.optim.Adam, lr=1.0)
        self.settle_averages = lambda: None
        self.guard = NonfiniteGuard("stop")


class Clockwork(L.Trainer):
    """The numbers of steps of a trainer."""

    global_step: int = 0
    max_steps: int = 0

    def __init__(self) -> None:
        """Build nothing."""


def test_memory_is_three_networks_two_averages_gradients_and_two_moments() -> None:
    network = 4 * (3 * 4 + 4)
    assert progress.memory(Parts(averages=2)) == (3 + 2 + 1 + 2) * network
    assert progress.memory(Parts(averages=0, host=2)) == 6 * network


def lines(steps: int, first: int, capsys: Any, monkeypatch: Any, micro: int = 1) -> list[str]:
    """The lines of a run of 2 s a step whose first three steps take a minute each."""
    seconds = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: seconds))
    module, trainer, cost = Parts(averages=1), Clockwork(), progress.Cost()
    trainer.global_step, trainer.max_steps = first, steps
    cost.on_train_start(trainer, module)
    for step in range(first + 1, steps + 1):
        for part in range(1, micro + 1):
            seconds += (60.0 if step - first <= 3 else 2.0) / micro
            trainer.global_step = step - (part < micro)
            cost.on_train_batch_end(trainer, module)
    return [line for line in capsys.readouterr().out.splitlines() if line]


@pytest.mark.parametrize("micro", [1, 4])
def test_hours_follow_from_the_rate_without_the_first_steps(
    micro: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = lines(1800, 0, capsys, monkeypatch, micro)
    assert before.startswith("14,400 images in all; ")
    assert after.startswith("1 hours at 4 images a second, ")


def test_a_resumed_run_counts_the_steps_that_are_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = lines(2700, 900, capsys, monkeypatch)
    assert before.startswith("21,600 images in all; ")
    assert after.startswith("1 hours at 4 images a second, ")


def test_a_short_run_is_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lines(progress.SHORT, 0, capsys, monkeypatch) == []
