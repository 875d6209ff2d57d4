"""The speed of a step: one wait for the device, and networks that are compiled in place."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from configurations import composed
from conftest import TINY
from consistency.averaging import frozen_copy
from consistency.denoiser import Denoiser
from consistency.distances import L2
from consistency.errors import UserError
from consistency.grids import KarrasGrid
from consistency.objectives import ConsistencyObjective
from consistency.pairs import UniformPairs
from consistency.preconditioning import EDM, Boundary
from consistency.schedules import square_root
from consistency.solvers import heun_step
from consistency.steps import TeacherStep
from consistency.training import build
from consistency.training.callbacks.ema import EvaluationEMA, TargetEMA
from consistency.training.callbacks.schedules import ScaleSchedule
from consistency.training.module import ConsistencyModule
from consistency.weightings import uniform
from waiting import Waits

STEPS = 8
pytestmark = pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode", "ignore:.*recommended to subclass"
)
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")])  # fmt: skip


def fitted(output: Path, *overrides: str, callbacks: Sequence[Callback] = ()) -> ConsistencyModule:
    """Train as train.py does, with further callbacks."""
    torch.manual_seed(0)
    config = composed("train", *TINY, "callbacks.samples=null", *overrides)
    config.output = str(output)
    data = build.build_data(config)
    module = build.build_module(config, data)
    trainer = build.build_trainer(config, [*build.build_callbacks(config), *callbacks], [], data)
    trainer.fit(module, datamodule=data)
    return module


def at_the_look(places: list[str]) -> bool:
    """Whether a step waits for its look alone. On a GPU that is an event, which the driver does not report."""
    if torch.cuda.is_available():
        return not places
    return len(places) == 1 and "nonfinite.py" in places[0]


def test_a_step_waits_for_the_device_once() -> None:
    """At the look for a loss or gradient that is not finite."""
    waits = Waits()
    with waits.counted():
        distilled(False, waits)
    assert all(at_the_look(places) for places in waits.steps[1:-1]), waits.steps


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("mode", ["ct", "ict", "ect", "edm", "sct", "meanflow", "shortcut"])
def test_a_step_of_a_run_waits_once(mode: str, device: str, tmp_path: Path) -> None:
    """With progress bar and monitored loss. Step 4 has a row of metrics and may read its numbers."""
    waits = Waits()
    given = ["callbacks.checkpoint.monitor=train/loss", "callbacks.progress.refresh_rate=1"]
    given += ["trainer.log_every_n_steps=4", "trainer.max_steps=8"]
    given += [f"trainer.accelerator={device}", f"mode={mode}"]
    with waits.counted():
        fitted(tmp_path, *given, callbacks=[waits])
    others = {k: waits.steps[k] for k in (1, 2, 4, 5, 6) if not at_the_look(waits.steps[k])}
    assert not others, "\n".join(f"step {k}: {places}" for k, places in others.items())


# Compiled networks


class Small(nn.Module):
    """A network of this file, whose calls the tests' type checker does not wrap: that cannot be compiled."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.last(torch.tanh(self.first(x) + c_noise[:, None, None, None]))


def distilled(
    compilation: bool | str,
    *callbacks: Callback,
    teacher: nn.Module | None = None,
    averages_on: str | None = None,
) -> ConsistencyModule:
    """Distil a teacher for a few steps with an EMA target, two averages and an N(k) that moves."""
    scalings, constants = (
        EDM(sigma_data=0.5, c_noise_scale=0.25),
        {"sigma_data": 0.5, "t_min": 0.002},
    )
    boundary = Boundary(c_noise_scale=0.25, **constants)
    module = ConsistencyModule(
        online=Denoiser(Small(), boundary),
        objective=ConsistencyObjective(
            pairs=UniformPairs(grid=KarrasGrid(t_min=0.002, t_max=80.0, rho=7.0)),
            step=TeacherStep(teacher=Denoiser(teacher or Small(1), scalings), solver=heun_step),
            distance=L2(),
            weighting=uniform,
        ),
        sampling_preconditioning=boundary,
        optimizer=partial(torch.optim.RAdam, lr=1e-2),
        card=None,
        config={},
        seed=0,
        on_nonfinite="stop",
        sources={},
        compilation=compilation,
    )
    fit(module, *callbacks, averages_on=averages_on)
    return module


def fit(module: ConsistencyModule, *callbacks: Callback, averages_on: str | None = None) -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (STEPS, 8, 1, 2, 2), dtype=torch.uint8)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ScaleSchedule(num_scales=partial(square_root, s_0=2, s_1=50, total_steps=STEPS)),
            TargetEMA(decay=lambda n: 0.5),
            EvaluationEMA(decays=[0.9], widths=[0.1], device=averages_on),
            *callbacks,
        ],
    )
    trainer.fit(module, DataLoader(list(images), batch_size=None))  # type: ignore[arg-type]


def denoisers(module: ConsistencyModule) -> dict[str, nn.Module]:
    """The networks of a module, by their role."""
    assert module.target is not None
    step: Any = module.objective.step
    roles = {"online": module.online, "target": module.target, "teacher": step.teacher}
    return {role: d.network for role, d in roles.items()} | module.averages


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`compile` traces as always, but leaves the kernels as they are: a second instead of a minute."""
    compiling = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: compiling(self, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_networks_train_as_others_and_are_compiled_once(traced: None) -> None:
    """One graph each for the network with and without gradient; N(k) takes several values, the weights keep their names."""
    plain = distilled(False)
    compiled = distilled(True)
    assert compiled.num_scales > 10
    assert counters["stats"]["unique_graphs"] == counters["frames"]["ok"] == 2, dict(
        counters["stats"]
    )
    assert not counters["graph_break"]
    pairs = zip(denoisers(plain).items(), denoisers(compiled).items(), strict=True)
    for (role, one), (same, other) in pairs:
        assert role == same
        assert other._compiled_call_impl is not None
        assert one.state_dict().keys() == other.state_dict().keys()
        for name, weight in one.state_dict().items():
            assert torch.allclose(weight, other.state_dict()[name], atol=1e-6), (role, name)
    assert plain.state_dict().keys() == compiled.state_dict().keys()


def test_a_copy_of_a_compiled_network_is_one_of_its_own(traced: None) -> None:
    """It shares no weight, computes with its own, and is compiled only if it is told to."""
    original = Small()
    original.compile(mode=None)
    x, c_noise = torch.randn(2, 1, 2, 2), torch.zeros(2)
    before = original(x, c_noise)
    twin = frozen_copy(original)
    assert twin._compiled_call_impl is None
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert not twin(x, c_noise).any()
    assert torch.equal(original(x, c_noise), before)


def test_a_compiled_module_trains_a_second_time(traced: None) -> None:
    """With a new target, new averages, each compiled; they are copies."""
    module = distilled(True)
    fit(module)
    networks = list(denoisers(module).values())
    assert len({next(n.parameters()).data_ptr() for n in networks}) == len(networks) == 5
    assert all(n._compiled_call_impl is not None for n in networks)


class Overwriting(nn.Module):
    """A network whose output lasts until its next call, as that of a CUDA graph does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.last = network, torch.empty(0)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.last.fill_(torch.nan)
        output = self.network(x, c_noise, label)
        self.last = output.detach()
        return output


def test_no_output_of_a_network_outlives_its_next_call() -> None:
    """So CUDA graphs may overwrite it: between the two calls of a teacher's step."""
    module = distilled(False, teacher=Overwriting(Small(1)))
    plain = distilled(False)
    for one, other in zip(module.online.parameters(), plain.online.parameters(), strict=True):
        assert torch.equal(one, other)


def test_cuda_graphs_and_micro_batches_exclude_each_other(tmp_path: Path) -> None:
    given = ["compile=reduce-overhead", "data.device_batch_size=4", "trainer.max_steps=1"]
    with pytest.raises(UserError, match="2 micro-batches"):
        fitted(tmp_path, *given)


def test_an_unknown_way_to_compile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reduce-overhead"):
        fitted(tmp_path, "compile=fast")


# Averages on the host


class Averages(Callback):
    """The averages that a reader finds after each step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        weights = [
            w.flatten() for network in module.averages.values() for w in network.parameters()
        ]
        self.steps.append(torch.cat(weights))


def test_averages_on_the_host_are_the_same() -> None:
    """In every step, to the bit, although they are computed beside the next one."""
    here, host = Averages(), Averages()
    distilled(False, here)
    distilled(False, host, averages_on="cpu")
    assert len(here.steps) == STEPS
    for one, other in zip(here.steps, host.steps, strict=True):
        assert torch.equal(one, other)


def test_a_fault_in_an_average_on_the_host_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EvaluationEMA, "_average", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distilled(False, averages_on="cpu")
