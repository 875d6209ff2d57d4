"""Train every mode on data with known answers: `python tests/tools/oracle.py [seconds per mode] [mode ...]`.

Print a table and write it to runs/oracle/table.md, with a picture of the one-step samples in runs/oracle/samples.png.

Data: points of the plane whose coordinates follow the mixture of three modes in `analytic`, for which the map from
noise to data is known. Each mode is trained for about the given processor time with its own YAML, the LightningModule
and the callbacks that a run has; only the data, a small network and the lengths of schedules are this file's. Printed
beside what one loop reached before (an untuned single loop, at its own budget): the root-mean-square error of the one-step map,
the Wasserstein-1 distance per coordinate after one and two steps, and the ratio of standard deviations. The first two
are in standard deviations of the data; 0, 0, 0 and 1 would be exact, and the error 0.99 is a constant answer.
"""

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from analytic import THREE_MODES
from consistency.commands import schema
from consistency.data.module import DataModule
from consistency.denoiser import Denoiser
from consistency.flow_samplers import flow_jumps
from consistency.networks.mlp import MLP
from consistency.preconditioning import EDM
from consistency.randomness import generator
from consistency.samplers import Sampler, multistep, onestep
from consistency.schedules import falling_rate
from consistency.tensors import Data, Denoise, Label, Time
from consistency.training.build import quiet
from consistency.training.callbacks.ema import EvaluationEMA
from consistency.training.callbacks.schedules import LearningRateSchedule
from consistency.training.module import ConsistencyModule

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "oracle"
BATCH, AVERAGE, SHOWN = 512, 0.999, 2000
SCALINGS = EDM(sigma_data=0.5, c_noise_scale=0.25)
MIXTURE = tuple(
    values.float() for values in (THREE_MODES.weights, THREE_MODES.means, THREE_MODES.stds)
)


def exact_denoiser() -> Denoise:
    """Return the exact denoiser of the mixture, in float32."""

    def denoise(x_t: Data, t: Time, label: Label = None) -> Data:
        return THREE_MODES.denoise(x_t.double(), t.double()).to(x_t.dtype)

    return denoise


TRAINED: dict[str, Denoiser] = {}


def trained_denoiser(mode: str = "edm") -> Denoiser:
    """Return what a mode has trained, before the present one."""
    return TRAINED[mode]


ONE = partial(onestep, t_max=80.0, clip=False)
TWO = partial(multistep, times=[80.0, 0.821], t_min=0.002, t_max=80.0, clip=False)
JUMPS: dict[str, Any] = {
    "one": partial(flow_jumps, times=[1.0], t_max=1.0),
    "two": partial(flow_jumps, times=[1.0, 0.5], t_max=1.0),
}


@dataclass(frozen=True)
class Oracle:
    """A mode: overrides of its YAML, the mode whose network it starts from, earlier results, rate, samplers."""

    overrides: list[str] = field(default_factory=list)
    init: str = ""
    reached: str = ""
    lr: float = 1e-3
    one: Sampler = ONE
    two: Sampler = TWO


EXACT = "{_target_: oracle.exact_denoiser}"
WARM = ["parts.warmup.linear.ramp_steps=500"]
"""A warm-up of a share of the run, whose published 10,000 steps it does not have."""
ORACLES = {
    "edm": Oracle(reached=".994 .866 .505  .014"),
    "ct": Oracle(reached=".894 .784 .232  .113"),
    "cd": Oracle(
        [
            "~mode.objective.step.teacher",
            f"+mode.objective.step.teacher={EXACT}",
            "parts.scales.constant.num_scales=18",
            "parts.target.fixed.mu=0.99",
        ],
        init="edm",
        reached=".111 .072 .026  .978",
    ),
    "ict": Oracle(reached=".180 .091 .068 1.021"),
    "ect": Oracle(reached=".123 .081 .065 1.048", init="edm"),
    "tcm": Oracle(
        [
            "~mode.objective.first_stage",
            "+mode.objective.first_stage={_target_: oracle.trained_denoiser, mode: ect}",
            "parts.scales.constant.num_scales=256",
        ],
        init="ect",
        reached=".133 .074 .074 1.014",
        two=partial(multistep, times=[80.0, 1.0], t_min=0.002, t_max=80.0, clip=False),
    ),
    "progdist": Oracle(
        [
            "~mode.callbacks.stages.teacher",
            "+mode.callbacks.stages.teacher={_target_: oracle.trained_denoiser}",
            "parts.scales.halving.s_0=64",
        ],
        init="edm",
    ),
    "ct_continuous": Oracle(init="edm", lr=5e-4),
    "cd_continuous": Oracle(
        ["~mode.objective.velocity.teacher", f"+mode.objective.velocity.teacher={EXACT}"],
        init="edm",
        lr=5e-4,
    ),
    "sct": Oracle(WARM, init="edm", reached=".161 .101 .092 1.016"),
    "scd": Oracle(
        [*WARM, "~mode.objective.velocity.teacher", f"+mode.objective.velocity.teacher={EXACT}"],
        init="edm",
        reached=".172 .129 .130  .977",
    ),
    "meanflow": Oracle(reached=".206 .125 .157 1.010", **JUMPS),
    "alphaflow": Oracle(**JUMPS),
    "shortcut": Oracle(**JUMPS),
}


class Plane(DataModule):
    """Fresh points of the mixture, as images of two channels and one pixel."""

    def __init__(self, steps: int) -> None:
        L.LightningDataModule.__init__(self)
        self.steps, self.num_classes = steps, None

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        nothing = (torch.zeros(BATCH, 2, 1, 1), torch.zeros(BATCH))
        return DataLoader([nothing] * self.steps, batch_size=None)  # type: ignore[arg-type]

    def augmented(self, images: Tensor, draw: Generator) -> Data:
        weights, means, stds = MIXTURE
        mode = torch.multinomial(weights, images.numel(), replacement=True, generator=draw)
        z = torch.randn(images.numel(), generator=draw)
        return (means[mode] + stds[mode] * z).reshape(images.shape)


def configured(name: str, oracle: Oracle, steps: int) -> Any:
    schema.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run = [f"mode={name}", f"trainer.max_steps={steps}", "output=/nowhere"]
        return compose("train", [*run, *oracle.overrides])


def train(
    name: str,
    oracle: Oracle,
    steps: int,
    *callbacks: L.Callback,
    compilation: bool = False,
) -> ConsistencyModule:
    """Train a mode with its own callbacks and the given ones, its networks compiled or not."""
    torch.manual_seed(0)
    config = configured(name, oracle, steps)
    second_time = config.model.network.get("second_time")
    network = MLP(channels=2, width=128, depth=3, second_time=second_time)
    if oracle.init:
        network.load_state_dict(TRAINED[oracle.init].network.state_dict())
    module = ConsistencyModule(
        online=Denoiser(network, instantiate(config.mode.preconditioning)),
        objective=instantiate(config.mode.objective, _convert_="all"),
        sampling_preconditioning=instantiate(config.mode.sampling_preconditioning),
        optimizer=partial(torch.optim.RAdam, lr=oracle.lr),
        card=None,
        config={},
        seed=0,
        on_nonfinite="stop",
        sources={},
        compilation=compilation,
    )
    fall = partial(falling_rate, start=0.0, total_steps=steps)
    mode_callbacks = [instantiate(node, _convert_="all") for node in config.mode.callbacks.values()]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            *mode_callbacks,
            LearningRateSchedule(factor=fall),
            EvaluationEMA(decays=[AVERAGE]),
            *callbacks,
        ],
    )
    trainer.fit(module, datamodule=Plane(steps))
    return module


@torch.no_grad()
def measured(
    denoise: Denoise, oracle: Oracle, count: int = 20_000
) -> tuple[tuple[float, float, float, float], Tensor]:
    """Return the error of the one-step map, W1 at one and two steps, the ratio of standard deviations; and samples."""

    def noise_of(seed: int) -> Callable[[], Data]:
        draw = generator(seed, "oracle")
        return lambda: torch.randn(count, 2, 1, 1, generator=draw)

    one, two = oracle.one(denoise, noise_of(0)), oracle.two(denoise, noise_of(0))
    # Every process ends at the map of this noise, the variance-exploding one from 80 times it.
    start = 80.0 * noise_of(0)()
    t, r = (torch.full((count,), value, dtype=torch.float64) for value in (80.0, 0.002))
    exact = THREE_MODES.flow(start.double(), t, r)
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    even = 80.0 * torch.special.ndtri(share)[:, None, None, None]
    quantiles = THREE_MODES.flow(even, t, r)
    std = THREE_MODES.std

    def wasserstein(x: Data) -> float:
        return float((x.double().sort(dim=0).values - quantiles).abs().mean()) / std

    error = float((one - exact).square().mean().sqrt()) / std
    numbers = error, wasserstein(one), wasserstein(two), float(one.std()) / std
    return numbers, one[:SHOWN].flatten(1)


@dataclass(frozen=True)
class Row:
    """The results of one mode: name, steps, processor seconds, the four numbers and one-step samples (n, 2)."""

    name: str
    steps: int
    seconds: float
    numbers: tuple[float, float, float, float]
    samples: Tensor


HEAD = "| mode | steps | CPU s | map error | W1, 1 step | W1, 2 steps | std ratio | one loop before: the same four |\n"


def markdown(rows: list[Row]) -> str:
    """Return the table."""
    lines = [HEAD, "|---|--:|--:|--:|--:|--:|--:|---|\n"]
    for row in rows:
        numbers = " | ".join(f"{number:.3f}" for number in row.numbers)
        before = " ".join(ORACLES[row.name].reached.split()) or "not known"
        lines.append(f"| `{row.name}` | {row.steps} | {row.seconds:.0f} | {numbers} | {before} |\n")
    return "".join(lines)


def picture(rows: list[Row], path: Path) -> None:
    """Draw one panel per mode: its one-step samples over samples of the data."""
    columns = 4
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(3 * columns, 3 * height), layout="constrained")
    weights, means, stds = MIXTURE
    draw = generator(1, "oracle")
    mode = torch.multinomial(weights, 2 * SHOWN, replacement=True, generator=draw)
    law = (means[mode] + stds[mode] * torch.randn(2 * SHOWN, generator=draw)).reshape(-1, 2)
    for place, row in enumerate(rows, start=1):
        axes = figure.add_subplot(height, columns, place)
        axes.scatter(*law.T, s=2, color="0.75", linewidths=0, label="data")
        axes.scatter(*row.samples.T, s=2, color="tab:blue", linewidths=0, label="one step")
        axes.set(title=row.name, xlim=(-1.3, 1.4), ylim=(-1.3, 1.4), aspect="equal")
        axes.set(xticks=[], yticks=[])
        if place == 1:
            axes.legend(loc="upper left", markerscale=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(arguments: list[str]) -> None:
    warnings.filterwarnings("ignore")
    quiet()
    torch.set_num_threads(1)
    # The parts above are found by their name in this module, which is __main__ now.
    sys.modules["oracle"] = sys.modules[__name__]
    seconds = float(arguments[0]) if arguments else 60.0
    chosen = {"edm", *(arguments[1:] or ORACLES)}
    chosen |= {ORACLES[name].init for name in chosen}
    rows = []
    for name, oracle in ORACLES.items():
        if name not in chosen:
            continue
        print(f"{name} ...", flush=True)
        train_again = partial(train, name, oracle)
        TRAINED.setdefault("edm", Denoiser(MLP(channels=2, width=128, depth=3), SCALINGS))
        begin = time.process_time()
        train_again(60)
        per_step = (time.process_time() - begin) / 60
        steps = max(int(seconds / per_step), 64)
        begin = time.process_time()
        module = train_again(steps)
        spent = time.process_time() - begin
        average = module.averages[f"ema:{AVERAGE}"]
        sampling = Denoiser(average, module.sampling_preconditioning)
        TRAINED[name] = sampling
        numbers, samples = measured(sampling, oracle)
        rows.append(Row(name, steps, spent, numbers, samples))
        print(markdown(rows).splitlines()[-1], flush=True)
    picture(rows, FOLDER / "samples.png")
    (FOLDER / "table.md").write_text(markdown(rows))
    print(f"\n{markdown(rows)}\nPicture: {FOLDER / 'samples.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
