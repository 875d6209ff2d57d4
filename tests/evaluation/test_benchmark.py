"""The benchmark measures what it says, the plain loop computes what the run computes, and wrong options are refused."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from configurations import composed
from conftest import TINY, Run
from consistency.commands.benchmark import benchmark, measured, rate
from consistency.data.memory import noise
from consistency.denoiser import Denoiser
from consistency.errors import UserError
from consistency.evaluation import timing
from consistency.solvers import heun_step
from consistency.steps import TeacherStep
from consistency.training import speed
from consistency.training.module import ConsistencyModule
from consistency.training.plain import PlainLoop

SMALL = [a for a in TINY if a.split("=")[0] not in ("logger", "data.batch_size")]
SHORT = ["windows=2", "seconds=0.05"]
CPU = torch.device("cpu")


def results(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "benchmark.json").read_text())
    return content


def test_the_step_is_measured_beside_the_plain_loop(verb: Run, tmp_path: Path) -> None:
    output, given = tmp_path / "out", ["baseline=plain", "train_batch=2", "data.batch_size=16"]
    outcome = verb("benchmark", *SMALL, *SHORT, *given, f"output={output}")
    assert outcome.status == 0, outcome.err
    found = results(output)
    rate = found["images a second"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert len(found["ratio to the baseline"]["values"]) == 3
    assert found["batch, images"] == 2
    hours = found["hours of 1,500 steps of 16 images"]
    assert hours == pytest.approx(1500 * 16 / rate["median"] / 3600)
    assert found["settings"]["train_batch"] == 2
    assert found["machine"]["torch"] == torch.__version__
    for name in ("ratio to the baseline", "bookkeeping", "peak memory", "share of the better"):
        assert name in outcome.out
    assert not list((tmp_path / "cwd").iterdir())


def test_data_are_measured_beside_the_training(verb: Run, tmp_path: Path) -> None:
    given = ["part=data", "images=64", "train_batch=2", f"output={tmp_path / 'out'}"]
    outcome = verb("benchmark", *SMALL, *SHORT, *given)
    assert outcome.status == 0, outcome.err
    rows = results(tmp_path / "out")["data, images a second"]
    assert len(rows) == 6
    assert all(value > 0 for value in rows.values())


def test_sampling_is_measured(verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consistency.commands.benchmark.find_spec", lambda _: None)
    given = ["part=sample", "baseline=diffusers", "sampler=multistep", "batch_size=4"]
    outcome = verb("benchmark", *SMALL, *SHORT, *given, f"output={tmp_path / 'out'}")
    assert outcome.status == 0, outcome.err
    assert "diffusers is missing" in outcome.out
    found = results(tmp_path / "out")
    assert found["images a second"]["min"] > 0
    assert found["evaluations an image"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sampling_of_a_run_is_compared_with_diffusers(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    given = ["part=sample", f"checkpoint={trained['ect']}", "baseline=diffusers", "batch_size=4"]
    outcome = verb("benchmark", *SHORT, *given, f"output={tmp_path / 'out'}")
    assert outcome.status == 0, outcome.err
    assert results(tmp_path / "out")["ratio to the baseline"]["median"] > 0


@pytest.fixture(scope="module")
def configuration() -> DictConfig:
    return composed("benchmark", "baseline=plain")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("part", "all", "part among train, data, sample"),
        ("part", "sample", "baseline=plain for part=train"),
        *((name, 0, f"{name} > 0") for name in ("seconds", "windows", "images", "train_batch")),
        ("precision", "bf16-mixed", "part=sample with precision"),
        ("checkpoint", "run", "part=sample with checkpoint"),
        ("baseline.precision", "8", "baseline.precision among 32-true"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    name: str, value: object, expected: str, configuration: DictConfig, tmp_path: Path
) -> None:
    config = deepcopy(configuration)
    OmegaConf.update(config, name, value)
    with pytest.raises(UserError, match=expected):
        benchmark(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TwoConvolutions(nn.Module):
    """A network whose floating-point operations are known."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 1, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.last(self.first(x))


def small(mode: str, *given: str) -> DictConfig:
    """The configuration of a run on 8x8 images in batches of 4, without files."""
    options = [*SMALL, f"mode={mode}", "logger=none", "callbacks.progress=null", "images=64"]
    return measured(composed("benchmark", *options, "train_batch=4", *given))


@pytest.mark.parametrize("given", ["seed=0", "data.device_batch_size=2"])
def test_operations_and_parts_of_a_step(given: str) -> None:
    """A convolution counts 2 x 9 x 5 x 64 operations an image; its gradients for weights and for inputs as much each.

    A step is the whole one, of all its micro-batches.
    """
    config = small("ect", "data.num_classes=null", "train_batch=null", "data.batch_size=4", given)
    config._set_flag("allow_objects", True)
    config.model.network = {"_target_": f"{__name__}.TwoConvolutions"}
    measurement = speed.Measurement(windows=2, seconds=0.02)
    speed.fit(config, measurement)
    first = last = 2 * 9 * 5 * 64 * 4
    online, target, backward = first + last, first + last, first + 2 * last
    assert measurement.speed.flops == online + target + backward
    assert len(measurement.speed.windows) == 2
    assert measurement.speed.batch == 4
    parts = measurement.parts
    assert tuple(parts) == speed.PARTS
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1, abs=1e-3)
    for name, part in parts.items():
        assert (part["ms"] > 0) == (name not in ("teacher", "distance network")), name


class Perceptual(nn.Module):
    """A distance with a network."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.features(x) - self.features(y)).square().mean((1, 2, 3))


class FirstLosses(speed.Measurement):
    """Takes one step of a run and of the plain loop from the same weights, and keeps both losses; then measures a step."""

    def __init__(self, *, distil: bool) -> None:
        super().__init__(windows=1, seconds=0)
        self.distil, self.layouts = distil, list[bool]()

    def _steps(self, trainer: L.Trainer, module: ConsistencyModule) -> Iterator[bool]:
        if self.distil:
            objective: Any = module.objective
            teacher = Denoiser(deepcopy(module.online.network), module.online.preconditioning)
            objective.step = TeacherStep(teacher=teacher, solver=heun_step)
            objective.distance = Perceptual().requires_grad_(False)
        yield False  # the loop begins at any step of a run
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
        loop = PlainLoop(module, trainer, precision="32-true")
        yield False
        self.ours = float(trainer.callback_metrics["train/loss"])
        for network in (loop.online, loop.target, loop.objective):
            for part in network.modules():
                if isinstance(part, nn.Conv2d):
                    part.register_forward_pre_hook(self._look)
        self.plain = loop()
        with self.stopwatch.running(module):
            yield False

    def _look(self, convolution: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        for tensor in (*inputs, convolution.weight):
            self.layouts.append(tensor.stride() == torch.empty(tensor.shape).stride())


@pytest.mark.parametrize(
    ("mode", "distil"), [("ct", True), ("ect", False), ("edm", False), ("ct_continuous", False)]
)
def test_the_plain_loop_computes_the_loss_of_the_run(mode: str, distil: bool) -> None:
    measurement = FirstLosses(distil=distil)
    speed.fit(small(mode, "model.network.attention=plain"), measurement)
    assert measurement.plain == pytest.approx(measurement.ours, rel=1e-4)
    assert measurement.layouts
    assert all(measurement.layouts)
    for part in ("teacher", "distance network"):
        assert (measurement.stopwatch.seconds[part][0] > 0) == distil


def test_a_part_within_another_is_not_counted_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(speed, "now", lambda _: float(next(clock)))
    stopwatch = speed.Stopwatch()
    stopwatch.start("optimizer")  # off
    stopwatch._stack = ["bookkeeping"]
    stopwatch._last = (-1.0, 0.0)
    with stopwatch.profile("optimizer"), stopwatch.profile("[Strategy]Any.on_step"):
        stopwatch.profile("averages")(lambda: None)()
    with stopwatch.profile("[Strategy]Any.backward"):
        pass
    walls = {part: wall for part, (wall, _) in stopwatch.seconds.items() if wall}
    assert walls == {"bookkeeping": 2.0, "optimizer": 2.0, "averages": 1.0, "backward": 1.0}


def test_rates_and_ratios_come_from_windows() -> None:
    window = timing.Window(0.0, CPU)
    assert [window.open(), window.open()] == [True, False]
    assert window.count == 1
    assert timing.ratios([3.0, 6.0], [1.0, 2.0]) == [3.0, 3.0, 1.5]
    ticks = iter([5] * 1000)
    assert rate(ticks, 0.0, CPU) > 0
    assert next(ticks) == 5  # stops in time


def test_the_table_has_a_row_for_every_figure() -> None:
    part = {"ms": 1.234, "share": 0.5, "processor_ms": 1}
    none = {**part, "ms": 0}
    parts = {"forward": part, "teacher": none}
    figures = {"a rate": timing.spread([1.0, 4.0, 3.0]), "parts": parts, "device": "x"}
    lines = timing.table("title", figures).splitlines()
    assert [line.split() for line in lines] == [
        ["title"],
        ["a", "rate", "3", "1", "..", "4", "of", "3"],
        ["parts"],
        ["forward", "1.23", "50.0%,", "1", "ms", "of", "processor"],
        ["device", "x"],
    ]
    assert [timing.figure(v) for v in (0.0123, 1.234, 1_234_567)] == ["0.0123", "1.23", "1,230,000"]


def test_the_peak_is_measured_in_the_precision() -> None:
    assert all(value > 0 for value in timing.peak_rates(CPU, "32-true", seconds=0.0).values())


def test_noise_fills_the_shape() -> None:
    held = noise(count=7, channels=3, image_size=4, num_classes=5)
    images, classes = held.batch([6, 1])
    assert images.shape == (2, 3, 4, 4)
    assert bool((held.labels < 5).all())
    assert held[6][1] == int(classes[0])
