"""Comparisons with FastGen's laws of times, curricula, averages and rates; and which passes of a loss drop the same units."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consistency import schedules
from consistency.averaging import power_decay, relative_width
from consistency.denoiser import Denoiser
from consistency.grids import KarrasGrid
from consistency.objectives import ConsistencyObjective, TruncatedObjective
from consistency.pairs import LognormalTimes, TruncatedStudentTimes
from consistency.preconditioning import EDM
from consistency.steps import DataStep
from consistency.weightings import inverse_gap
from golden_harness import Archive, Tolerance, read_json
from golden_later import (
    EXACT,
    NVLABS,
    RHO,
    T_MAX,
    T_MIN,
    TCM,
    TIME,
    Masked,
    cases_of,
    distance_of,
    fastgen_law,
    numbered,
    pairs_at,
)

# ------------------------------------------------------------------------ laws, curricula, averages, rates of FastGen


def compare_fastgen_time(archive: Archive) -> None:
    """The laws, the map t -> r, the stages, the averages and the rates that recipes of ours use."""
    cases = cases_of(archive)
    u = archive.tensor("law.u").double()
    for name in (*archive.matching("law.lognormal_*"), *archive.matching("law.log_t_*")):
        archive.compare(name, fastgen_law(cases[name]).at(u), TIME)
    grid = KarrasGrid(t_min=T_MIN, t_max=T_MAX, rho=RHO).points(1000).flip(0)
    archive.compare("law.polynomial", grid[cases["law.polynomial"]["indices"]], EXACT)
    floor = {"r_min": cases["map"]["min_r"], "least_gap": 0.0}
    pairs, t = pairs_at(LognormalTimes(p_mean=0.0, p_std=1.0), floor), archive.tensor("map.t")
    for name in archive.matching("map.r_ratio_*"):
        n = 1 / (1 - float(name.rpartition("_")[2]))
        archive.compare(name, pairs.ratio_map(t, n), Tolerance(of_each=1e-10))
    scalings = EDM(sigma_data=0.5, c_noise_scale=NVLABS)
    archive.compare("map.c_out", scalings(t).c_out, EXACT)
    k = archive.tensor("curriculum.iteration").tolist()
    for name in archive.matching("curriculum.*.stage"):
        case = name.removesuffix(".stage")
        compare_curriculum(archive, case, cases[case], k)
    compare_rates(archive, cases["ema"]["halflife"])
    x, noise, t = (archive.tensor(f"schedule.edm.{n}") for n in ("x", "eps", "t"))
    archive.compare("schedule.edm.x_t", x + t[:, None] * noise, EXACT)


def compare_curriculum(archive: Archive, case: str, config: dict[str, Any], k: list[int]) -> None:
    """Stages, counted in images, and the limited ratio."""
    q, stage_steps = config["q"], 1000 * config["kimg_per_stage"] / config["batch_size"]
    many = 1 + int(max(k) // stage_steps)
    powers = [
        schedules.powers(i, q=q, stages=many, total_steps=1, stage_steps=stage_steps) for i in k
    ]
    stages = [round(math.log(n, q)) - 1 for n in powers]
    archive.compare(f"{case}.stage", torch.tensor(stages), Tolerance())
    ratios = [1 - max(1 / n, 1 - config["ratio_limit"]) for n in powers]
    archive.compare(f"{case}.ratio", torch.tensor(ratios, dtype=torch.float64), EXACT)


def compare_rates(archive: Archive, half_life: dict[str, Any]) -> None:
    k = archive.tensor("ema.iteration").tolist()
    for name in archive.matching("ema.power_*"):
        width = relative_width(float(name.rpartition("_")[2]))
        ours = [power_decay(i, width) for i in k]
        archive.compare(name, torch.tensor(ours, dtype=torch.float64), Tolerance(of_largest=1e-9))
    steps = 1000 * half_life["halflife_kimg"] / half_life["batch_size"]
    for name in archive.matching("ema.halflife_*"):
        end = name.rpartition("_")[2]
        ramp = math.inf if end == "None" else float(end)
        ours = [schedules.half_life_decay(i, half_life=steps, ramp_up=ramp) for i in k]
        archive.compare(name, torch.tensor(ours, dtype=torch.float64), EXACT)
    k = archive.tensor("lr.step").tolist()
    for name in archive.matching("lr.inverse_sqrt_*"):
        ref = float(name.rpartition("_")[2])
        ours = [schedules.inverse_root_rate(i, ref_steps=ref, ramp_steps=0) for i in k]
        archive.compare(name, torch.tensor(ours, dtype=torch.float64), EXACT)


# ------------------------------------------------------------------------ dropout masks


def compare_dropout(path: Path) -> int:
    """Which passes of a loss drop the same units, for the codes of ECT and of truncated models; returns their number."""
    codes = {name: masks for name, masks in read_json(path)["masks"].items() if is_ours(name)}
    scalings = EDM(sigma_data=0.5, c_noise_scale=NVLABS)
    for name, expected in codes.items():
        masks: list[Tensor] = []
        online, first_stage = (Denoiser(Masked(masks), scalings).train() for _ in range(2))
        law = TruncatedStudentTimes(df=0.01, loc=0.0, scale=0.2, t_lo=1.0, t_hi=T_MAX)
        parts: dict[str, Any] = {
            "pairs": pairs_at(law, TCM),
            "step": DataStep(),
            "distance": distance_of(1e-8, squared=False),
            "weighting": inverse_gap,
        }
        objective: nn.Module = ConsistencyObjective(**parts)
        if "TCM" in name:
            objective = TruncatedObjective(
                first_stage=first_stage,
                t_split=1.0,
                boundary_share=0.25,
                boundary_weight=0.1,
                **parts,
            )
        x_0 = torch.zeros(8, 1, 4, 4)
        objective(online, online, x_0, None, 1000, torch.Generator().manual_seed(0))
        assert numbered(masks) == expected, name
    return len(codes)


def is_ours(code: str) -> bool:
    return "TCM" in code or "ECT" in code or code.endswith(" CM")
