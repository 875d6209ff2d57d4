"""Comparisons with FastGen's consistency tuning and truncated consistency models, and with the code of the latter's authors."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consistency import schedules
from consistency.denoiser import Denoiser
from consistency.objectives import ConsistencyObjective, TruncatedObjective
from consistency.pairs import (
    LognormalTimes,
    RatioPairs,
    TruncatedTimes,
)
from consistency.processes import variance_exploding
from consistency.solvers import euler_step
from consistency.steps import DataStep, Step, TeacherStep
from consistency.tensors import Data, broadcast_time
from consistency.weightings import (
    inverse_gap,
)
from golden_harness import Archive, Tolerance, require_known
from golden_later import (
    FASTGEN,
    FASTGEN_SHIFT,
    GRADIENT,
    GRADIENT_FLOAT64,
    LOSS,
    LOSS_FLOAT64,
    OUTPUT,
    T_MAX,
    TCM,
    TIME,
    Case,
    cases_of,
    denoiser,
    distance_of,
    fastgen_law,
    pairs_at,
    tcm_law,
    weighting,
)

# ------------------------------------------------------------------------ FastGen


LOSS_CONFIG = {"use_cd", "huber_const", "use_squared_l2", "weighting_ct_loss"}


class FastGen(NamedTuple):
    """What a case of FastGen's is made of."""

    case: Case
    config: dict[str, Any]

    def online(self, name: str) -> Denoiser:
        return denoiser(self.case.archive, self.config[name], self.config["net"]["sigma_data"])

    def step(self) -> Step:
        if not self.config["loss_config"]["use_cd"]:
            return DataStep()
        guidance = self.config["guidance_scale"] or 1.0
        return TeacherStep(teacher=self.online("teacher"), solver=euler_step, guidance=guidance)

    def pairs(self) -> RatioPairs:
        config = self.config["sample_t_cfg"]
        floors = FASTGEN | {"r_min": max(FASTGEN["r_min"], config["min_r"])}
        return pairs_at(fastgen_law(config), floors)

    def parts(self) -> dict[str, Any]:
        loss = self.config["loss_config"]
        require_known(loss, LOSS_CONFIG, self.case.name)
        sigma_data = self.config["net"]["sigma_data"]
        return {
            "pairs": self.pairs(),
            "step": self.step(),
            "distance": distance_of(loss["huber_const"], squared=loss["use_squared_l2"]),
            "weighting": weighting(loss["weighting_ct_loss"], sigma_data),
        }

    def scales(self) -> float:
        """N of the case's ratio 1 - 1/N."""
        return 1 / (1 - float(self.case.input("ratio")))


def compare_fastgen_cm(archive: Archive) -> None:
    """ECT as FastGen runs it, with its weightings, distillation and guidance."""
    for name, config in cases_of(archive).items():
        run = FastGen(case := Case(archive, name), config)
        parts = run.parts()
        x_0, z, label = case.input("real"), case.input("eps_draw"), case.label()
        if config["sample_t_cfg"]["quantize"]:  # to the grid of 1,000 points: no option of ours
            archive.read.update(map(case, ("u_draw", "t.f64", "r.f64", "ratio")))
            t, r = case.input("t"), case.input("r")
        else:
            given = case.has("t_given")
            t = case.input("t_given") if given else parts["pairs"].times.at(case.input("u_draw"))
            t, r = parts["pairs"].at(t, run.scales())
            case.compare_times(t, r)
        if case.has("neg_condition"):
            assert not case.input("neg_condition").any()
        online = run.online("student")
        x_t = variance_exploding(x_0, z, t)
        x_r = parts["step"](x_0, z, x_t, t, r, label)
        estimate, reference = online(x_t, t, label), online(x_r, r, label)
        case.compare_outputs(y_r=x_r, D_yt=estimate, D_yr=reference)
        losses = ConsistencyObjective(**parts).losses_at(online, online, x_0, label, t, r, z).loss
        fields = {"loss": losses, "loss_mean": losses.mean()}
        fields["loss_unweighted"] = parts["distance"](estimate, reference)
        case.compare_run(online.network, losses.mean(), fields, float((t - r).min()))


def boundary_of(case: Case, share: float) -> Tensor:
    """The samples at t': the first int(B share) of a permutation, or those with draws below the share."""
    if case.has("permutation_draw"):
        order = case.input("permutation_draw")
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[: int(len(order) * share)]] = True
    else:
        mask = case.input("boundary_u_draw") < share
    case.archive.compare(case("boundary_mask"), mask, Tolerance())
    return mask


def compare_fastgen_tcm(archive: Archive) -> None:
    """The second stage as FastGen runs it."""
    for name, config in cases_of(archive).items():
        run = FastGen(case := Case(archive, name), config)
        online, first_stage = run.online("student"), run.online("stage1")
        objective = TruncatedObjective(
            first_stage=first_stage,
            t_split=config["transition_t"],
            boundary_share=config["boundary_prob"],
            boundary_weight=config["w_boundary"],
            **run.parts(),
        )
        boundary = boundary_of(case, config["boundary_prob"])
        t = objective.pairs.times.at(case.input("u_draw"))  # type: ignore[attr-defined]
        t = torch.where(boundary, config["transition_t"] + FASTGEN_SHIFT, t)
        t, r = objective.pairs.at(t, run.scales())
        case.compare_times(t, r)
        x_0, z, label = case.input("real"), case.input("eps_draw"), case.label()
        estimate, reference = compare_passes(case, objective, online, (x_0, z, t, r, label))
        weight = objective.weights(boundary, t)
        losses = objective.losses_at(online, online, x_0, label, t, r, weight, z).loss
        single = objective.losses_at(online, online, x_0, label, t, r, torch.ones_like(t), z).loss
        fields = {
            "loss": single,
            "loss_unweighted": objective.consistency.distance(estimate, reference),
            "loss_inner": single[~boundary].mean(),
        }
        total = losses.mean()
        if boundary.any():
            fields |= {"loss_mean": total, "loss_boundary": single[boundary].mean()}
            case.compare_run(online.network, total, fields, float((t - r).min()))
        else:  # FastGen's mean over no sample is NaN, and so are its loss and gradient
            for field in ("loss_mean", "loss_boundary", "grad"):
                archive.read.update(name for name in (case(field), case(f"{field}.f64")))
            for field, ours in fields.items():
                case.compare(field, ours, LOSS, LOSS_FLOAT64)
            assert total.isfinite()
        none = [p.grad for p in first_stage.parameters() if p.grad is not None]
        case.compare("grad_stage1_absmax", torch.tensor(len(none)), Tolerance(), Tolerance())


def compare_passes(
    case: Case, objective: TruncatedObjective, online: Denoiser, inputs: tuple[Any, ...]
) -> tuple[Data, Data]:
    """Estimate at t and target at r, compared."""
    x_0, z, t, r, label = inputs
    x_r = variance_exploding(x_0, z, r)
    estimate = online(variance_exploding(x_0, z, t), t, label)
    reference = objective.split(online, x_r, r, label)
    if case.has("y_r"):  # of the authors' code
        case.compare_outputs(y_r=x_r)
    case.compare_outputs(D_yt=estimate, D_yr=reference)
    return estimate, reference


# ------------------------------------------------------------------------ the authors' code, ECT beside the others


TCM_LOSS = {"P_mean", "P_std", "t_lower", "c", "q", "ratio_limit", "weighting", "boundary_prob", "tdist", "df", "sqrt"}  # fmt: skip


def compare_tcm(archive: Archive) -> None:
    """Both stages, the map t -> r and the laws of t."""
    for name, config in cases_of(archive).items():
        if "loss" in config:
            case = Case(archive, name)
            require_known(config["loss"], TCM_LOSS, name)
            ratio = 1 - 1 / limited_power(config)
            assert math.isclose(ratio, config["ratio"]), name
            (compare_second_stage if config["stage1"] else compare_first_stage)(case, config)
    pairs = pairs_at(LognormalTimes(p_mean=0.0, p_std=1.0), TCM)
    for name in archive.matching("map.dt_ratio_*"):
        t, ratio = archive.tensor("map.t"), float(name.rpartition("_")[2])
        archive.compare(name, t - pairs.ratio_map(t, 1 / (1 - ratio)), Tolerance(of_largest=1e-10))
    for name in archive.matching("law.log_t_*"):
        law = tcm_law(law_arguments(archive, name))
        ours = law.at(archive.tensor("law.u")).log()
        archive.compare(name, ours, Tolerance(of_each=1e-8, absolute=1e-12))


def limited_power(config: dict[str, Any]) -> float:
    """N of a case's stage, q^(stage + 1) with the limit of the ratio."""
    loss, stage = config["loss"], config["stage"]
    n = schedules.powers(stage, q=loss.get("q", 2), stages=stage + 1, total_steps=stage + 1)
    return 1 / max(1 / n, 1 - loss["ratio_limit"])


def law_arguments(archive: Archive, name: str) -> dict[str, Any]:
    """The arguments of a law as the loss takes them; those of the normal ones stand in a note."""
    laws, kind = cases_of(archive)["law"], name.removeprefix("law.log_t_")
    if kind.startswith("normal"):
        text = laws["normal"].partition(f"{kind.removeprefix('normal_')} (")[2]
        mean, std = text.partition(")")[0].split(", ")
        return {"P_mean": mean, "P_std": float(std)}
    law = laws[kind]
    assert law["upper"] == f"ln {T_MAX:g}"
    lower = float(law["lower"].removeprefix("ln "))
    return {"P_mean": law["mu"], "P_std": law["sigma"], "df": law["df"], "tdist": "t", "t_lower": lower}  # fmt: skip


def tcm_parts(case: Case, config: dict[str, Any], law: TruncatedTimes) -> dict[str, Any]:
    loss, sigma_data = config["loss"], config["sigma_data"]
    step: Step = DataStep()
    if config["teacher"]:
        teacher = denoiser(case.archive, config["teacher"], sigma_data)
        step = TeacherStep(teacher=teacher, solver=euler_step)
    return {
        "pairs": pairs_at(law, TCM),
        "step": step,
        "distance": distance_of(loss["c"], squared=not loss.get("sqrt", True)),
        "weighting": weighting(loss["weighting"], sigma_data),
    }


def compare_first_stage(case: Case, config: dict[str, Any]) -> None:
    law = tcm_law(config["loss"])
    parts = tcm_parts(case, config, law)
    t = case.input("t_given") if case.has("t_given") else law.at(case.input("u_draw"))
    t, r = parts["pairs"].at(t, limited_power(config))
    case.compare_times(t, r)
    case.compare("t_inner", t, TIME, TIME)
    online = denoiser(case.archive, config["student"], config["sigma_data"])
    x_0, z = case.input("real"), case.input("eps_draw")
    x_t = variance_exploding(x_0, z, t)
    x_r = parts["step"](x_0, z, x_t, t, r, None)
    estimate, reference = online(x_t, t), online(x_r, r)
    case.compare_outputs(y_r=x_r, D_yt=estimate, D_yr=reference)
    losses = ConsistencyObjective(**parts).losses_at(online, online, x_0, None, t, r, z).loss
    fields = {
        "loss_total": losses.mean(),
        "loss_inner": losses,
        "loss_unweighted_inner": parts["distance"](estimate, reference),
    }
    case.compare_run(online.network, losses.mean(), fields, float((t - r).min()))
    case.compare("loss_boundary", torch.zeros_like(losses), Tolerance(), Tolerance())


def compare_second_stage(case: Case, config: dict[str, Any]) -> None:
    loss, split = config["loss"], config["transition_t"]
    law = tcm_law(loss)
    objective = TruncatedObjective(
        first_stage=denoiser(case.archive, config["stage1"], config["sigma_data"]),
        t_split=split,
        boundary_share=loss["boundary_prob"],
        boundary_weight=config["w_boundary"],
        **tcm_parts(case, config, law),
    )
    online = denoiser(case.archive, config["student"], config["sigma_data"])
    boundary = boundary_of(case, loss["boundary_prob"])
    t = torch.where(boundary, split, law.at(case.input("u_draw")))
    t, r = objective.pairs.at(t, limited_power(config))
    case.compare_times(t, r)
    case.compare("t_inner", t[~boundary], TIME, TIME)
    x_0, z, label = case.input("real"), case.input("eps_draw"), case.label()
    estimate, reference = compare_passes(case, objective, online, (x_0, z, t, r, label))
    weight = objective.weights(boundary, t)
    losses = objective.losses_at(online, online, x_0, label, t, r, weight, z).loss
    single = objective.losses_at(online, online, x_0, label, t, r, torch.ones_like(t), z).loss
    if boundary.any():
        case.compare("loss_boundary", single[boundary], LOSS, LOSS_FLOAT64)
    else:
        zeros = torch.zeros(case.archive.arrays[case("loss_boundary")].shape)
        case.compare("loss_boundary", zeros, Tolerance(), Tolerance())
    fields = {
        "loss_total": losses.mean(),
        "loss_inner": single[~boundary],
        "loss_unweighted_inner": objective.consistency.distance(estimate, reference)[~boundary],
    }
    case.compare_run(online.network, losses.mean(), fields, float((t - r).min()))


ECT_LOSS = {"c": 0.0, "q": 2, "P_mean": -1.1, "P_std": 2.0}


def compare_ect(archive: Archive) -> None:
    """The losses of ECT's code, of FastGen's and of the authors' of truncated models for the same t and noise."""
    for name, config in cases_of(archive).items():
        require_known(config["loss"], {"c", "q", "P_mean", "P_std"}, name)
        loss, stage = ECT_LOSS | config["loss"], config["stage"]
        case = Case(archive, name)
        n = schedules.powers(stage, q=loss["q"], stages=stage + 1, total_steps=stage + 1)
        law = LognormalTimes(p_mean=loss["P_mean"], p_std=loss["P_std"])
        drawn = law.at(case.input("rnd_normal_draw"))
        x_0, z = case.input("real"), case.input("eps_draw")
        families = {"": {"r_min": 0.0}, "fastgen_": FASTGEN, "tcm_": TCM}
        for prefix, floors in families.items():
            pairs = pairs_at(law, floors)
            # The two others are given the times of ECT's float32 run.
            given = drawn if prefix == "" else case.input("t")
            t, r = pairs.at(given, n)
            case.compare(f"{prefix}t", t, Tolerance(of_each=2e-6), TIME)
            case.compare(f"{prefix}r", r, Tolerance(of_each=1e-5), TIME)
            online = denoiser(archive, config["student"], 0.5)
            objective = ConsistencyObjective(
                pairs=pairs,
                step=DataStep(),
                distance=distance_of(loss["c"], squared=False),
                weighting=inverse_gap,
            )
            clean = r == 0
            reference = online(variance_exploding(x_0, z, r), torch.where(clean, t, r))
            reference = torch.where(broadcast_time(clean, x_0), x_0, reference)
            archive.compare(case(f"{prefix}D_yr"), reference, OUTPUT)
            losses = objective.losses_at(online, online, x_0, None, t, r, z).loss
            online.zero_grad()
            losses.mean().backward()
            case.compare(f"{prefix}loss", losses, LOSS, LOSS_FLOAT64)
            toy: Any = online.network
            case.compare(f"{prefix}grad", toy.gradient(), GRADIENT, GRADIENT_FLOAT64)
        archive.compare(case("D_yt"), online(variance_exploding(x_0, z, drawn), drawn), OUTPUT)
