"""Comparisons of samplers, times and dropout masks of average velocities with FastGen, and with the other released codes."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consistency.denoiser import Denoiser
from consistency.derivatives import FiniteDifference
from consistency.distances import Adaptive
from consistency.flow_pairs import LogitNormalPairs
from consistency.flow_samplers import flow_jumps, flow_multistep
from consistency.inference.card import ModelCard, Process
from consistency.preconditioning import EDM, RectifiedFlow, Unscaled
from consistency.processes import rectified_flow
from consistency.samplers import followed, multistep
from consistency.schedules import inverse_root_rate, rising_rate
from consistency.solvers import euler_step, pf_ode
from consistency.steps import FlowVelocity, SelfGuidance
from consistency.tensors import Data, Label, Time, broadcast_time
from golden_harness import Archive, Tolerance, read_json
from golden_later import NVLABS, Masked, Toy, numbered
from golden_meanflow import LOWEST, PRECISIONS, Case, velocity_objective


@torch.no_grad()
def compare_fastgen_samplers(archive: Archive) -> None:
    """Jumps and renewed noise of average velocities; the same of consistency functions; scalings in training."""
    for name, case in read_json(archive.path.with_suffix(".json"))["cases"].items():
        net = case["net"]
        shift = case["sigma_shift"] if isinstance(net, str) else net["sigma_shift"]
        if shift and not name.endswith("_train"):
            # FastGen's own shift of the scalings in sampling, off by default and in every run.
            archive.read.update(archive.matching(f"{name}.*"))
            continue
        for dtype, suffix in PRECISIONS:
            near = Tolerance(of_norm=1e-9 if suffix else 2e-5)
            part = Case(archive, name, dtype, suffix)
            if isinstance(net, str):
                network = Toy(archive.path.with_name(f"{net}.safetensors"), lowest=LOWEST)
                denoise = Denoiser(network.to(dtype), EDM(sigma_data=0.5, c_noise_scale=NVLABS))
                part.compare("out", denoise(part.given("x"), part.given("t")), near)
            else:
                part.compare("sample", fastgen_sample(part, case), near)


def fastgen_sample(part: Case, case: dict[str, Any]) -> Data:
    net, jumps = case["net"], {"mean_flow": True, "cm": False}[case["kind"]]
    end = "end" if net["two_time"] else None
    plain = net["drop_precond"] == "both"
    path = part.archive.path.with_name(f"{case['student']}.safetensors")
    network = Toy(path, end, lowest=-math.inf if plain else LOWEST).to(part.dtype)
    edm = EDM(sigma_data=net["sigma_data"], c_noise_scale=NVLABS)
    denoise = Denoiser(network, RectifiedFlow() if plain else edm)
    times = part.given("t_list").double().tolist()
    draws = iter(["noise", *(f"draw_{n}" for n in range(1, len(times)))])
    noise: Callable[[], Data] = lambda: part.given(next(draws))  # noqa: E731
    label = part.given("condition").argmax(1) if part.has("condition") else None
    if case["type"] == "ode" and jumps:
        return flow_jumps(denoise, noise, label, times=times[:-1], t_max=times[0])
    if case["type"] == "ode":
        return followed(euler_step, denoise, times[0] * noise(), times, label)
    known = (
        partial(flow_multistep, clip=False) if plain else partial(multistep, t_min=0, clip=False)
    )
    return known(denoise, noise, label, times=times[:-1], t_max=times[0])


# --------------------------------------------------------------------------------------- times


class Fixed(nn.Module):
    """A network that returns one value."""

    def __init__(self, value: Data) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
        return self.value


def compare_flow_times(archive: Archive) -> None:
    """The rectified flow, its laws of times and time points, and the learning rates."""
    exact = Tolerance(of_norm=1e-10)
    rf = {
        name.removeprefix("schedule.rf."): archive.tensor(name)
        for name in archive.matching("schedule.rf.*")
        if not name.endswith(("idx_t", "eps_of_x", "t_of_sqrt_snr", "sqrt_snr"))
    }
    t, x, z = rf["t"], *(rf[n].double()[:, :, None, None] for n in ("x", "eps"))
    x_t, one = rectified_flow(x, z, t), torch.ones_like(t)[:, None, None, None]
    velocity = FlowVelocity()(x, z, x_t, t, None)
    slope = pf_ode(lambda *_: x, x_t, t.clamp(min=1e-300), None)
    ours = {
        "alpha": rectified_flow(one, 0 * one, t),
        "sigma": rectified_flow(0 * one, one, t),
        "alpha_prime": FlowVelocity()(one, 0 * one, one, t, None),
        "sigma_prime": FlowVelocity()(0 * one, one, one, t, None),
        "x_t": x_t,
        "velocity": velocity,
        "flow_of_x": torch.where(broadcast_time(t > 0, x), slope, 0),
        "x_of_flow": Denoiser(Fixed(velocity), RectifiedFlow())(x_t, t),
    }
    for field, value in ours.items():
        archive.compare(f"schedule.rf.{field}", value.reshape(rf[field].shape), exact)
    card = ModelCard(
        role="consistency",
        network={},
        preconditioning={"_target_": "consistency.preconditioning.RectifiedFlow"},
        process=Process(sigma_data=0.5, t_min=0.0, t_max=float(t.max()), rho=1.0),
        channels=1,
        image_size=1,
        num_classes=None,
    )
    for field in rf:
        if field.startswith("t_list_"):
            sampler: Any = card.sampler(int(field.removeprefix("t_list_")))
            points = torch.tensor([*sampler.keywords["times"], 0.0], dtype=torch.float64)
            archive.compare(f"schedule.rf.{field}", points, exact)
    cases = read_json(archive.path.with_suffix(".json"))["cases"]
    for name in archive.matching("law.logitnormal_*"):
        law, n = cases[name], archive.tensor("law.normal").double()
        mean, std = law["train_p_mean"], law["train_p_std"]
        pairs = LogitNormalPairs(
            mean_t=mean, std_t=std, mean_r=mean, std_r=std, equal=0, t_max=law["max_t"]
        )
        archive.compare(name, pairs.at(n, torch.full_like(n, -1e3), n)[0], exact)
    steps = archive.tensor("lr.step").tolist()
    found = re.search(r"over (\d+) steps from ([\d.e+-]+)/([\d.e+-]+) to 1", cases["lr"]["note"])
    assert found, cases["lr"]["note"]
    ramp = {"ramp_steps": float(found[1]), "start": float(found[2]) / float(found[3])}
    for name in archive.matching("lr.*"):
        if name.startswith("lr.inverse_sqrt_"):
            fall = {"ref_steps": float(name.rpartition("_")[2]), "ramp_steps": 0.0}
            rates = [inverse_root_rate(k, **fall) for k in steps]
        elif name.startswith("lr.meanflow"):
            rates = [rising_rate(k, **ramp) for k in steps]
        else:
            continue
        archive.compare(name, torch.tensor(rates, dtype=torch.float64), exact)


# --------------------------------------------------------------------------------------- dropout


def compare_dropout(path: Path) -> int:
    """All passes of our loss share a mask, as those of every released code of MeanFlow do."""
    masks = read_json(path)["masks"]
    names = [name for name in masks if "MeanFlow" in name]
    for name in names:
        assert len(set(masks[name])) == 1, name
        difference = FiniteDifference(e=1e-2) if "finite difference" in name else None
        pairs = LogitNormalPairs(mean_t=0, std_t=1, mean_r=0, std_r=1, equal=0.25)
        guidance = SelfGuidance(w=2.0, k=0.5)
        objective, _, _ = velocity_objective(
            pairs, Adaptive(p=1.0, c=1e-3), difference, guidance=guidance
        )
        found: list[Tensor] = []
        t, r = pairs(8, 0, torch.Generator().manual_seed(0))
        x_0, nobody = torch.zeros(8, 3, 4, 4), torch.zeros(8, dtype=torch.bool)
        label, z = torch.zeros(8, dtype=torch.long), torch.randn(8, 3, 4, 4)
        objective.losses_at(
            Denoiser(Masked(found), Unscaled()).train(), x_0, label, t, r, nobody, z
        )
        assert numbered(found) == [0] * (5 if difference else 3)
    return len(names)
