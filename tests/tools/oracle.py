"""Train every mode on data with known answers: `python tests/tools/oracle.py [--seeds 0 1 2] [mode ...]`.

Write runs/oracle/table.md and samples.png, one-step samples, of all results there. A result is a file of a mode and a seed;
one that is there is kept, so that an interrupted call goes on where it stopped, and several can share the work. `--seeds`
without a seed trains nothing.

Data: points of the plane whose coordinates follow the mixture of three modes in `analytic`, for which the map from
noise to data is known. Each mode is trained for about the same processor time by its own YAML, the LightningModule
and the callbacks that a run has; only the data, a small network and the lengths of schedules are this file's. Printed
beside what one loop reached before (an untuned single loop, one seed): the root-mean-square error of the one-step map,
the Wasserstein-1 distance per coordinate after one and two steps, and the ratio of standard deviations. The first two
are in standard deviations of the data; 0, 0, 0 and 1 would be exact, and the error 0.99 is a constant answer.
"""

import json
import sys
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from analytic import THREE_MODES
from consistency.commands import schema
from consistency.data.module import DataModule
from consistency.denoiser import Denoiser
from consistency.flow_samplers import flow_jumps
from consistency.randomness import generator
from consistency.samplers import Sampler, multistep, onestep
from consistency.tensors import Data, Denoise, Label, Time
from consistency.training.build import build_module, quiet
from consistency.training.module import ConsistencyModule

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "oracle"
BATCH, SHOWN, TRIAL = 512, 2000, 80
NETWORK = {"_target_": "consistency.networks.mlp.MLP", "channels": 2, "width": 128, "depth": 3}
SETTINGS = [
    "data=mixture",
    "data.image_size=1",
    "data.channels=2",
    f"data.batch_size={BATCH}",
    "output=/nowhere",
    "mode.rate=falling",
    "parts.rate.falling.start=0.0",
    "mode.average=power",
    "parts.average.power.widths=[0.05]",
]
"""Of every run: the rate falls linearly to 0, and the average spans a twentieth of the run."""
MIXTURE = tuple(getattr(THREE_MODES, name).float() for name in ("weights", "means", "stds"))


def exact_denoiser() -> Denoise:
    """Return the exact denoiser of the mixture, in float32."""

    def denoise(x_t: Data, t: Time, label: Label = None) -> Data:
        return THREE_MODES.denoise(x_t.double(), t.double()).to(x_t.dtype)

    return denoise


def weights_of(mode: str, seed: int) -> Path:
    return FOLDER / f"{mode}_{seed}.pt"


def trained_denoiser(mode: str, seed: int) -> Denoiser:
    """Return what a mode has trained, before the present one."""
    denoiser: Denoiser = torch.load(weights_of(mode, seed), weights_only=False)
    return denoiser


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


def put(place: str, built: str) -> list[str]:
    """Return the overrides that put something of this file in a place of the mode."""
    return [f"~mode.{place}", f"+mode.{place}={{_target_: oracle.{built}}}"]


EXACT, TRAINED = "exact_denoiser", "trained_denoiser, seed: ${seed}, mode: "
TRIGFLOW = ["parts.warmup.linear.ramp_steps=300", "parts.normalisation.length.c=10"]
"""A warm-up of a share of the run, whose published 10,000 steps it does not have, and tangents that keep most of their length."""
MEAN = ["parts.distance.norm.c=0.03"]
"""The pseudo-Huber constant of CIFAR-10, as in `ict` here. A norm leads to the median of the target, which of two numbers, unlike of
3072, is far from the mean; so do an adaptive distance with p > 0 and tangents of length 1."""
ORACLES = {
    "edm": Oracle(reached=".994 .866 .505  .014"),
    "ct": Oracle(reached=".894 .784 .232  .113"),
    "cd": Oracle(
        [
            *put("objective.step.teacher", EXACT),
            "parts.scales.constant.num_scales=18",
            "parts.target.fixed.mu=0.99",
        ],
        init="edm",
        reached=".111 .072 .026  .978",
    ),
    "ict": Oracle(["parts.distance.pseudo_huber.c=0.0212"], reached=".180 .091 .068 1.021"),
    "ect": Oracle(MEAN, init="edm", reached=".123 .081 .065 1.048"),
    "tcm": Oracle(
        [
            *put("objective.first_stage", TRAINED + "ect"),
            "parts.scales.constant.num_scales=256",  # the last N(k) of ect
            *MEAN,
        ],
        init="ect",
        reached=".133 .074 .074 1.014",
        two=partial(multistep, times=[80.0, 1.0], t_min=0.002, t_max=80.0, clip=False),
    ),
    "progdist": Oracle(
        [
            *put("callbacks.stages.teacher", TRAINED + "edm"),
            "parts.scales.halving.s_0=64",
            "mode.rate=falling_in_stages",
            "mode.average=constant",
            "parts.average.constant.decays=[0.95]",
        ],
        init="edm",
    ),
    "ct_continuous": Oracle(init="edm", lr=5e-4),
    "cd_continuous": Oracle(put("objective.velocity.teacher", EXACT), init="edm", lr=5e-4),
    # Differences cost half a forward-mode derivative here; along the path of the data they are the same objective.
    "sct": Oracle(
        [*TRIGFLOW, "mode.derivative=central_difference"], "edm", reached=".161 .101 .092 1.016"
    ),
    "scd": Oracle(
        [*TRIGFLOW, *put("objective.velocity.teacher", EXACT)],
        "edm",
        reached=".172 .129 .130  .977",
    ),
    "meanflow": Oracle(["parts.distance.adaptive.p=0"], reached=".206 .125 .157 1.010", **JUMPS),
    "alphaflow": Oracle(
        ["parts.distance.adaptive_mean.p=0"], reached=".322 .194 .141  .896", **JUMPS
    ),
    # A decay of 0.999 passes an answer from the shortest jumps to the longest, seven lengths, in 7,000 steps.
    "shortcut": Oracle(
        ["parts.target.shortcut.mu=0.99", "parts.pairs.halved.bootstrap=0.25"],
        reached=".156 .117 .099 1.009",
        **JUMPS,
    ),
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


def configured(name: str, oracle: Oracle, steps: int, seed: int) -> Any:
    schema.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        length = [f"trainer.max_steps={steps}", f"seed={seed}", f"optimizer.lr={oracle.lr}"]
        config = compose("train", [f"mode={name}", *SETTINGS, *length, *oracle.overrides])
    second_time = config.model.network.get("second_time")
    config.model.network = OmegaConf.create({**NETWORK, "second_time": second_time})
    return config


def train(
    name: str,
    oracle: Oracle,
    steps: int,
    *callbacks: L.Callback,
    seed: int = 0,
    compilation: bool = False,
) -> ConsistencyModule:
    """Train a mode with its own callbacks and the given ones, its networks compiled or not."""
    torch.manual_seed(seed)
    config = configured(name, oracle, steps, seed)
    config.compile = compilation
    module = build_module(config)
    if oracle.init:
        start = trained_denoiser(oracle.init, seed)
        module.online.network.load_state_dict(start.network.state_dict())
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, datamodule=Plane(steps))
    return module


def sampling(module: ConsistencyModule) -> Denoiser:
    """Return the average under the scalings for samples."""
    return Denoiser(next(iter(module.averages.values())), module.sampling_preconditioning)


class Clock(L.Callback):
    """Processor seconds at the beginning of every step, and at the end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.process_time())

    on_train_end = on_train_batch_start

    def per_step(self) -> float:
        return median(b - a for a, b in zip(self.times, self.times[1:], strict=False))


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
class Result:
    """Of one mode and seed: steps, processor seconds, the four numbers and one-step samples (n, 2)."""

    mode: str
    seed: int
    steps: int
    seconds: float
    numbers: tuple[float, ...]
    samples: list[list[float]]


def result_of(mode: str, seed: int) -> Path:
    return FOLDER / f"{mode}_{seed}.json"


def results() -> dict[str, list[Result]]:
    """Return all results that are there, by mode."""
    found = {name: sorted(FOLDER.glob(f"{name}_[0-9]*.json")) for name in ORACLES}
    return {
        name: [Result(**json.loads(file.read_text())) for file in files]
        for name, files in found.items()
        if files
    }


def obtain(name: str, seed: int, seconds: float) -> None:
    """Train a mode, and the one that it starts from, unless its result is there."""
    oracle = ORACLES[name]
    if result_of(name, seed).exists():
        return
    if oracle.init:
        obtain(oracle.init, seed, seconds)
    trial, clock = Clock(), Clock()
    train(name, oracle, TRIAL, trial, seed=seed)
    steps = max(int(seconds / trial.per_step()), TRIAL)
    denoise = sampling(train(name, oracle, steps, clock, seed=seed))
    spent = clock.times[-1] - clock.times[0]
    numbers, samples = measured(denoise, oracle)
    points = [[round(x, 4) for x in point] for point in samples.tolist()]
    torch.save(denoise, weights_of(name, seed))
    result = Result(name, seed, steps, spent, numbers, points)
    result_of(name, seed).write_text(json.dumps(asdict(result)))
    print(f"seed {seed}", markdown({name: [result]}).splitlines()[-1], flush=True)


HEAD = (
    "| mode | from | seeds | steps | CPU s | map error | W1, 1 step | W1, 2 steps | std ratio "
    "| one loop before: the same four |\n|---|---|--:|--:|--:|--:|--:|--:|--:|---|\n"
)


def spread(values: Iterable[float]) -> str:
    """Return the median with the smallest and the largest of several values."""
    low, *_, high = ordered = sorted([*values] * 2)
    middle = f"{median(ordered):.3f}"
    return middle if low == high else f"{middle} ({low:.3f} to {high:.3f})"


def markdown(found: dict[str, list[Result]]) -> str:
    """Return the table."""
    lines = [HEAD]
    for name, runs in found.items():
        before = " ".join(ORACLES[name].reached.split()) or "not known"
        start = f"`{ORACLES[name].init}`" if ORACLES[name].init else "random"
        numbers = " | ".join(spread(n) for n in zip(*(run.numbers for run in runs), strict=True))
        steps, seconds = median(run.steps for run in runs), median(run.seconds for run in runs)
        size = f"{len(runs)} | {steps:.0f} | {seconds:.0f}"
        lines.append(f"| `{name}` | {start} | {size} | {numbers} | {before} |\n")
    return "".join(lines)


def picture(found: dict[str, list[Result]], path: Path) -> None:
    """Draw one panel per mode: one-step samples of its first seed over samples of the data."""
    columns = 4
    height = -(-len(found) // columns)
    figure = Figure(figsize=(3 * columns, 3 * height), layout="constrained")
    weights, means, stds = MIXTURE
    draw = generator(1, "oracle")
    mode = torch.multinomial(weights, 2 * SHOWN, replacement=True, generator=draw)
    law = (means[mode] + stds[mode] * torch.randn(2 * SHOWN, generator=draw)).reshape(-1, 2)
    for place, (name, runs) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(height, columns, place)
        axes.scatter(*law.T, s=2, color="0.75", linewidths=0, label="data")
        axes.scatter(
            *zip(*runs[0].samples, strict=True),
            s=2,
            color="tab:blue",
            linewidths=0,
            label="one step",
        )
        axes.set(title=name, xlim=(-1.3, 1.4), ylim=(-1.3, 1.4), aspect="equal")
        axes.set(xticks=[], yticks=[])
        if place == 1:
            axes.legend(loc="upper left", markerscale=4, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = ArgumentParser(description="Train modes on a law with exact answers.")
    parser.add_argument("modes", nargs="*", help="default: all", default=list(ORACLES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=60.0, help="processor time of a mode")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet()
    torch.set_num_threads(1)
    # The parts above are found by their name in this module, which is __main__ now.
    sys.modules["oracle"] = sys.modules[__name__]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for name in given.modes:
            obtain(name, seed, given.seconds)
    found = results()
    picture(found, FOLDER / "samples.png")
    (FOLDER / "table.md").write_text(markdown(found))
    print(f"\n{markdown(found)}\nPicture: {FOLDER / 'samples.png'}")


if __name__ == "__main__":
    main()
