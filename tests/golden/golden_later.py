"""What the comparisons with FastGen and with the code of truncated consistency models share: toy network, laws, cases.

Ours is computed in float64: the `.f64` arrays are compared closely, the others as far as float32 of the published code goes.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consistency.denoiser import Denoiser
from consistency.distances import Distance, PseudoHuber, SquaredNorm
from consistency.pairs import (
    LognormalTimes,
    RatioPairs,
    TruncatedLognormalTimes,
    TruncatedStudentTimes,
    TruncatedTimes,
)
from consistency.preconditioning import EDM
from consistency.tensors import Data, Label, Time
from consistency.weightings import (
    Weighting,
    inverse_c_out,
    inverse_gap,
    inverse_root_gap,
    karras,
    snr,
    uniform,
)
from golden_harness import Archive, Tolerance, read_json, read_safetensors

# Section L4 of the golden README, column "suggested test".
TIME = Tolerance(of_each=1e-8)
EXACT = Tolerance(of_each=1e-10)
OUTPUT, OUTPUT_AT_ENDS = Tolerance(of_norm=1e-5), Tolerance(of_norm=2e-4)
LOSS, LOSS_FLOAT64 = Tolerance(of_norm=5e-4), Tolerance(of_norm=1e-8)
GRADIENT, GRADIENT_FLOAT64 = Tolerance(of_norm=2e-3), Tolerance(of_norm=1e-8)
CLOSE = 1e-5
"""Times with a smaller gap are beyond float32: its losses are off by 1 %, its gradients by 4 %."""
CLOSE_LOSS, CLOSE_GRADIENT = Tolerance(of_norm=2e-2), Tolerance(of_norm=1e-1)
CLOSE_FLOAT64 = Tolerance(of_norm=1e-7)

# Constants of the codes that the files do not hold.
K, B, NVLABS, T_MIN, T_MAX, RHO = 8.0, 1.0, 0.25, 0.002, 80.0, 7.0
FASTGEN = {"r_min": 0.002, "least_gap": 1e-6}
TCM = {"r_min": 1e-6, "least_gap": 0.0}
FASTGEN_SHIFT = 1e-8
"""FastGen adds it to t' in float64; in the authors' code it is lost in float32."""


class Toy(nn.Module):
    """The toy network of section L2 of the golden README, by name; class `classes` is none."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        shape = read_json(path.with_name("nets.json"))["toys"][path.stem]
        hidden, classes, channels = shape["hidden"], shape["classes"], shape["channels"]
        self.num_classes, self.no_class = classes or None, classes
        self.conv_in = nn.Conv2d(channels, hidden, 3, padding=1)
        self.time = nn.Linear(3, hidden)
        if classes:
            self.label = nn.Linear(classes, hidden, bias=False)
        self.conv_out = nn.Conv2d(hidden, channels, 1)
        self.logvar_linear = nn.Linear(3, 1)
        self.load_state_dict(read_safetensors(path))
        self.order = [name for name, _ in shape["parameters"]]

    def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
        e = self.time(torch.stack([c_noise, (3 * c_noise).sin(), (3 * c_noise).cos()], dim=1))
        if label is not None:
            columns = torch.cat([self.label.weight, torch.zeros_like(self.time.bias)[:, None]], 1)
            e = e + columns.T[label]
        return self.conv_out((self.conv_in(x) + e[:, :, None, None]).tanh()) + 0.3 * x

    def gradient(self) -> Tensor:
        """Gradients in the order of the file, joined; zeros where a parameter takes no part."""
        named = dict(self.named_parameters())
        parts = [
            torch.zeros_like(p) if p.grad is None else p.grad
            for p in (named[name] for name in self.order)
        ]
        return torch.cat([part.flatten() for part in parts])


def denoiser(archive: Archive, name: str, sigma_data: float) -> Denoiser:
    toy = Toy(archive.path.with_name(f"{name}.safetensors"))
    return Denoiser(toy, EDM(sigma_data=sigma_data, c_noise_scale=NVLABS)).double()


def weighting(name: str, sigma_data: float) -> Weighting:
    """Ours under the name of FastGen or of the authors' code."""
    c_out_sq = partial(karras, sigma_data=sigma_data)
    return {
        "default": inverse_gap,
        "c_out": partial(inverse_c_out, sigma_data=sigma_data),
        "c_out_sq": c_out_sq,
        "cout_sq": c_out_sq,
        "sigma_sq": snr,
        "sqrt": inverse_root_gap,
        "one": uniform,
    }[name]


def distance_of(c: float, *, squared: bool) -> Distance:
    return SquaredNorm() if squared else PseudoHuber(c=c, per_root_dimension=False)


def fastgen_law(config: dict[str, Any]) -> TruncatedTimes:
    """The law of t of FastGen's `sample_t_cfg`."""
    ends = {"t_lo": config["min_t"], "t_hi": config["max_t"]}
    mean, std = config["train_p_mean"], config["train_p_std"]
    if config["time_dist_type"] == "log_t":
        return TruncatedStudentTimes(df=config["log_t_df"], loc=mean, scale=std, **ends)
    assert config["time_dist_type"] == "lognormal"
    return TruncatedLognormalTimes(p_mean=mean, p_std=std, **ends)


def tcm_law(config: dict[str, Any]) -> TruncatedTimes:
    """The law of t of the authors' loss arguments."""
    mean, std = float(config["P_mean"]), config["P_std"]
    ends = {"t_lo": float(config.get("t_lower", T_MIN)), "t_hi": T_MAX}
    if config.get("tdist") == "t":
        return TruncatedStudentTimes(df=config["df"], loc=mean, scale=std, **ends)
    return TruncatedLognormalTimes(p_mean=mean, p_std=std, **ends)


def pairs_at(law: TruncatedTimes | LognormalTimes, floors: dict[str, float]) -> RatioPairs:
    """The map t -> r of a case, whose ratio is given as 1 - 1/N."""
    return RatioPairs(times=law, k=K, b=B, **floors)


class Case(NamedTuple):
    """A case of a file: its inputs, and the names of its arrays."""

    archive: Archive
    name: str

    def __call__(self, field: str) -> str:
        return f"{self.name}.{field}"

    def input(self, field: str) -> Tensor:
        values = self.archive.tensor(self(field))
        return values.double() if values.is_floating_point() else values

    def has(self, field: str) -> bool:
        return self(field) in self.archive

    def label(self) -> Label:
        """The class indices of one-hot rows; rows of zeros have the index after the last."""
        if not self.has("condition"):
            return None
        rows = self.input("condition")
        return torch.where(rows.any(1), rows.argmax(1), rows.shape[1])

    def compare(self, field: str, ours: Tensor, tolerance: Tolerance, tight: Tolerance) -> None:
        """Compares the float32 run's array, and the float64 run's closely where the file has it."""
        self.archive.compare(self(field), ours, tolerance)
        if self.has(f"{field}.f64"):
            self.archive.compare(self(f"{field}.f64"), ours, tight)

    def compare_times(self, t: Time, r: Time) -> None:
        self.compare("t", t, TIME, TIME)
        self.compare("r", r, TIME, TIME)

    def compare_outputs(self, **passes: Data) -> None:
        """Compares images by field, less closely where the times are given: they reach the ends of the range."""
        tolerance = OUTPUT_AT_ENDS if self.has("t_given") else OUTPUT
        for field, ours in passes.items():
            self.archive.compare(self(field), ours, tolerance)

    def compare_run(self, toy: Any, total: Tensor, names: dict[str, Tensor], gap: float) -> None:
        """Compares losses by field, and the gradient of `total`."""
        toy.zero_grad()
        total.backward()
        close = gap < CLOSE
        tight = CLOSE_FLOAT64 if close else LOSS_FLOAT64
        for field, ours in names.items():
            self.compare(field, ours, CLOSE_LOSS if close else LOSS, tight)
        tight = CLOSE_FLOAT64 if close else GRADIENT_FLOAT64
        self.compare("grad", toy.gradient(), CLOSE_GRADIENT if close else GRADIENT, tight)


def cases_of(archive: Archive) -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = read_json(archive.path.with_suffix(".json"))["cases"]
    return cases
