"""Comparisons of the objectives with golden data: losses per sample, what they are made of, and gradients.

Each case is given the recorded times or indices and the recorded noise through `losses_at`, which training calls too.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from consistency import schedules
from consistency.denoiser import Denoiser
from consistency.distances import L1, L2, Distance, L2At32, PseudoHuber, Resize, SquaredNorm
from consistency.grids import KarrasGrid
from consistency.objectives import (
    ConsistencyObjective,
    DenoisingObjective,
    Losses,
    ProgressiveObjective,
)
from consistency.pairs import LognormalTimes, RatioPairs, UniformPairs
from consistency.preconditioning import EDM, Boundary
from consistency.processes import variance_exploding
from consistency.solvers import euler_step, heun_step
from consistency.steps import DataStep, Step, TeacherStep
from consistency.tensors import Data, Denoise, Label, PerSample, Time, broadcast_time
from consistency.training.lpips import RESIZING
from consistency.weightings import inverse_gap, karras
from golden_formulas import GRID_FLOAT32, RHO, SIGMA_DATA, T_MAX, T_MIN, weighting
from golden_harness import GRADIENT, OUTPUT, Archive, Tolerance
from golden_networks import (
    NVLABS,
    OPENAI,
    class_indices,
    ect_network,
    ect_sigma_data,
    gradients_of,
    no_class,
    nvlabs_network,
    nvlabs_sigma_data,
    small_network,
)

LOSS = Tolerance(of_norm=2e-4)
EDGE_LOSS = Tolerance(of_each=5e-4)
ECT_LOSS = Tolerance(of_each=1e-3)


class Stub(nn.Module):
    """The substitute for LPIPS in the golden data: the mean square of the difference of its inputs."""

    def __init__(self, resize: Resize, scale: float) -> None:
        super().__init__()
        self.resize, self.scale = resize, scale

    def forward(self, x: Data, y: Data) -> PerSample:
        return (self.scale * (self.resize(x) - self.resize(y))).square().mean(dim=(1, 2, 3))


OPENAI_DISTANCES: dict[str, Distance] = {
    "l1": L1(),
    "l2": L2(),
    "l2-32": L2At32(),
    "lpips": Stub(RESIZING["average_pooled_unit"], 0.5),
}


class Remembered:
    """A denoiser that computes every input once; the others it answers from memory."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.calls: list[tuple[Data, Time, Data]] = []

    def __call__(self, x_t: Data, t: Time, label: Label = None) -> Data:
        for x, time, output in self.calls:
            if torch.equal(x, x_t) and torch.equal(time, t):
                return output
        output = self.denoise(x_t, t, label)
        self.calls.append((x_t, t, output))
        return output


class Case(NamedTuple):
    """One draw of indices and noise in a file of OpenAI losses."""

    archive: Archive
    name: str
    grid: KarrasGrid
    sigma_data: float
    num_scales: int
    x_0: Data
    label: Label
    i: Tensor
    z: Data

    def denoiser(self, network: str, *, boundary: bool) -> Denoiser:
        """One of the small networks, under boundary or EDM scalings."""
        module = small_network(self.archive.path.parent / "openai_small", network)
        if boundary:
            scalings = Boundary(
                sigma_data=self.sigma_data, t_min=self.grid.t_min, c_noise_scale=OPENAI
            )
            return Denoiser(module, scalings)
        return Denoiser(module, EDM(sigma_data=self.sigma_data, c_noise_scale=OPENAI))

    @property
    def tolerance(self) -> Tolerance:
        """Cases with forced indices decide between the scalings, sample by sample."""
        return EDGE_LOSS if "num_scales" in self.own else LOSS

    @property
    def own(self) -> set[str]:
        """The arrays of the case, without its name."""
        prefix = f"{self.name}."
        return {n.removeprefix(prefix) for n in self.archive.arrays if n.startswith(prefix)}


def openai_cases(archive: Archive) -> Iterator[Case]:
    """Every case of the file, with the constants and images that are its own or the file's."""
    for noise in archive.matching("*.noise"):
        name = noise.removesuffix(".noise")

        def own(field: str, name: str = name) -> str:
            return f"{name}.{field}" if f"{name}.{field}" in archive else field

        constants = [SIGMA_DATA, T_MAX, T_MIN, RHO]
        if f"{name}.const" in archive:
            constants = [float(value) for value in archive.input(f"{name}.const")]
        sigma_data, t_max, t_min, rho = constants
        found = re.fullmatch(r"N(\d+)", name)
        n = int(found[1]) if found else int(archive.number(f"{name}.num_scales"))
        yield Case(
            archive,
            name,
            KarrasGrid(t_min=t_min, t_max=t_max, rho=rho),
            sigma_data,
            n,
            archive.tensor(own("x_start")),
            archive.tensor(own("y")) if own("y") in archive else None,
            archive.tensor(f"{name}.indices"),
            archive.tensor(noise),
        )


def losses_of(case: Case) -> Iterator[tuple[str, str, str]]:
    """(array, distance, weighting) of every loss of the case."""
    for array in case.archive.matching(f"{case.name}.loss.*"):
        distance, weight = array.removeprefix(f"{case.name}.loss.").split(".")
        yield array, distance, weight


def compare_small_gradients(archive: Archive, prefix: str, network: nn.Module) -> None:
    """Gradients of the batch mean: single parameters, and norm and sum of each in the network's order.

    Sums of many signs are held to the largest.
    """
    gradients = gradients_of(network)
    for array in archive.matching(f"{prefix}.grad.*"):
        archive.compare(array, gradients[array.removeprefix(f"{prefix}.grad.")], GRADIENT)
    compare_norms(archive, f"{prefix}.grad_l2_all", list(gradients), network)
    if f"{prefix}.grad_sum_all" not in archive:
        return
    sums = torch.stack([g.double().sum() for g in gradients.values()])
    archive.compare(f"{prefix}.grad_sum_all", sums, Tolerance(of_each=1e-3, of_largest=1e-4))


def compare_norms(archive: Archive, array: str, names: list[str], network: nn.Module) -> None:
    """Norms of the gradients of the named parameters; -1 in the file is one that has none, 0 in ours."""
    gradients = gradients_of(network)
    norms = torch.stack([gradients[name.removeprefix("model.")].double().norm() for name in names])
    none = torch.from_numpy(archive.arrays[array] == -1) & (norms == 0)
    ours = norms.masked_fill(none, -1)
    archive.compare(array, ours, Tolerance(of_each=1e-3, of_largest=1e-5))


# ------------------------------------------------------------------------ consistency losses


def compare_consistency_losses(archive: Archive) -> None:
    """Consistency training, or distillation if the name of the file ends with _cd."""
    for case in openai_cases(archive):
        online = case.denoiser("online", boundary=True)
        target = case.denoiser("target", boundary=True)
        teacher = Remembered(case.denoiser("teacher", boundary=False))
        step: Step = DataStep()
        if archive.path.stem.endswith("_cd"):
            step = TeacherStep(teacher=teacher, solver=heun_step)
        t, r = case.grid.neighbours(case.i, case.num_scales)
        compare_parts(case, online, target, teacher, step, t, r)
        once_online, once_target = Remembered(online), Remembered(target)
        for array, distance, weight in losses_of(case):
            with torch.no_grad():
                losses = objective(case, step, distance, weight).losses_at(
                    once_online, once_target, case.x_0, case.label, t, r, case.z
                )
            archive.compare(array, losses.loss, case.tolerance)
        for array in archive.matching(f"{case.name}.*.grad_l2_all"):
            prefix = array.removesuffix(".grad_l2_all")
            distance, weight = prefix.removeprefix(f"{case.name}.").split(".")
            online.zero_grad()
            losses = objective(case, step, distance, weight).losses_at(
                online, once_target, case.x_0, case.label, t, r, case.z
            )
            losses.loss.mean().backward()
            compare_small_gradients(archive, prefix, online.network)
            assert all(p.grad is None for p in target.parameters())


def objective(case: Case, step: Step, distance: str, weight: str) -> ConsistencyObjective:
    return ConsistencyObjective(
        pairs=UniformPairs(grid=case.grid),
        step=step,
        distance=OPENAI_DISTANCES[distance],
        weighting=weighting(weight, case.sigma_data),
    )


@torch.no_grad()
def compare_parts(
    case: Case,
    online: Denoise,
    target: Denoise,
    teacher: Denoise,
    step: Step,
    t: Time,
    r: Time,
) -> None:
    """Times, noisy images and estimates, where the file has them."""
    x_t = variance_exploding(case.x_0, case.z, t)
    x_r = step(case.x_0, case.z, x_t, t, r, case.label)
    for name, time in (("t", t), ("t2", r)):
        if name in case.own:
            case.archive.compare(f"{case.name}.{name}", time, GRID_FLOAT32)
    parts = {"x_t": x_t, "x_t2": x_r}
    if "distiller" in case.own:
        parts["distiller"] = online(x_t, t, case.label)
        parts["distiller_target"] = target(x_r, r, case.label)
    if "x_euler" in case.own:
        x_euler = euler_step(teacher, x_t, t, r, case.label)
        parts["x_euler"] = x_euler
        parts["teacher_denoised_at_x_t"] = teacher(x_t, t, case.label)
        parts["teacher_denoised_at_x_euler"] = teacher(x_euler, r, case.label)
    for name, ours in parts.items():
        if name in case.own:
            case.archive.compare(f"{case.name}.{name}", ours, OUTPUT)


# ------------------------------------------------------------------------ other OpenAI losses


def compare_progressive_losses(archive: Archive) -> None:
    for case in openai_cases(archive):
        online = case.denoiser("online", boundary=False)
        teacher = Remembered(case.denoiser("teacher", boundary=False))
        once = Remembered(online)
        t, middle = (case.grid.at(case.i + part, case.num_scales + 1).float() for part in (0, 0.5))
        for name, ours in (("t", t), ("t2", middle)):
            if name in case.own:
                case.archive.compare(f"{case.name}.{name}", ours, GRID_FLOAT32)
        x_t = variance_exploding(case.x_0, case.z, t)
        with torch.no_grad():
            parts = {"x_t": x_t, "x_t2": euler_step(teacher, x_t, t, middle, case.label)}
        for name in parts.keys() & case.own:
            case.archive.compare(f"{case.name}.{name}", parts[name], OUTPUT)
        for array, distance, weight in losses_of(case):
            with torch.no_grad():
                losses = progressive(case, distance, weight, once, teacher)
            archive.compare(array, losses.loss, case.tolerance)
        for array in archive.matching(f"{case.name}.*.grad_l2_all"):
            prefix = array.removesuffix(".grad_l2_all")
            distance, weight = prefix.removeprefix(f"{case.name}.").split(".")
            online.zero_grad()
            progressive(case, distance, weight, online, teacher).loss.mean().backward()
            compare_small_gradients(archive, prefix, online.network)


def progressive(
    case: Case, distance: str, weight: str, online: Denoise, teacher: Denoise
) -> Losses:
    objective = ProgressiveObjective(
        grid=case.grid,
        distance=OPENAI_DISTANCES[distance],
        weighting=weighting(weight, case.sigma_data),
    )
    return objective.losses_at(
        online, teacher, case.x_0, case.label, case.i, case.num_scales, case.z
    )


def compare_denoising_losses(archive: Archive) -> None:
    network = small_network(archive.path.parent / "openai_small", "teacher")
    denoiser = Denoiser(network, EDM(sigma_data=SIGMA_DATA, c_noise_scale=OPENAI))
    x_0, z = archive.tensor("x_start"), archive.tensor("noise")
    label = archive.tensor("y") if "y" in archive else None
    p_mean, p_std = archive.input("p_mean_std") if "p_mean_std" in archive else (-1.2, 1.2)
    times = LognormalTimes(p_mean=float(p_mean), p_std=float(p_std))
    t = times.at(archive.tensor("sigma_normal"))
    archive.compare("sigmas", t, Tolerance(of_each=2e-6))

    def losses(weight: str, denoise: Denoise) -> PerSample:
        objective = DenoisingObjective(times=times, distance=L2(), weighting=weighting(weight))
        return objective.losses_at(denoise, x_0, label, t, z).loss

    once = Remembered(denoiser)
    for array in archive.matching("loss.*"):
        weight = array.removeprefix("loss.")
        with torch.no_grad():
            archive.compare(array, losses(weight, once), LOSS)
            for kind, weigh in (("mse", weight), ("xs_mse", "uniform")):
                if f"{kind}.{weight}" in archive:
                    archive.compare(f"{kind}.{weight}", losses(weigh, once), LOSS)
    for array in archive.matching("*.grad_l2_all"):
        prefix = array.removesuffix(".grad_l2_all")
        denoiser.zero_grad()
        losses(prefix, denoiser).mean().backward()
        compare_small_gradients(archive, prefix, network)


# ------------------------------------------------------------------------ EDM and ECT


def compare_nvlabs_losses(archive: Archive) -> None:
    """The EDM loss, which sums over an image."""
    if not archive.matching("loss.*"):
        return
    network = nvlabs_network(archive.path.parent, archive.path.stem)
    x_0 = archive.tensor("loss.images")
    label = no_class(network, len(x_0))
    if "class_labels" in archive:
        label = class_indices(archive.tensor("class_labels"))[: len(x_0)]
    for array in archive.matching("loss.*.params"):
        case = array.removesuffix(".params")
        p_mean, p_std, sigma_data = (float(value) for value in archive.input(array))
        times = LognormalTimes(p_mean=p_mean, p_std=p_std)
        t = times.at(archive.tensor(f"{case}.rnd_normal").flatten())
        z = archive.tensor(f"{case}.noise_unit")
        network.zero_grad()
        # The network's own preconditioning keeps its sigma_data, whatever that of the loss.
        denoiser = Denoiser(
            network, EDM(sigma_data=nvlabs_sigma_data(archive), c_noise_scale=NVLABS)
        )
        denoise = Remembered(denoiser)

        def weigh(t: Time, r: Time, sigma_data: float = sigma_data) -> PerSample:
            return karras(t, r, sigma_data=sigma_data)

        objective = DenoisingObjective(times=times, distance=SquaredNorm(), weighting=weigh)
        loss = objective.losses_at(denoise, x_0, label, t, z).loss.mean()
        estimate = denoise.calls[0][2]
        elements = broadcast_time(weigh(t, t), x_0) * (estimate - x_0).square()
        archive.compare(f"{case}.per_element", elements, OUTPUT)
        if f"{case}.train_scalar" in archive:
            archive.compare(f"{case}.train_scalar", loss, LOSS)
        if f"{case}.grad_l2_all" in archive:
            loss.backward()
            names = [str(name) for name in archive.arrays["param_names"]]
            compare_norms(archive, f"{case}.grad_l2_all", names, network)


def compare_ect_losses(archive: Archive) -> None:
    folder = archive.path.parent
    network = ect_network(folder)
    online = Denoiser(network, EDM(sigma_data=ect_sigma_data(folder), c_noise_scale=NVLABS))
    names = [str(name) for name in archive.arrays["param_names"]]
    x_0 = archive.tensor("images")
    label = no_class(network, len(x_0))
    if "labels" in archive:
        label = class_indices(archive.tensor("labels"))
    for array in archive.matching("*.P_mean_P_std_q_k_b"):
        case = array.removesuffix(".P_mean_P_std_q_k_b")
        p_mean, p_std, q, k, b = (float(value) for value in archive.input(array))
        constant = bool(archive.input(f"{case}.adj_const"))
        times = LognormalTimes(p_mean=p_mean, p_std=p_std)
        law = RatioPairs(times=times, k=0.0 if constant else k, b=b)
        stage = int(archive.number(f"{case}.stage"))
        n = schedules.powers(stage, q=q, stages=stage + 1, total_steps=stage + 1)
        t, r = law.at(times.at(archive.tensor(f"{case}.rnd_normal").flatten()), n)
        archive.compare(f"{case}.t", t, Tolerance(of_each=2e-6))
        archive.compare(f"{case}.r", r, Tolerance(of_each=1e-5, of_largest=2e-6))
        archive.compare(f"{case}.teacher_pass_ran", (r > 0).any(), Tolerance())
        distance = PseudoHuber(c=archive.number(f"{case}.c"), per_root_dimension=False)
        objective = ConsistencyObjective(
            pairs=law, step=DataStep(), distance=distance, weighting=inverse_gap
        )
        network.zero_grad()
        z = archive.tensor(f"{case}.eps")
        losses = objective.losses_at(online, online, x_0, label, t, r, z)
        archive.compare(f"{case}.loss", losses.loss, ECT_LOSS)
        if f"{case}.grad_l2_all" in archive:
            losses.loss.mean().backward()
            compare_norms(archive, f"{case}.grad_l2_all", names, network)
