"""Comparisons of schedules, grids, weightings and laws of times with golden data.

Constants come from the files, or are derived from the numbers if a file has none.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from consistency import schedules, weightings
from consistency.distances import PseudoHuber
from consistency.grids import KarrasGrid
from consistency.pairs import DiscreteLognormalPairs, LognormalTimes, RatioPairs
from consistency.preconditioning import EDM, Boundary
from consistency.weightings import Weighting
from golden_harness import SCALING, SCALING_FLOAT64, Archive, Tolerance, read_json

# Section 2 of the golden README: the defaults of all files.
SIGMA_DATA, T_MIN, T_MAX, RHO = 0.5, 0.002, 80.0, 7.0
GRID = KarrasGrid(t_min=T_MIN, t_max=T_MAX, rho=RHO)
NVLABS = 0.25

EXACT = Tolerance()
FORMULA = Tolerance(of_each=1e-12)
GRID_FLOAT32 = Tolerance(of_each=4e-6)
"""The published code raises a float32 to the power 7; its float64 arrays are compared as `SCALING_FLOAT64`."""
JCM_DECAY = Tolerance(of_each=1e-6)


def weighting(name: str, sigma_data: float = SIGMA_DATA) -> Weighting:
    """Ours under the name of the OpenAI or the JAX code."""
    return {
        "uniform": weightings.uniform,
        "snr": weightings.snr,
        "snr+1": weightings.snr_plus_one,
        "snrp1": weightings.snr_plus_one,
        "karras": partial(weightings.karras, sigma_data=sigma_data),
        "truncated-snr": weightings.truncated_snr,
        "truncated_snr": weightings.truncated_snr,
    }[name]


# ------------------------------------------------------------------------ OpenAI


def compare_weights_and_grids(archive: Archive) -> None:
    """Weightings and the times on the grid, for every set of constants in the file."""
    for name in archive.matching("*.const.sigma_data"):
        case = name.removesuffix(".const.sigma_data")
        sigma_data = archive.number(name)
        grid = KarrasGrid(
            t_min=archive.number(f"{case}.const.sigma_min"),
            t_max=archive.number(f"{case}.const.sigma_max"),
            rho=archive.number(f"{case}.const.rho"),
        )
        t = archive.tensor(f"{case}.sigma")
        for double, suffix, tolerance in ((False, "", SCALING), (True, ".f64", SCALING_FLOAT64)):
            times = t.double() if double else t
            archive.compare(f"{case}.snr{suffix}", weightings.snr(times, times), tolerance)
            for weight in archive.matching(f"{case}.weight.*"):
                if weight.endswith(".f64") == double:
                    kind = weight.removeprefix(f"{case}.weight.").removesuffix(".f64")
                    ours = weighting(kind, sigma_data)(times, times)
                    archive.compare(weight, ours, tolerance)
        for name in archive.matching(f"{case}.*.n*"):
            kind, n, *_ = name.removeprefix(f"{case}.").split(".")
            if kind in GRIDS:
                tolerance = SCALING_FLOAT64 if name.endswith(".f64") else GRID_FLOAT32
                archive.compare(name, GRIDS[kind](grid, int(n[1:])), tolerance)


def _with_zero(grid: KarrasGrid, n: int) -> Tensor:
    return torch.cat([grid.points(n), torch.zeros(1)])


GRIDS: dict[str, Callable[[KarrasGrid, int], Tensor]] = {
    "sigmas_karras": _with_zero,
    "train_t": lambda grid, n: grid.at(torch.arange(n - 1), n),
    "train_t2": lambda grid, n: grid.at(torch.arange(1, n), n),
    "progdist_t": lambda grid, n: grid.at(torch.arange(n), n + 1),
    "progdist_t2": lambda grid, n: grid.at(torch.arange(n) + 0.5, n + 1),
}


def openai_num_scales(case: dict) -> Callable[[int], int]:
    """N(k) from the arguments of the published function."""
    s_0, s_1, total = case["start_scales"], case["end_scales"], case["total_steps"]
    if case["scale_mode"] == "fixed":
        return partial(schedules.constant, num_scales=s_0)
    if case["scale_mode"] == "progressive":
        return partial(schedules.square_root, s_0=s_0, s_1=s_1, total_steps=total)
    return halving(s_0, case["distill_steps_per_iter"])


def halving(s_0: int, stage_steps: int) -> Callable[[int], int]:
    """N(k) with stages of that length."""
    total = math.ceil(stage_steps * (math.log2(s_0) + 4))
    return partial(schedules.halving, s_0=s_0, total_steps=total)


def openai_decay(case: dict) -> Callable[[int], float]:
    """mu of N(k) from the arguments of the published function."""
    if case["target_ema_mode"] == "adaptive":
        return partial(
            schedules.decay_as_released, s_0=case["start_scales"], mu_0=case["start_ema"]
        )
    mu = 1.0 if case["scale_mode"] == "progdist" else case["start_ema"]
    return partial(schedules.fixed_decay, mu=mu)


def compare_openai_schedules(archive: Archive) -> None:
    for name, case in read_json(archive.path.with_suffix(".json"))["cases"].items():
        num_scales, decay = openai_num_scales(case), openai_decay(case)
        scales = [num_scales(int(k)) for k in archive.input(f"{name}.step")]
        archive.compare(f"{name}.num_scales", torch.tensor(scales), EXACT)
        archive.compare(f"{name}.ema", _float64([decay(n) for n in scales]), FORMULA)


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def compare_sigma_samplers(archive: Archive) -> None:
    for name in archive.matching("*.sigmas"):
        case = name.removesuffix(".sigmas")
        constants = f"{case}.p_mean_std"
        if constants not in archive:
            constants = "default.p_mean_std"
        p_mean, p_std = archive.input(constants)
        law = LognormalTimes(p_mean=float(p_mean), p_std=float(p_std))
        if f"{case}.normal" in archive:
            t = law.at(archive.tensor(f"{case}.normal"))
        else:
            u = archive.tensor(f"{case}.uniform")
            # The published code rounds the probability to float32, which the tails feel.
            rounded = (torch.arange(len(u)) + u) / len(u)
            t = law.quantile(rounded.double())
            archive.compare(name, law.spread(u), Tolerance(of_each=1e-3))
        archive.compare(name, t, Tolerance(of_each=2e-6))
    for name in archive.matching("*.weights"):
        # No law of ours weighs its draws.
        ones = torch.ones(archive.arrays[name].shape)
        archive.compare(name, weightings.uniform(ones, ones), EXACT)


# ------------------------------------------------------------------------ iCT, ECT, EDM


def compare_ict(archive: Archive) -> None:
    for name in archive.matching("Nk.*.K_s0_s1"):
        case = name.removesuffix(".K_s0_s1")
        total, s_0, s_1 = (int(n) for n in archive.input(name))
        constants = {"s_0": s_0, "s_1": s_1, "total_steps": total}
        stage = torch.tensor(schedules.doubling_stage_steps(**constants))
        archive.compare(f"{case}.Kprime", stage, EXACT)
        steps = archive.input(f"{case}.k")
        ours = torch.tensor([schedules.doubling(int(k), **constants) for k in steps])
        archive.compare(f"{case}.N", ours, EXACT)
    for name in archive.matching("grid.N*"):
        n = int(name.removeprefix("grid.N"))
        archive.compare(name, GRID.points(n).flip(0), FORMULA)
    for name in archive.matching("p.N*"):
        n = int(name.removeprefix("p.N"))
        law = DiscreteLognormalPairs(grid=GRID, p_mean=-1.1, p_std=2.0)
        archive.compare(name, law.probabilities(n).flip(0), PROBABILITY)
    for name in archive.matching("p_alt.N*"):
        p_mean, p_std = archive.input("p_alt.Pmean_Pstd")
        law = DiscreteLognormalPairs(grid=GRID, p_mean=float(p_mean), p_std=float(p_std))
        n = int(name.removeprefix("p_alt.N"))
        archive.compare(name, law.probabilities(n).flip(0), PROBABILITY)
    for name in archive.matching("lambda.N*"):
        points = GRID.points(int(name.removeprefix("lambda.N")))
        ours = weightings.inverse_gap(points[:-1], points[1:]).flip(0)
        archive.compare(name, ours, Tolerance(of_each=1e-10))
    compare_huber(archive)


PROBABILITY = Tolerance(of_each=1e-10)
"""Differences of neighbours, which lose digits."""


def compare_huber(archive: Archive) -> None:
    if "c.d" not in archive:
        return
    per_dimension = PseudoHuber(c=0.00054, per_root_dimension=True)
    sizes = [torch.empty(1, int(d), 1, 1, device="meta") for d in archive.input("c.d")]
    ours = [per_dimension.constant(image) for image in sizes]
    archive.compare("c.value", _float64(ours), FORMULA)
    distance = PseudoHuber(c=archive.number("huber.c"), per_root_dimension=False)
    x = archive.tensor("huber.x").requires_grad_()
    d = distance(x, archive.tensor("huber.y"))
    archive.compare("huber.d", d, Tolerance(of_each=1e-10))
    d.sum().backward()
    assert x.grad is not None
    archive.compare("huber.grad_x", x.grad, Tolerance(of_largest=1e-10))


def compare_ect_schedule(archive: Archive) -> None:
    t = archive.tensor("t")
    for name in archive.matching("*.q_k_b_isconst"):
        case = name.removesuffix(".q_k_b_isconst")
        q, k, b, is_const = (float(value) for value in archive.input(name))
        law = RatioPairs(
            times=LognormalTimes(p_mean=-1.1, p_std=2.0), k=0.0 if is_const else k, b=b
        )
        stages = range(len(archive.arrays[f"{case}.ratio_by_stage"]))
        powers = [
            schedules.powers(stage, q=q, stages=len(stages), total_steps=len(stages))
            for stage in stages
        ]
        archive.compare(f"{case}.ratio_by_stage", _float64([1 - 1 / n for n in powers]), FORMULA)
        for double, suffix, tolerance in (
            (False, "", Tolerance(of_each=2e-6, absolute=2e-6)),
            (True, ".f64", Tolerance(of_each=1e-12, absolute=1e-12)),
        ):
            times = t.double() if double else t
            r = torch.stack([law.ratio_map(times, n) for n in powers])
            archive.compare(f"{case}.r_by_stage{suffix}", r, tolerance)
    for name in archive.matching("stage_during_tick.double*"):
        double = int(name.removeprefix("stage_during_tick.double"))
        ticks = range(len(archive.arrays[name]))
        stages = len(ticks) // double + 1
        # The first tick of the published loop is a single batch; the others have full length.
        powers = [
            schedules.powers(max(tick - 1, 0), q=2, stages=stages, total_steps=stages * double)
            for tick in ticks
        ]
        archive.compare(name, torch.tensor([round(math.log2(n)) - 1 for n in powers]), EXACT)


def compare_edm_training(archive: Archive) -> None:
    """Learning rate and decay of the EDM training loop, which counts images."""
    for name in archive.matching("train.*.batch_halflifekimg_ramp_lrrampkimg"):
        case = name.rsplit(".", 1)[0]
        batch, half_life, ramp, rate_ramp = (float(value) for value in archive.input(name))
        steps = [float(images) / batch for images in archive.input(f"{case}.cur_nimg")]
        rates = [schedules.rising_rate(k, ramp_steps=rate_ramp * 1000 / batch) for k in steps]
        archive.compare(f"{case}.lr_factor", _float64(rates), FORMULA)
        decays = [
            schedules.half_life_decay(k, half_life=half_life * 1000 / batch, ramp_up=ramp)
            for k in steps
        ]
        archive.compare(f"{case}.ema_beta", _float64(decays), Tolerance(of_each=1e-12))


# ------------------------------------------------------------------------ JAX


def compare_jcm_schedules(archive: Archive) -> None:
    for name in archive.matching("*.num_scales"):
        case = name.removesuffix(".num_scales")
        steps = [int(k) for k in archive.input(f"{case}.step")]
        theirs = [int(n) for n in archive.arrays[name]]
        if theirs[-1] < theirs[0]:
            compare_jcm_halving(archive, case, steps, theirs)
        elif theirs[-1] == theirs[0]:
            ours = [schedules.constant(k, num_scales=theirs[0]) for k in steps]
            archive.compare(name, torch.tensor(ours), EXACT)
            mu = schedules.fixed_decay(theirs[0], mu=float(archive.arrays[f"{case}.ema"][0]))
            archive.compare(f"{case}.ema", _float64([mu] * len(steps)), JCM_DECAY)
        else:
            compare_jcm_square_root(archive, case, steps, theirs)
    if "precond.t" not in archive:
        return
    t = archive.tensor("precond.t")
    for kind, scalings in (
        ("denoiser", EDM(sigma_data=SIGMA_DATA, c_noise_scale=NVLABS)(t)),
        ("distiller", Boundary(sigma_data=SIGMA_DATA, t_min=T_MIN, c_noise_scale=NVLABS)(t)),
    ):
        for c in ("c_skip", "c_in", "c_out"):
            archive.compare(f"precond.{kind}.{c}", getattr(scalings, c), SCALING)
        archive.compare(f"precond.{kind}.cond_t", scalings.c_noise, SCALING)


def compare_jcm_halving(archive: Archive, case: str, steps: list[int], theirs: list[int]) -> None:
    stage_steps = next(k for k, n in zip(steps, theirs, strict=True) if n < theirs[0])
    assert stage_steps - 1 in steps, f"{case}: the file does not tell the length of a stage"
    num_scales = halving(theirs[0], stage_steps)
    archive.compare(f"{case}.num_scales", torch.tensor([num_scales(k) for k in steps]), EXACT)
    decay = openai_decay({"target_ema_mode": "fixed", "scale_mode": "progdist"})
    archive.compare(f"{case}.ema", _float64([decay(n) for n in theirs]), JCM_DECAY)


def compare_jcm_square_root(
    archive: Archive, case: str, steps: list[int], theirs: list[int]
) -> None:
    s_0 = theirs[steps.index(0)]
    constants = {"s_0": s_0} | square_root_constants(s_0, steps, theirs)
    ours = [jcm_square_root(k, near=n, **constants) for k, n in zip(steps, theirs, strict=True)]
    archive.compare(f"{case}.num_scales", torch.tensor(ours), EXACT)
    first = float(archive.arrays[f"{case}.ema"][steps.index(0)])
    mu_0 = first ** ((s_0 - 1) / s_0)
    decays = [schedules.decay_as_released(n, s_0=s_0, mu_0=mu_0) for n in ours]
    archive.compare(f"{case}.ema", _float64(decays), JCM_DECAY)


def jcm_square_root(k: int, *, near: int, s_0: int, s_1: int, total_steps: int) -> int:
    """N(k), or `near` where float32, in which the JAX code computes, cannot tell k from k (1 +- 3e-7)."""
    fine = 10_000_000
    candidates = [
        schedules.square_root(k * (fine + e), s_0=s_0, s_1=s_1, total_steps=total_steps * fine)
        for e in (0, -3, 3)
    ]
    return near if near in candidates else candidates[0]


def square_root_constants(s_0: int, steps: list[int], theirs: list[int]) -> dict[str, int]:
    """s_1 and K, which the file leaves out: the roundest K whose schedule fits all steps.

    N(k) = n means (n-1)^2 < k ((s_1+1)^2 - s_0^2)/K + s_0^2 <= n^2, so the steps bound the fraction.
    """
    rising = [(k, n) for k, n in zip(steps, theirs, strict=True) if k > 0]
    low = max(((n - 1) ** 2 - s_0**2) / k for k, n in rising) * (1 - 1e-6)
    high = min((n**2 - s_0**2) / k for k, n in rising) * (1 + 1e-6)
    for unit in (100_000, 50_000, 10_000, 5_000, 1_000, 100, 10, 1):
        for s_1 in range(s_0 + 1, 500):
            span = (s_1 + 1) ** 2 - s_0**2
            total = math.ceil(span / high / unit) * unit
            if 0 < total <= span / low:
                return {"s_1": s_1, "total_steps": total}
    raise AssertionError("no constants of the square-root schedule fit the steps")
