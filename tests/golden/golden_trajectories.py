"""Comparisons of whole training runs of the OpenAI code, step by step, with golden data.

A run is repeated with the parts that training uses: schedules, objective, optimizer, `update_average`. Recorded
are the batch, the indices (or normal draws of the times) and the noise of every step. Each run is made twice: in
float32, whose losses are compared, and in float64, whose weights are, because the float32 weights of runs with the
released constants move by little more than their rounding.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from consistency import schedules
from consistency.averaging import frozen_copy, update_average
from consistency.denoiser import Denoiser
from consistency.distances import L2
from consistency.grids import KarrasGrid
from consistency.objectives import ConsistencyObjective, DenoisingObjective
from consistency.pairs import LognormalTimes, UniformPairs
from consistency.preconditioning import EDM, Boundary
from consistency.solvers import heun_step
from consistency.steps import DataStep, Step, TeacherStep
from consistency.tensors import PerSample
from consistency.training.optimizers import RAdam
from golden_formulas import EXACT, FORMULA, RHO, SIGMA_DATA, T_MAX, T_MIN, weighting
from golden_harness import Archive, Tolerance, read_json, require_known
from golden_losses import OPENAI_DISTANCES
from golden_networks import OPENAI, small_network

LOSS = Tolerance(of_each=1e-3)
LOSS_FLOAT64 = Tolerance(of_each=1e-6)
MOVEMENT = Tolerance(of_norm=1e-4)
WEIGHTS = Tolerance(of_norm=1e-5)
SUMS = Tolerance(of_largest=1e-5)

OPTIMIZER = ("weight_decay", "betas", "eps", "decoupled_weight_decay", "momentum", "amsgrad")
"""Arguments of PyTorch's optimizers that a run may have."""

READ = {
    *OPTIMIZER,
    *("mode", "ema", "start_ema", "scale", "s0", "s1", "total", "norm", "weight_schedule"),
    *("lr", "lr_anneal_steps", "warmup", "optimizer", "beta1", "beta2", "ema_rate", "init"),
    *("start_global_step", "schedule_sampler", "sigma_data", "sigma_min", "sigma_max", "rho"),
}
TOLD = {"B", "steps", "around", "start", "note"}
"""Entries of the specification for people, which the arrays repeat."""


class Run:
    """The networks of a run, its optimizer, and the numbers it leaves behind."""

    def __init__(self, archive: Archive, spec: dict, dtype: torch.dtype) -> None:
        self.archive, self.spec, self.dtype = archive, spec, dtype
        self.folder = archive.path.parent.parent / "openai_small"
        self.network = small_network(self.folder, self.first).to(dtype).train()
        self.averages = [frozen_copy(self.network) for _ in self.rates]
        self.target = frozen_copy(self.network)
        self.optimizer = optimizer_of(spec)(self.network.parameters())
        self.sigma_data = spec.get("sigma_data", SIGMA_DATA)
        self.grid = KarrasGrid(
            t_min=spec.get("sigma_min", T_MIN),
            t_max=spec.get("sigma_max", T_MAX),
            rho=spec.get("rho", RHO),
        )
        self.losses: list[PerSample] = []
        self.gradient_norms: list[Tensor] = []
        self.weights: dict[str, list[dict[str, Tensor]]] = {role: [] for role in self.roles}
        self.record()

    @property
    def first(self) -> str:
        """The file of the initial weights."""
        return self.spec["init"].split(".")[0]

    @property
    def rates(self) -> list[float]:
        return rates_of(self.spec)

    @property
    def boundary(self) -> Boundary:
        """The scalings of a consistency model."""
        return Boundary(sigma_data=self.sigma_data, t_min=self.grid.t_min, c_noise_scale=OPENAI)

    @property
    def plain(self) -> EDM:
        """The scalings of a denoiser."""
        return EDM(sigma_data=self.sigma_data, c_noise_scale=OPENAI)

    @property
    def roles(self) -> dict[str, nn.Module]:
        averages = {f"ema{j}": average for j, average in enumerate(self.averages)}
        return {"online": self.network, "target": self.target, **averages}

    def tensor(self, name: str) -> Tensor:
        values = self.archive.tensor(name)
        return values.to(self.dtype) if values.is_floating_point() else values

    def rate(self, s: int) -> float:
        """The learning rate of step s: as given, rising over `warmup` steps, falling to 0 at `lr_anneal_steps`."""
        fall, rise = self.spec.get("lr_anneal_steps", 0), self.spec.get("warmup", 0)
        factor = schedules.falling_rate(s, start=0.0, total_steps=fall) if fall else 1.0
        return (
            float(self.spec["lr"])
            * factor
            * (schedules.rising_rate(s, ramp_steps=rise) if rise else 1.0)
        )

    def step(self, loss: PerSample, decay: float | None) -> None:
        """Optimizer, evaluation averages, target: the published order, and ours."""
        self.optimizer.param_groups[0]["lr"] = self.rate(len(self.losses))
        self.optimizer.zero_grad()
        loss.mean().backward()
        self.losses.append(loss.detach())
        self.gradient_norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters()])
        )
        self.optimizer.step()
        for average, rate in zip(self.averages, self.rates, strict=True):
            update_average(average, self.network, rate)
        if decay is not None:
            update_average(self.target, self.network, decay)
        self.record()

    def record(self) -> None:
        for role, module in self.roles.items():
            state = {name: p.detach().clone() for name, p in module.named_parameters()}
            self.weights[role].append(state)


def rates_of(spec: dict) -> list[float]:
    """The decays of the averages of a run."""
    given = spec.get("ema_rate", "")
    listed = given if isinstance(given, list) else str(given).split(",")
    return [float(rate) for rate in listed if str(rate).strip()]


def optimizer_of(spec: dict) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer of a run with all of its options; by default those of the released training."""
    options = {name: spec[name] for name in OPTIMIZER if name in spec}
    if {"beta1", "beta2"} & spec.keys():
        options["betas"] = (spec.get("beta1", 0.9), spec.get("beta2", 0.999))
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    kind = spec.get("optimizer", "RAdam")
    if kind == "RAdam":
        return partial(RAdam, lr=spec["lr"], fused=True, **options)
    return partial(getattr(torch.optim, kind), lr=spec["lr"], **options)


def compare_trajectory(archive: Archive) -> None:
    spec = read_json(archive.path.parent / "specs.json")[archive.path.stem]
    require_known(spec, READ | TOLD, archive.path.stem)
    denoising = "sigma_normal" in archive
    repeat = repeat_denoising if denoising else repeat_consistency
    single, double = (Run(archive, spec, dtype) for dtype in (torch.float32, torch.float64))
    repeat(single)
    repeat(double)
    archive.compare("loss_per_sample", torch.stack(single.losses), LOSS)
    if "loss_per_sample.f64" in archive:
        archive.compare("loss_per_sample.f64", torch.stack(double.losses), LOSS_FLOAT64)
    if "lr_after" in archive:
        after = [single.rate(s + 1) for s in range(len(single.losses))]
        archive.compare("lr_after", torch.tensor(after, dtype=torch.float64), FORMULA)
    means = torch.stack([loss.mean() for loss in single.losses])
    for name, ours in (("loss_mean", means), ("grad_l2", torch.stack(single.gradient_norms))):
        if name in archive:
            archive.compare(name, ours, LOSS)
    compare_weights(archive, double)


def compare_weights(archive: Archive, run: Run) -> None:
    """Named parameters after every step, their movement, and sum and norm of every parameter."""
    names = [name for name, _ in run.network.named_parameters()]
    archive.compare_names("param_names", names)
    order = [str(name) for name in archive.arrays["param_names"]]
    for array in archive.matching("w.*") + archive.matching("dw64.*"):
        kind, role, name = array.split(".", 2)
        rows = run.weights[role]
        if name == "sum":
            ours = [torch.stack([row[p].sum() for p in order]) for row in rows]
            archive.compare(array, torch.stack(ours), SUMS)
        elif name == "l2":
            ours = [torch.stack([row[p].norm() for p in order]) for row in rows]
            archive.compare(array, torch.stack(ours), SUMS)
        else:
            values = torch.stack([row[name] for row in rows])
            if kind == "dw64":
                archive.compare(array, values - values[0], MOVEMENT)
            else:
                archive.compare(array, values, WEIGHTS)


def repeat_consistency(run: Run) -> None:
    """Consistency training or distillation, with N(k) and mu(k) of the step before it is counted."""
    archive, spec = run.archive, run.spec
    online, target = Denoiser(run.network, run.boundary), Denoiser(run.target, run.boundary)
    step: Step = DataStep()
    if spec["mode"] == "consistency_distillation":
        teacher = small_network(run.folder, "teacher").to(run.dtype)
        step = TeacherStep(teacher=Denoiser(teacher, run.plain), solver=heun_step)
    objective = ConsistencyObjective(
        pairs=UniformPairs(grid=run.grid),
        step=step,
        distance=OPENAI_DISTANCES[spec["norm"]],
        weighting=weighting(spec.get("weight_schedule", "uniform"), run.sigma_data),
    )
    num_scales, decay = functions_of_k(spec)
    x_0, z, i = run.tensor("x_start"), run.tensor("noise"), run.tensor("indices")
    label = run.tensor("y") if "y" in archive else [None] * len(x_0)
    first = spec.get("start_global_step", 0)
    scales = [num_scales(k) for k in range(first, first + len(x_0))]
    archive.compare("num_scales", torch.tensor(scales), EXACT)
    archive.compare("global_step", torch.arange(first, first + len(x_0)), EXACT)
    decays = torch.tensor([decay(n) for n in scales], dtype=torch.float64)
    archive.compare("target_ema", decays, FORMULA)
    for s, n in enumerate(scales):
        t, r = (run.grid.at(i[s] + next_one, n).to(run.dtype) for next_one in (0, 1))
        losses = objective.losses_at(online, target, x_0[s], label[s], t, r, z[s])
        run.step(losses.loss, decay(n))


def functions_of_k(spec: dict) -> tuple[Callable[[int], int], Callable[[int], float]]:
    """N(k), and mu of N(k)."""
    num_scales: Callable[[int], int] = partial(schedules.constant, num_scales=spec["s0"])
    if spec["scale"] == "progressive":
        num_scales = partial(
            schedules.square_root, s_0=spec["s0"], s_1=spec["s1"], total_steps=spec["total"]
        )
    if spec["ema"] == "adaptive":
        return num_scales, partial(
            schedules.decay_as_released, s_0=spec["s0"], mu_0=spec["start_ema"]
        )
    return num_scales, partial(schedules.fixed_decay, mu=spec["start_ema"])


def repeat_denoising(run: Run) -> None:
    """Training of the denoiser."""
    archive, spec = run.archive, run.spec
    p_mean, p_std = (float(n) for n in spec["schedule_sampler"].split("(")[1][:-1].split(","))
    objective = DenoisingObjective(
        times=LognormalTimes(p_mean=p_mean, p_std=p_std),
        distance=L2(),
        weighting=weighting(spec.get("weight_schedule", "karras"), run.sigma_data),
    )
    denoiser = Denoiser(run.network, run.plain)
    x_0, z, normal = run.tensor("x_start"), run.tensor("noise"), run.tensor("sigma_normal")
    label = run.tensor("y") if "y" in archive else [None] * len(x_0)
    for s in range(len(x_0)):
        t = objective.times.at(normal[s])
        run.step(objective.losses_at(denoiser, x_0[s], label[s], t, z[s]).loss, None)
