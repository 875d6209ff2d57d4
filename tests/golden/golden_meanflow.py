"""Comparisons of average velocities with the released codes of MeanFlow, in JAX and PyTorch, and of FastGen.

Losses run in float32 and in float64, for arrays `name` and `name.f64`. What the loss is made of is taken from its parts.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from consistency.averaging import averaging
from consistency.denoiser import Denoiser
from consistency.derivatives import Derivative, ExactDerivative, FiniteDifference
from consistency.distances import Adaptive, AdaptiveStep, Distance
from consistency.flow_pairs import CappedPairs, CountedPairs, FirstPairs, LogitNormalPairs
from consistency.flow_samplers import flow_jumps
from consistency.networks.layers import two_times
from consistency.networks.song import SongUNet
from consistency.objectives import MeanFlowObjective
from consistency.preconditioning import RectifiedFlow, Unscaled
from consistency.solvers import euler_step
from consistency.steps import FlowVelocity, SelfGuidance, TeacherVelocity, Velocity
from consistency.tensors import (
    NO_CLASS,
    AverageVelocity,
    Data,
    Label,
    PerSample,
    Time,
    broadcast_time,
)
from consistency.training.callbacks.ema import EvaluationEMA
from golden_harness import Archive, Tolerance, read_json, read_safetensors
from golden_networks import NVLABS, nvlabs_arguments

PRECISIONS = ((torch.float32, ""), (torch.float64, ".f64"))
LOWEST = math.log(1e-6) * NVLABS
"""FastGen's floor of c_noise."""


@dataclass(frozen=True)
class Bounds:
    """Section L4 of the golden README: of times, values, derivatives, losses and gradients, in one precision."""

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


class Toy(nn.Module):
    """The toy network of the golden README, section L2; `second_time` as in our networks."""

    no_class = NO_CLASS

    def __init__(self, path: Path, second_time: Any = None, *, lowest: float = -math.inf) -> None:
        super().__init__()
        self.second_time, self.lowest = second_time, lowest
        weights = read_safetensors(path)
        listed = read_json(path.with_name("nets.json"))["toys"][path.stem].get("parameters")
        if listed is not None:  # an average has those of its network
            weights = {name: weights[name] for name, _ in listed}
        self.num_classes = weights["label.weight"].shape[1] if "label.weight" in weights else None
        for name in dict.fromkeys(key.split(".")[0] for key in weights):
            self.add_module(name, nn.Module())
        for key, value in weights.items():
            name, kind = key.split(".")
            self.get_submodule(name).register_parameter(kind, nn.Parameter(value))

    def forward(
        self, x: Data, c_noise: Time, label: Label = None, *, r: Time | None = None
    ) -> Data:
        def features(c: Time) -> Tensor:
            c = c.clamp(min=self.lowest)
            return torch.stack([c, (3 * c).sin(), (3 * c).cos()], dim=1)

        p = dict(self.named_parameters())
        e = two_times(features, c_noise, r, self.second_time) @ p["time.weight"].T + p["time.bias"]
        if label is not None and self.num_classes is not None:
            row = functional.one_hot(label.clamp(min=0), self.num_classes) * (label >= 0)[:, None]
            e = e + row.to(x.dtype) @ p["label.weight"].T
        h = functional.conv2d(x, p["conv_in.weight"], p["conv_in.bias"], padding=1)
        h = (h + e[:, :, None, None]).tanh()
        return functional.conv2d(h, p["conv_out.weight"], p["conv_out.bias"]) + 0.3 * x

    def gradient(self) -> Tensor:
        """The gradients of all parameters in the order of nets.json, joined; zeros of those that take no part."""
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters())
        return torch.cat([grad.flatten() for grad in grads])


def song(path: Path) -> SongUNet:
    """EDM's SongUNet of two times, whose q, k and v are contiguous thirds in the file."""
    given = dict(read_json(path.with_name("nets.json"))["real"]["meanflow_song"]["kwargs"])
    channels = (given.pop("in_channels"), given.pop("out_channels"))
    assert channels[0] == channels[1]
    arguments = {"model_type": "SongUNet", "img_channels": channels[0], "label_dim": 0} | given
    network = SongUNet(**nvlabs_arguments(arguments), second_time="gap")
    weights = read_safetensors(path)
    for name, value in weights.items():
        if ".qkv." in name:
            weights[name] = value.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)
    network.load_state_dict(weights, strict=False)
    assert set(weights) == {name for name, _ in network.named_parameters()} | (
        set(weights) & {name for name, _ in network.named_buffers()}
    )
    return network


class Seen:
    """A derivative that keeps what it is given and returns; `warmup` multiplies du/dt."""

    def __init__(self, derivative: Derivative, warmup: float = 1.0) -> None:
        self.derivative, self.warmup = derivative, warmup

    def __call__(
        self, average: AverageVelocity, x_t: Data, t: Time, r: Time, v: Data, label: Label
    ) -> tuple[Data, Data]:
        self.u, self.du = self.derivative(average, x_t, t, r, v, label)
        self.v, self.label = v, label
        return self.u, self.warmup * self.du


class Kept(nn.Module):
    """A distance that keeps its second argument."""

    def __init__(self, distance: Distance) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, x: Data, y: Data) -> PerSample:
        self.y = y
        return self.distance(x, y)


@dataclass
class Case:
    """One case of a file in one precision, and the results of our loss."""

    archive: Archive
    name: str
    dtype: torch.dtype
    suffix: str

    def given(self, field: str) -> Tensor:
        value = self.archive.tensor(f"{self.name}.{field}")
        return value.to(self.dtype) if value.is_floating_point() else value

    def has(self, field: str) -> bool:
        return f"{self.name}.{field}" in self.archive

    def compare(self, field: str, ours: Tensor, tolerance: Tolerance) -> None:
        """Compare the array of this precision, if the file has it; image-shaped ones are kept in float32 alone."""
        array = f"{self.name}.{field}{self.suffix}"
        if array in self.archive:
            self.archive.compare(array, ours, tolerance)

    def run(
        self, objective: MeanFlowObjective, network: nn.Module, t: Time, r: Time, label: Label
    ) -> PerSample:
        """The losses, after their backward pass."""
        x_0, z = self.given("real"), self.given("e_draw")
        dropped = torch.zeros(len(x_0), dtype=torch.bool)
        if self.has("drop_draw"):
            dropped = objective.dropped(self.given("drop_draw"))
        network.zero_grad()
        online = Denoiser(network, Unscaled())
        losses = objective.losses_at(online, x_0, label, t, r, dropped, z).loss
        losses.mean().backward()
        return losses.detach()


def velocity_objective(
    pairs: LogitNormalPairs,
    distance: Distance,
    derivative: Derivative | None = None,
    velocity: Velocity | None = None,
    *,
    guidance: SelfGuidance | None = None,
    label_dropout: float = 0.0,
    warmup: float = 1.0,
) -> tuple[MeanFlowObjective, Seen, Kept]:
    seen, kept = Seen(derivative or ExactDerivative(), warmup), Kept(distance)
    velocity = velocity or FlowVelocity()
    objective = MeanFlowObjective(
        pairs=pairs,
        velocity=velocity,
        derivative=seen,
        distance=kept,
        guidance=guidance,
        label_dropout=label_dropout,
    )
    return objective, seen, kept


# --------------------------------------------------------------------------------------- JAX


def compare_jax(archive: Archive) -> None:
    """Losses with and without guidance, and jumps."""
    for name, case in read_json(archive.path.with_suffix(".json"))["cases"].items():
        for dtype, suffix in PRECISIONS:
            network = Toy(archive.path.with_name(f"{case['student']}.safetensors"), "gap")
            part = Case(archive, name, dtype, suffix)
            if "t_steps" in case:
                compare_jumps(part, network.to(dtype))
            else:
                compare_jax_loss(part, network.to(dtype), case)


def compare_jax_loss(part: Case, network: Toy, case: dict[str, Any]) -> None:
    mean, std = case["P_mean"], case["P_std"]
    pairs = FirstPairs(
        mean_t=mean, std_t=std, mean_r=mean, std_r=std, equal=case["data_proportion"]
    )
    draws = (part.given("t_draw"), part.given("r_draw"))
    uniform = {"uniform": True, "logit_normal": False}[case["noise_dist"]]
    t, r = pairs.arranged(*draws, draws[0]) if uniform else pairs.at(*draws, draws[0])
    guidance = None
    if {"cfg": True, "": False}[case["guidance_eq"]]:
        span = {"t_start": case["t_start"], "t_end": case["t_end"]}
        guidance = SelfGuidance(w=case["omega"], k=case["kappa"], **span)
    distance = Adaptive(p=case["norm_p"], c=case["norm_eps"])
    dropout = case["class_dropout_prob"]
    objective, seen, kept = velocity_objective(
        pairs, distance, guidance=guidance, label_dropout=dropout
    )
    known = network.num_classes is not None
    label = part.given("label")
    losses = part.run(objective, network, t, r, label if known else None)
    near = bounds(part.suffix)
    used = label if seen.label is None else seen.label
    part.compare("label_used", torch.where(used < 0, case["null_class"], used), Tolerance())
    compare_parts(part, near, t, r, v_guided=seen.v, u=seen.u, dudt=seen.du, u_tgt=kept.y)
    compare_loss(part, near, losses, kept.y, seen.u, network)


def compare_parts(part: Case, near: Bounds, t: Time, r: Time, **values: Tensor) -> None:
    part.compare("t", t, near.time)
    part.compare("r", r, near.time)
    for field, value in values.items():
        part.compare(field, value, near.derivative if field == "dudt" else near.value)


def compare_loss(
    part: Case, near: Bounds, losses: PerSample, target: Data, u: Data, network: nn.Module
) -> None:
    s = (u - target).detach().square().sum(dim=(1, 2, 3))
    part.compare("sq_error", s, near.loss)
    part.compare("adp_wt", s / losses, near.loss)
    part.compare("loss_mean", losses.mean(), near.loss)
    if isinstance(network, Toy):
        part.compare("grad", network.gradient(), near.gradient)


@torch.no_grad()
def compare_jumps(part: Case, network: Toy) -> None:
    if part.suffix:
        return
    times = part.given("t_steps").tolist()
    e, label = part.given("e"), part.given("label")
    denoise = Denoiser(network, RectifiedFlow())
    sample = flow_jumps(denoise, lambda: e, label, times=times[:-1], t_max=times[0])
    part.archive.compare(f"{part.name}.sample", sample, Tolerance(of_norm=2e-5))


# --------------------------------------------------------------------------------------- PyTorch


def compare_torch(archive: Archive) -> None:
    """Losses of both laws of times, of a network too; laws, averages, one jump."""
    for name, case in read_json(archive.path.with_suffix(".json"))["cases"].items():
        if "period" in case:
            compare_averages(archive, name, case)
            continue
        for dtype, suffix in PRECISIONS:
            part = Case(archive, name, dtype, suffix)
            if "tr_sampler" in case:
                t, r = released_pairs(case).at(*map(part.given, ("t_draw", "r_draw", "mix_draw")))
                compare_parts(part, bounds(suffix), t, r)
            elif "args" in case:
                compare_torch_loss(part, case)
            elif not suffix:
                compare_one_jump(part, case)


def released_pairs(args: dict[str, Any]) -> LogitNormalPairs:
    kind = {"v0": LogitNormalPairs, "v1": CappedPairs}[args["tr_sampler"]]
    law = {f"{a}_{x}": args[f"P_{a}_{x}"] for a in ("mean", "std") for x in "tr"}
    return kind(**law, equal=1 - args["ratio"])


def compare_torch_loss(part: Case, case: dict[str, Any]) -> None:
    args, folder = case["args"], part.archive.path
    assert case["second_time"] == "h = t - r"
    network: nn.Module = (
        Toy(folder.with_name(f"{case['net']}.safetensors"), "gap")
        if isinstance(case["net"], str)
        else song(folder.with_name("meanflow_song.safetensors"))
    )
    network, near, pairs = network.to(part.dtype), bounds(part.suffix), released_pairs(args)
    if not isinstance(network, Toy):
        near = Bounds(near.time, *[Tolerance(of_norm=1e-7 if part.suffix else 1e-4)] * 4)
    distance = Adaptive(p=args["norm_p"], c=args["norm_eps"])
    objective, seen, kept = velocity_objective(pairs, distance)
    t, r = pairs.at(*map(part.given, ("t_draw", "r_draw", "mix_draw")))
    losses = part.run(objective, network, t, r, None)
    compare_parts(part, near, t, r, u_pred=seen.u, dudt=seen.du, u_tgt=kept.y)
    compare_loss(part, near, losses, kept.y, seen.u, network)
    if part.has("param_names"):
        gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        if not part.suffix:
            part.archive.compare_names(f"{part.name}.param_names", [*gradients])
        names = [str(name) for name in part.archive.arrays[f"{part.name}.param_names"]]
        norms = torch.stack([gradients[name].norm() for name in names])
        # Biases of attention keys have no gradient but rounding.
        small = Tolerance(of_each=1e-3, of_largest=1e-5)
        part.compare("grad_l2_all", norms, small if not part.suffix else near.gradient)
        for array in part.archive.matching(f"{part.name}.grad.*"):
            field = array.removeprefix(f"{part.name}.").removesuffix(".f64")
            part.compare(field, gradients[field.removeprefix("grad.")], near.gradient)


@torch.no_grad()
def compare_one_jump(part: Case, case: dict[str, Any]) -> None:
    network = Toy(part.archive.path.with_name(f"{case['net']}.safetensors"), "gap")
    t, e = case["t"], part.given("e_draw")
    t, r = (e.new_full((len(e),), time) for time in (t, t - case["h"]))
    denoise = partial(Denoiser(network, RectifiedFlow()), r=r)
    sample = euler_step(denoise, e, t, r)
    part.archive.compare(f"{part.name}.sample", sample, Tolerance(of_norm=2e-5))


def compare_averages(archive: Archive, name: str, case: dict[str, Any]) -> None:
    """The averages after every update, in float32 storage."""
    weights, decays = archive.tensor(f"{name}.weights"), case["decays"]
    ema = EvaluationEMA(decays=decays, every=case["period"], in_double=True)
    for decay in decays:
        online, average, rows = nn.Linear(weights.shape[1], 1, bias=False), nn.Module(), []
        average.weight = nn.Parameter(weights[:1].clone())
        update = averaging(average, online, in_double=True)
        for k in range(len(weights) - 1):
            online.weight.data = weights[k + 1 : k + 2].clone()
            update = averaging(average, online, in_double=True)
            update(ema.decays_at(k)[str(decay)])
            rows.append(average.weight.detach().clone())
        archive.compare(f"{name}.average_{decay}", torch.cat(rows), Tolerance(of_norm=1e-7))


# --------------------------------------------------------------------------------------- FastGen


def compare_fastgen(archive: Archive) -> None:
    """Both forms of the loss, both derivatives, guidance, distillation."""
    for name, case in read_json(archive.path.with_suffix(".json"))["cases"].items():
        if case["net"]["drop_precond"] is None:
            # MeanFlow around an EDM network, which no run of any paper has; its samples with r = t keep a derivative.
            archive.read.update(archive.matching(f"{name}.*"))
            continue
        for dtype, suffix in PRECISIONS:
            compare_fastgen_loss(Case(archive, name, dtype, suffix), case)


def fastgen_pairs(case: dict[str, Any]) -> CountedPairs:
    t, r = case["sample_t_cfg"], case["sample_r_cfg"]
    assert t["time_dist_type"] == "logitnormal"
    assert t["min_t"] == 0
    r = r if r["enabled"] else t
    return CountedPairs(
        mean_t=t["train_p_mean"],
        std_t=t["train_p_std"],
        mean_r=r["train_p_mean"],
        std_r=r["train_p_std"],
        equal=1 - t["r_sample_ratio"],
        t_max=t["max_t"],
    )


def fastgen_guidance(case: dict[str, Any]) -> SelfGuidance | None:
    w, k, span = case["guidance_scale"], case["guidance_mixture_ratio"], {}
    if case["cond_dropout_prob"] is None or (w is None and k is None):
        return None
    span = {"t_start": case["guidance_t_start"], "t_end": case["guidance_t_end"]}
    w, k = (float(np.float32(x)) for x in (1.0 if w is None else w, k or 0.0))
    return SelfGuidance(w=w, k=k, **span)


def fastgen_velocity(part: Case, case: dict[str, Any]) -> Velocity | None:
    """The teacher's, guided inside of an interval."""
    if not case["loss_config"]["use_cd"]:
        return None
    network = Toy(part.archive.path.with_name(f"{case['teacher']}.safetensors")).to(part.dtype)
    teacher = Denoiser(network, RectifiedFlow())
    plain = TeacherVelocity(teacher=teacher)
    if case["guidance_scale"] is None:
        return plain
    guided = TeacherVelocity(teacher=teacher, guidance=float(np.float32(case["guidance_scale"])))

    def velocity(x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data:
        inside = (t >= case["guidance_t_start"]) & (t <= case["guidance_t_end"])
        parts = (v(x_0, z, x_t, t, label) for v in (guided, plain))
        return torch.where(broadcast_time(inside, x_t), *parts)

    return velocity


def compare_fastgen_loss(part: Case, case: dict[str, Any]) -> None:
    config, steps = case["loss_config"], case["loss_config"]["tangent_warmup_steps"]
    k = int(part.archive.number(f"{part.name}.iteration"))
    warmup = min(1.0, k / steps) if steps else 1.0
    part.compare("warmup", torch.tensor(warmup), Tolerance(of_each=1e-6))
    kind, *numbers = config["norm_method"].split("_")
    step = {"opt_grad": True, "l2": False}[config["loss_type"]]
    p, c = (float(numbers[0]) if kind == "poly" else 0.0), config["norm_const"]
    scaled = config["tangent_spatial_invariance"]
    distance = AdaptiveStep(p=p, c=c, per_root_dimension=scaled) if step else Adaptive(p=p, c=c)
    pairs, difference = fastgen_pairs(case), config["use_jvp_finite_diff"]
    e = FiniteDifference(e=config["jvp_finite_diff_eps"], t_max=pairs.t_max)
    teacher = fastgen_velocity(part, case)
    objective, seen, kept = velocity_objective(
        pairs,
        distance,
        e if difference else None,
        teacher,
        guidance=None if teacher else fastgen_guidance(case),
        label_dropout=case["cond_dropout_prob"] or 0.0,
        warmup=warmup if step else 1.0,
    )
    path = part.archive.path.with_name(f"{case['student']}.safetensors")
    network = Toy(path, "end").to(part.dtype)
    t, r = pairs.at(*map(part.given, ("t_draw", "r_draw", "mix_draw")))
    label = part.given("condition").argmax(1) if part.has("condition") else None
    losses, near = (
        part.run(objective, network, t, r, label),
        bounds(part.suffix, differences=difference),
    )
    if teacher is not None and not part.suffix:
        near = Bounds(near.time, *[Tolerance(of_norm=1e-4)] * 4)  # (x - D) / t in float32
    compare_parts(part, near, t, r, dxt_dt=seen.v, u_theta=seen.u)
    part.compare("delta_t", t - r, near.time)
    part.compare("u_theta_jvp", seen.du, near.derivative)
    if difference:
        after, before = e.ends(t, r)
        ends = {"fd_t_plus": after, "fd_t_minus": before}
        for field, value in (ends | {"fd_norm_factor": 1 / (after - before)}).items():
            part.compare(field, value, Tolerance(of_norm=1e-9 if part.suffix else 1e-3))
    if part.has("condition_used"):
        assert seen.label is not None
        rows = functional.one_hot(seen.label.clamp(min=0), network.num_classes or 0)
        part.compare("condition_used", rows * (seen.label >= 0)[:, None], Tolerance())
        part.archive.read.add(f"{part.name}.neg_condition")
    tangent = (kept.y - seen.u).detach()
    tangent = tangent / tangent[0].numel() ** 0.5 if step and scaled else tangent
    size = tangent.square().sum(dim=(1, 2, 3))
    part.compare("tangent", tangent if step else kept.y, near.value)
    if kind != "poly":
        # FastGen's exponential weight, of no run.
        for field in ("weight", "loss", "loss_mean", "grad"):
            part.archive.read.update(part.archive.matching(f"{part.name}.{field}*"))
        return
    part.compare("weight", losses.div(size).sqrt() if step else losses / size, near.loss)
    part.compare("loss", losses, near.loss)
    part.compare("loss_mean", losses.mean(), near.loss)
    part.compare("grad", network.gradient(), near.gradient)
