"""What the comparisons with the codes after 2023 share: toy network, dropout masks, laws, cases.

Ours is computed in float64: the `.f64` arrays are compared closely, the others as far as float32 of the published code goes.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from consistency.denoiser import Denoiser
from consistency.distances import Distance, PseudoHuber, SquaredNorm
from consistency.networks.layers import SecondTime, two_times
from consistency.pairs import (
    LognormalTimes,
    RatioPairs,
    TruncatedLognormalTimes,
    TruncatedStudentTimes,
    TruncatedTimes,
)
from consistency.preconditioning import EDM
from consistency.tensors import NO_CLASS, Data, Label, Time, broadcast_time
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


class Bounds(NamedTuple):
    """Section L4 for average velocities: of times, values, derivatives, losses and gradients, in one precision."""

    time: Tolerance
    value: Tolerance
    derivative: Tolerance
    loss: Tolerance
    gradient: Tolerance


def bounds(suffix: str, *, differences: bool = False) -> Bounds:
    numbers = (1e-6, 1e-5, 1e-5, 2e-5, 1e-4) if not suffix else (1e-10, 1e-9, 1e-9, 1e-9, 1e-8)
    if differences:
        numbers = (1e-6, 1e-3, 2e-3, 1e-4, 1e-3) if not suffix else (1e-10, 1e-8, 1e-8, 1e-8, 1e-8)
    return Bounds(*(Tolerance(of_norm=number, absolute=1e-12) for number in numbers))


class Tolerances(NamedTuple):
    """The same for TrigFlow: float64 and its gradients, float32 outputs, losses, derivatives, gradients."""

    double: Tolerance
    double_gradient: Tolerance
    output: Tolerance
    loss: Tolerance
    derivative: Tolerance
    gradient: Tolerance


def tolerances(*, difference: bool = False, ends: bool = False, toy: bool = True) -> Tolerances:
    """The tolerances for a finite difference, for times near the ends of their range, for a U-Net.

    The published U-Nets keep frequencies in float32 in the float64 run too.
    """
    output = 1e-5 if toy and not ends else 2e-4
    parts = (1e-9, 1e-8, output, 2e-5, output, 1e-4)
    if difference:
        parts = (1e-8, 1e-8, output, 1e-4, 2e-3, 1e-4)
    if not toy:
        parts = (1e-7, 1e-6, *parts[2:])
    return Tolerances(*(Tolerance(of_norm=n) for n in parts))


# Constants of the codes that the files do not hold.
K, B, NVLABS, T_MIN, T_MAX, RHO = 8.0, 1.0, 0.25, 0.002, 80.0, 7.0
FASTGEN = {"r_min": 0.002, "least_gap": 1e-6}
TCM = {"r_min": 1e-6, "least_gap": 0.0}
FASTGEN_SHIFT = 1e-8
"""FastGen adds it to t' in float64; in the authors' code it is lost in float32."""


class Toy(nn.Module):
    """F = conv_out(tanh(conv_in(x) + time phi(c_noise) + label y)) + 0.3 x, from section L2 of the golden README, by name.

    A class below 0 or above the last is none; `second_time` as in our networks; c_noise is at least `lowest`.
    """

    no_class = NO_CLASS

    def __init__(
        self, path: Path, second_time: SecondTime = None, *, lowest: float = -math.inf
    ) -> None:
        super().__init__()
        self.second_time, self.lowest = second_time, lowest
        weights = read_safetensors(path)
        toy = read_json(path.with_name("nets.json"))["toys"][path.stem]
        # An average has the parameters of its network.
        listed = toy.get("parameters", [(name, None) for name in weights])
        assert set(weights) == {name for name, _ in listed}
        self.num_classes = weights["label.weight"].shape[1] if "label.weight" in weights else None
        for name, _ in listed:
            layer, kind = name.split(".")
            if not hasattr(self, layer):
                self.add_module(layer, nn.Module())
            self.get_submodule(layer).register_parameter(kind, nn.Parameter(weights[name]))

    def forward(
        self, x: Data, c_noise: Time, label: Label = None, *, r: Time | None = None
    ) -> Data:
        def phi(c: Time) -> Tensor:
            return features(c.clamp(min=self.lowest))

        p = dict(self.named_parameters())
        e = two_times(phi, c_noise, r, self.second_time) @ p["time.weight"].T + p["time.bias"]
        if label is not None and self.num_classes is not None:
            known = (label >= 0) & (label < self.num_classes)
            row = torch.where(known, label, 0)
            e = e + p["label.weight"].T[row] * known[:, None]
        h = functional.conv2d(x, p["conv_in.weight"], p["conv_in.bias"], padding=1)
        h = (h + e[:, :, None, None]).tanh()
        return functional.conv2d(h, p["conv_out.weight"], p["conv_out.bias"]) + 0.3 * x

    def gradient(self) -> Tensor:
        """Gradients in the order of the file, joined; zeros where a parameter takes no part."""
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters())
        return torch.cat([grad.flatten() for grad in grads])


def features(c_noise: Time) -> Float[Tensor, "b 3"]:
    return torch.stack([c_noise, (3 * c_noise).sin(), (3 * c_noise).cos()], dim=1)


class Masked(nn.Module):
    """A network, of one time or two, that keeps a random mask of units in each pass; in eval mode it drops nothing."""

    no_class = NO_CLASS

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def forward(
        self, x: Data, c_noise: Time, label: Label = None, *, r: Time | None = None
    ) -> Data:
        mask = functional.dropout(torch.ones(64), 0.5, self.training)
        self.masks.append(mask)
        return x * mask.mean() + broadcast_time(c_noise.sin(), x)


def numbered(masks: list[Tensor]) -> list[int]:
    """A number for each mask, equal for equal masks, in the order of their first place."""
    kinds: list[Tensor] = []
    for mask in masks:
        if not any(torch.equal(mask, kind) for kind in kinds):
            kinds.append(mask)
    return [next(i for i, kind in enumerate(kinds) if torch.equal(mask, kind)) for mask in masks]


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
