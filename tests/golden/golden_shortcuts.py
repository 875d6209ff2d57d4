"""Comparisons of alpha-Flow and shortcut models with their released codes: losses, targets and gradients in both precisions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.denoiser import Denoiser
from consistency.derivatives import ExactDerivative
from consistency.distances import L2, Adaptive
from consistency.flow_pairs import CappedPairs, FirstPairs, HalvedPairs, SinglePairs
from consistency.networks.layers import told
from consistency.preconditioning import Unscaled
from consistency.processes import rectified_flow
from consistency.schedules import constant_share, falling_sigmoid
from consistency.shortcuts import AlphaFlowObjective, ShortcutObjective
from consistency.steps import FlowVelocity, SelfGuidance
from consistency.tensors import AverageVelocity, Data, Label, PerSample, Time
from golden_harness import Archive, Tolerance, read_json
from golden_later import Masked, Toy, bounds
from golden_meanflow import PRECISIONS, Case, Kept

# --------------------------------------------------------------------------------------- alpha-Flow


class CappedFirstPairs(FirstPairs):
    """t of one draw and r = min(t, r), the law `min`."""

    arranged = CappedPairs.arranged


LAWS = {"minmax": SinglePairs, "min": CappedFirstPairs}


def schedule(settings: dict[str, Any]) -> Callable[[int], float]:
    """alpha of a step, before it is clamped where it is constant."""
    assert settings["up_clamp_value"] is None
    ends = settings["initial_value"], settings["end_value"]
    if {"constant": True, "sigmoid": False}[settings["scheduler"]]:
        return lambda k: constant_share(k, alpha=ends[0])
    assert ends == (1.0, 0.0)
    span = {
        f"{end}_steps": settings[f"change_{name}_steps"]
        for end, name in (("start", "init"), ("end", "end"))
    }
    return lambda k: falling_sigmoid(
        k, **span, gamma=settings["gamma"], clamp=settings["clamp_value"]
    )


def compare_alphaflow(archive: Archive) -> None:
    for name, case in read_json(archive.path.with_suffix(".json"))["cases"].items():
        if name.startswith("curriculum."):
            ours = [schedule(case)(k) for k in archive.tensor("curriculum.step").tolist()]
            archive.compare(
                name, torch.tensor(ours, dtype=torch.float64), Tolerance(absolute=1e-12)
            )
            continue
        for dtype, suffix in PRECISIONS:
            compare_alphaflow_loss(Case(archive, name, dtype, suffix), case)


@dataclass(frozen=True, kw_only=True)
class Watched(SelfGuidance):
    """Guidance that keeps v~ and the labels it is given in `seen`."""

    seen: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, average: AverageVelocity, x_t: Data, t: Time, v: Data, label: Label) -> Data:
        assert label is not None
        guided = super().__call__(average, x_t, t, v, label)
        self.seen.update(v=guided, label=label)
        return guided


class Reordered(Kept):
    """A distance to the targets in the order of the released code, which joins those of flow matching before the others."""

    def __init__(self, distance: Adaptive, order: Tensor) -> None:
        super().__init__(distance)
        self.order = order

    def forward(self, x: Data, y: Data) -> PerSample:
        self.u = x.detach()
        return super().forward(x, y[self.order])


def times_of(part: Case, case: dict[str, Any]) -> tuple[Time, Time]:
    """(t, r) of the draws: one for a pair with r = t, two for each other."""
    law = case["law"]
    assert law["timestep_distrib_type"] == "logit_norm"
    of_both = {
        f"{n}_{x}": law[key] for n, key in (("mean", "location"), ("std", "scale")) for x in "tr"
    }
    pairs = LAWS[case["pair"]](**of_both, equal=case["ratio_fm"], t_max=1 - law["eps"])
    single, first, second = (part.given(f"{name}_draw") for name in ("t_fm", "t1", "t2"))
    n_t, n_r = torch.cat([single, first]), torch.cat([torch.zeros_like(single), second])
    return pairs.at(n_t, n_r, n_t)


def compare_alphaflow_loss(part: Case, case: dict[str, Any]) -> None:
    settings, near = case["alpha"], bounds(part.suffix)
    alpha = schedule(settings)(case["cur_step"])
    part.compare("alpha", torch.tensor(alpha, dtype=torch.float64), Tolerance(absolute=1e-12))
    t, r = times_of(part, case)
    for name, value in (("t", t), ("r", r), ("dt", alpha * (t - r))):
        part.compare(name, value, near.time)
    ends = {"t_start": case["t_min"], "t_end": case["t_max"]}
    watched = Watched(w=case["omega"], k=case["kappa"], **ends)
    first = (r == t) | torch.tensor(alpha == 0)
    order = torch.cat([first.nonzero()[:, 0], (~first).nonzero()[:, 0]])
    c = case["adaptive_loss_weight_eps"]
    kept = Reordered(Adaptive(p=1.0, c=c, per_dimension=True), order)
    objective = AlphaFlowObjective(
        pairs=SinglePairs(mean_t=0, std_t=1, mean_r=0, std_r=1, equal=0),
        velocity=FlowVelocity(),
        derivative=ExactDerivative(),
        distance=kept,
        clip=case["clamp_utgt"],
        guidance=watched,
        label_dropout=case["label_dropout"],
    )
    path = part.archive.path.with_name(f"{case['student']}.safetensors")
    network = Toy(path, "end").to(part.dtype)
    x_0, z, rows = (part.given(name) for name in ("real", "e_draw", "label"))
    dropped = torch.zeros(len(x_0), dtype=torch.bool)
    if part.has("drop_draw"):
        dropped = part.given("drop_draw") < case["label_dropout"]
    online = Denoiser(network, Unscaled())
    losses = objective.losses_at(online, x_0, rows.argmax(1), t, r, dropped, alpha, z).loss
    weight = torch.where(first, torch.ones_like(t), alpha)
    losses = losses / weight * weight[order]  # the weights are joined in that order too
    losses.mean().backward()
    part.compare("label_used", rows * (watched.seen["label"] >= 0)[:, None], Tolerance())
    for name, value in (
        ("velocity_cfg", watched.seen["v"]),
        ("u_target", kept.y),
        ("u_pred", kept.u),
    ):
        part.compare(name, value, near.value)
    mean = (kept.u - kept.y).square().mean(dim=(1, 2, 3))
    part.compare("sq_error_mean", mean, near.loss)
    part.compare("weight", losses / mean, near.loss)
    part.compare("loss", losses, near.loss)
    part.compare("loss_mean", losses.mean(), near.loss)
    part.compare("grad", network.gradient(), near.gradient)


def compare_dropout(path: Path) -> int:
    """The masks of alpha-Flow: as released without `shared_dropout`, and one for all passes with it."""
    found = {n: m for n, m in read_json(path)["masks"].items() if "alpha-Flow" in n}
    for name, masks in found.items():
        for shared in (False, True):
            objective = AlphaFlowObjective(
                pairs=SinglePairs(mean_t=0, std_t=1, mean_r=0, std_r=1, equal=0.25),
                velocity=FlowVelocity(),
                derivative=ExactDerivative(),
                distance=L2(),
                clip=4.0,
                shared_dropout=shared,
            )
            network = Masked([]).train()
            t, r = objective.pairs(8, 0, torch.Generator().manual_seed(0))
            x_0, nobody = torch.zeros(8, 3, 4, 4), torch.zeros(8, dtype=torch.bool)
            alpha, z = float(name.rpartition("= ")[2]), torch.randn(8, 3, 4, 4)
            online = Denoiser(network, Unscaled())
            objective.losses_at(online, x_0, None, t, r, nobody, alpha, z)
            same = [torch.equal(mask, network.masks[0]) for mask in network.masks]
            assert same == [shared or mask == masks[0] for mask in masks], name
    return len(found)


# --------------------------------------------------------------------------------------- shortcut models

LEAST_NOISE = 1e-5
"""Of the released path (1 - (1 - 1e-5) t) e + t x, which is ours for the images x + 1e-5 e."""


class Backwards(torch.nn.Module):
    """A toy network of the released convention, whose time is 1 - t and whose velocity is -u, told the halvings."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy

    def forward(self, x: Data, c_noise: Time, label: Label = None, *, r: Time) -> Data:
        return -self.toy(x, 1 - c_noise, label, r=told(c_noise, r, "halvings"))


def compare_shortcut(archive: Archive) -> None:
    for name, case in read_json(archive.path.with_suffix(".json"))["cases"].items():
        assert (case["second_time"], case["bootstrap_dt_bias"]) == ("dt_base / 7", 0)
        for dtype, suffix in PRECISIONS:
            compare_shortcut_loss(Case(archive, name, dtype, suffix), case)


def compare_shortcut_loss(part: Case, case: dict[str, Any]) -> None:
    student, average = (
        Toy(part.archive.path.with_name(f"{case[key]}.safetensors"), "end").to(part.dtype)
        for key in ("student", "ema")
    )
    online, ema = (Denoiser(Backwards(toy), Unscaled()) for toy in (student, average))
    kept, near = Kept(L2()), bounds(part.suffix)
    pairs = HalvedPairs(bootstrap=1 / case["bootstrap_every"], steps=case["denoise_timesteps"])
    objective = ShortcutObjective(
        pairs=pairs,
        velocity=FlowVelocity(),
        distance=kept,
        clip=4.0,
        guidance=case["cfg_scale"] if case["bootstrap_cfg"] else 1.0,
        label_dropout=case["class_dropout_prob"],
    )
    long = case["batch_size"] // case["bootstrap_every"]
    others = slice(case["batch_size"] - long)  # the last images of a released batch are never used

    def joined(first: str, second: str) -> Tensor:
        return torch.cat([part.given(first)[:long], part.given(second)[others]])

    x_0, label = joined("real", "real"), joined("label", "label")
    z, u = joined("bootstrap_e_draw", "flow_e_draw"), joined("bootstrap_t_draw", "flow_t_draw")
    t, r = pairs.at(u)
    x_0 = x_0 + LEAST_NOISE * z
    keeps = torch.full((long,), fill_value=False)
    dropped = torch.cat([keeps, part.given("drop_draw")[others] < case["class_dropout_prob"]])
    target = ema if case["bootstrap_ema"] else online
    losses = objective.losses_at(online, target, x_0, label, t, r, range(long), dropped, z).loss
    losses.mean().backward()
    part.compare("t", 1 - t, near.time)
    part.compare("dt_base", -(t - r).log2(), near.time)
    part.compare("label_used", torch.where(dropped, case["num_classes"], label), Tolerance())
    part.compare("x_t", rectified_flow(x_0, z, t), near.value)
    part.compare("v_target", -kept.y, near.value)
    part.compare("mse", losses, near.loss)
    part.compare("loss_mean", losses.mean(), near.loss)
    part.compare("grad", student.gradient(), near.gradient)
