"""Comparisons with the JAX code for CIFAR-10: losses of a toy network, one training run, losses of the real network.

Arrays have channels last; kernels are stored (h, w, in, out) and matrices (in, out).
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from consistency import schedules
from consistency.averaging import frozen_copy, update_average
from consistency.checkpoints.jcm import song_weights
from consistency.denoiser import Denoiser
from consistency.distances import L1, L2, Distance, LInf, SquaredNorm
from consistency.grids import KarrasGrid
from consistency.networks.song import SongUNet
from consistency.objectives import (
    ConsistencyObjective,
    ContinuousObjective,
    DenoisingObjective,
    ProgressiveObjective,
)
from consistency.pairs import LognormalTimes, UniformPairs, UniformTimes
from consistency.preconditioning import EDM, Boundary
from consistency.processes import variance_exploding
from consistency.solvers import Solver, euler_step, heun_step
from consistency.steps import DataStep, DataVelocity, Step, TeacherStep, TeacherVelocity, Velocity
from consistency.tangents import (
    HessianTangent,
    L1Tangent,
    L2Tangent,
    LInfTangent,
    TangentLength,
    derivative_along,
)
from consistency.tensors import Data, Label, PerSample, Time, broadcast_time
from consistency.training.lpips import RESIZING
from consistency.weightings import karras
from golden_formulas import (
    EXACT,
    GRID,
    JCM_DECAY,
    NVLABS,
    RHO,
    SIGMA_DATA,
    T_MAX,
    T_MIN,
    jcm_square_root,
    weighting,
)
from golden_harness import Archive, Tolerance, read_json, read_safetensors
from golden_losses import Stub
from golden_networks import jcm_network

LOSS = Tolerance(of_each=2e-3)
VALUE = Tolerance(of_norm=1e-4)
TIME = Tolerance(of_each=4e-6)

BOUNDARY = Boundary(sigma_data=SIGMA_DATA, t_min=T_MIN, c_noise_scale=NVLABS)
PLAIN = EDM(sigma_data=SIGMA_DATA, c_noise_scale=NVLABS)
RELEASED_SCALES = 18

LPIPS = Stub(RESIZING["max_pooled_signed"], 1.0)
DISTANCES: dict[str, Distance] = {"l1": L1(), "l2": L2(), "linf": LInf(), "lpips": LPIPS}
TANGENTS: dict[str, TangentLength] = {
    "l1": L1Tangent(),
    "l2": L2Tangent(),
    "linf": LInfTangent(),
    "lpips": HessianTangent(distance=LPIPS),
}


class Toy(nn.Module):
    """F = conv_out(tanh(conv_in(x) + time([c, sin 3c, cos 3c]))) + 0.3 x, from section 3 of the golden README."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        weights = read_safetensors(path)
        for name in ("conv_in", "conv_out", "time"):
            kernel, bias = weights[f"{name}.kernel"], weights[f"{name}.bias"]
            layer: nn.Module
            if kernel.ndim == 4:
                side, _, inner, outer = kernel.shape
                layer = nn.Conv2d(inner, outer, side, padding=side // 2)
            else:
                layer = nn.Linear(*kernel.shape)
            layer.load_state_dict({"weight": torch_layout(kernel), "bias": bias})
            self.add_module(name, layer)

    def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
        c = c_noise
        features = torch.stack([c, (3 * c).sin(), (3 * c).cos()], dim=1)
        h = self.get_submodule("conv_in")(x)
        h = h + self.get_submodule("time")(features)[:, :, None, None]
        return self.get_submodule("conv_out")(h.tanh()) + 0.3 * x

    def named(self, values: str) -> dict[str, Tensor]:
        """Weights or gradients (`values` is data or grad) under the names and in the layout of the file."""
        ours = {}
        for name, p in self.named_parameters():
            value = getattr(p, values).detach().clone()
            ours[name.replace("weight", "kernel")] = (
                value if value.ndim == 1 else flax_layout(value)
            )
        return ours


def torch_layout(kernel: Tensor) -> Tensor:
    return kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def flax_layout(weight: Tensor) -> Tensor:
    return weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.T


def channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, -3)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(-3, -1)


# ------------------------------------------------------------------------ losses of the toy network


class Toys:
    """The three toy networks beside a file of losses, and its images."""

    def __init__(self, archive: Archive) -> None:
        folder = archive.path.parent
        self.online, self.target, self.teacher = (
            Toy(folder / f"toy_{role}.safetensors") for role in ("online", "target", "ref")
        )
        self.consistency, self.slow = (
            Denoiser(self.online, BOUNDARY),
            Denoiser(self.target, BOUNDARY),
        )
        self.denoiser = Denoiser(self.teacher, PLAIN)
        self.x_0 = channels_first(archive.tensor("image"))


def compare_losses(archive: Archive) -> None:
    toys = Toys(archive)
    for array in archive.matching("*.indices"):
        case = array.removesuffix(".indices")
        kind, *rest = case.split(".")
        if kind == "progdist":
            compare_progressive(archive, case, toys)
        elif rest:
            compare_consistency(archive, case, toys)
        else:
            compare_special(archive, case, toys)
    for kind, velocity in (
        ("continuous_ct", DataVelocity()),
        ("continuous_cd", TeacherVelocity(teacher=toys.denoiser)),
    ):
        if f"{kind}.u" in archive:
            compare_continuous(archive, kind, velocity, toys)
    if "dsm.z" in archive:
        compare_score_matching(archive, toys)
    if "fwd.t" not in archive:
        return
    t = archive.tensor("fwd.t")
    with torch.no_grad():
        for name, scalings in (("denoiser", PLAIN), ("distiller", BOUNDARY)):
            output = Denoiser(toys.online, scalings)(toys.x_0, t)
            archive.compare(f"fwd.{name}", channels_last(output), VALUE)


def compare_loss(archive: Archive, case: str, losses: PerSample, network: Toy) -> None:
    """Losses per sample, and their mean and its gradient where the file has them."""
    archive.compare(f"{case}.per_sample", losses, LOSS)
    if f"{case}.loss" not in archive:
        return
    archive.compare(f"{case}.loss", losses.mean(), LOSS)
    network.zero_grad()
    losses.mean().backward()
    gradients = network.named("grad")
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for array in archive.matching(f"{case}.grad.*"):
        ours = gradients[array.removeprefix(f"{case}.grad.")]
        tolerance = Tolerance(of_norm=5e-3, absolute=1e-6 * largest)
        archive.compare(array, ours, tolerance)


def compare_consistency(archive: Archive, case: str, toys: Toys) -> None:
    """`ct.N18`, `cd.N18`: distances and weightings; the distillation solves with Heun's method."""
    kind, scales = case.split(".")
    step: Step = DataStep()
    if kind == "cd":
        step = TeacherStep(teacher=toys.denoiser, solver=heun_step)
    t, r = GRID.neighbours(archive.tensor(f"{case}.indices"), int(scales[1:]))
    z = channels_first(archive.tensor(f"{case}.z"))
    for array in archive.matching(f"{case}.*.per_sample"):
        distance, weight, _ = array.removeprefix(f"{case}.").split(".")
        objective = consistency(step, distance, weight)
        losses = objective.losses_at(toys.consistency, toys.slow, toys.x_0, None, t, r, z)
        compare_loss(archive, array.removesuffix(".per_sample"), losses.loss, toys.online)


def consistency(
    step: Step, distance: str = "l2", weight: str = "uniform", *, stop_gradient: bool = True
) -> ConsistencyObjective:
    return ConsistencyObjective(
        pairs=UniformPairs(grid=GRID),
        step=step,
        distance=DISTANCES[distance],
        weighting=weighting(weight),
        stop_gradient=stop_gradient,
    )


def compare_special(archive: Archive, case: str, toys: Toys) -> None:
    """Single settings, named by the words of the case: l2, uniform, the released N, and no target network."""
    words = case.split("_")
    step: Step = DataStep()
    if "cd" in words:
        solver: Solver = euler_step if "euler" in words else heun_step
        step = TeacherStep(teacher=toys.denoiser, solver=solver)
    # With the data as its own denoiser every solver makes the same step.
    objective = consistency(step, stop_gradient="nostopgrad" not in words)
    scales = int(archive.number(f"{case}.num_scales", RELEASED_SCALES))
    t, r = GRID.neighbours(archive.tensor(f"{case}.indices"), scales)
    z = channels_first(archive.tensor(f"{case}.z"))
    losses = objective.losses_at(toys.consistency, toys.consistency, toys.x_0, None, t, r, z)
    compare_loss(archive, case, losses.loss, toys.online)


def compare_progressive(archive: Archive, case: str, toys: Toys) -> None:
    """The teacher is the target network, under EDM scalings."""
    i, z = archive.tensor(f"{case}.indices"), channels_first(archive.tensor(f"{case}.z"))
    online, teacher = Denoiser(toys.online, PLAIN), Denoiser(toys.target, PLAIN)
    for array in archive.matching(f"{case}.*.per_sample"):
        distance, weight, _ = array.removeprefix(f"{case}.").split(".")
        objective = ProgressiveObjective(
            grid=GRID, distance=DISTANCES[distance], weighting=weighting(weight)
        )
        n = int(case.split(".")[1][1:])
        losses = objective.losses_at(online, teacher, toys.x_0, None, i, n, z)
        compare_loss(archive, array.removesuffix(".per_sample"), losses.loss, toys.online)


def compare_continuous(archive: Archive, kind: str, velocity: Velocity, toys: Toys) -> None:
    """The continuous-time losses, their times, and the derivative they are made of."""
    times = UniformTimes(grid=GRID)
    t, z = times_of_draws(archive, kind, times), channels_first(archive.tensor(f"{kind}.z"))
    online, x_0 = toys.consistency, toys.x_0
    x_t = variance_exploding(x_0, z, t)
    v = velocity(x_0, z, x_t, t, None)
    with torch.no_grad():
        f, g = derivative_along(online, x_t, t, v, None)
    archive.compare(f"{kind}.F", channels_last(f), VALUE)
    # Theirs is the derivative along falling time, and the score is -v / t.
    archive.compare(f"{kind}.dF_tangent", channels_last(-g), VALUE)
    archive.compare(f"{kind}.score", channels_last(-v / broadcast_time(t, v)), VALUE)
    for array in archive.matching(f"{kind}.*.per_sample"):
        case = array.removesuffix(".per_sample")
        tangent, stop = case.removeprefix(f"{kind}.").split(".stopgrad_")
        objective = ContinuousObjective(
            times=times,
            velocity=velocity,
            tangent=TANGENTS[tangent],
            weighting=weighting("uniform"),
            stop_gradient=stop == "True",
        )
        losses = objective.losses_at(online, online, x_0, None, t, z)
        compare_loss(archive, case, losses.loss, toys.online)
        compare_quarters(archive, case, t, TANGENTS[tangent].length(f, g))


def times_of_draws(archive: Archive, kind: str, times: UniformTimes) -> Time:
    """The times of draws u between t_min^(1/rho) and t_max^(1/rho)."""
    u = archive.tensor(f"{kind}.u")
    grid = times.grid
    low, high = grid.t_min ** (1 / grid.rho), grid.t_max ** (1 / grid.rho)
    t = times.at((high - u) / (high - low))
    archive.compare(f"{kind}.t", t, TIME)
    return archive.tensor(f"{kind}.t")


def compare_quarters(archive: Archive, case: str, t: Time, losses: PerSample) -> None:
    """Mean losses of four equal parts of the grid, the smallest times first; 0 where there are none."""
    edges = GRID.at(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), 2)
    for quarter in range(4):
        inside = (edges[quarter] <= t) & (t < edges[quarter + 1])
        mean = losses[inside].mean() if inside.any() else torch.zeros(())
        if f"{case}.loss_q{quarter + 1}" in archive:
            archive.compare(f"{case}.loss_q{quarter + 1}", mean, LOSS)


def compare_score_matching(archive: Archive, toys: Toys) -> None:
    """The denoising loss, summed over the image."""
    times = LognormalTimes(p_mean=-1.2, p_std=1.2)
    t, z = times.at(archive.tensor("dsm.t_normal")), channels_first(archive.tensor("dsm.z"))
    objective = DenoisingObjective(
        times=times, distance=SquaredNorm(), weighting=partial(karras, sigma_data=SIGMA_DATA)
    )
    losses = objective.losses_at(Denoiser(toys.online, PLAIN), toys.x_0, None, t, z)
    compare_loss(archive, "dsm", losses.loss, toys.online)
    compare_quarters(archive, "dsm", t, losses.loss)


# ------------------------------------------------------------------------ a run, the real network


def compare_trajectory(archive: Archive) -> None:
    """Consistency training, step by step; the target starts from weights of its own."""
    for array in archive.matching("*.image"):
        case = array.removesuffix(".image")
        folder = archive.path.parent
        online, target = (Toy(folder / f"toy_{role}.safetensors") for role in ("online", "target"))
        networks = {"params": online, "target_params": target, "params_ema": frozen_copy(online)}
        rows: dict[str, list[dict[str, Tensor]]] = {
            role: [network.named("data")] for role, network in networks.items()
        }
        rate, rise = archive.number(f"{case}.lr"), archive.number(f"{case}.warmup", 0)
        optimizer = torch.optim.RAdam(
            online.parameters(),
            lr=rate,
            betas=(archive.number(f"{case}.beta1", 0.9), archive.number(f"{case}.beta2", 0.999)),
            eps=archive.number(f"{case}.eps", 1e-8),
            weight_decay=archive.number(f"{case}.weight_decay", 0),
        )
        clip = archive.number(f"{case}.grad_clip", -1)
        objective = consistency(DataStep())
        x_0, z = channels_first(archive.tensor(array)), channels_first(archive.tensor(f"{case}.z"))
        scales, decays = schedules_of_run(archive, case)
        losses = []
        for s, i in enumerate(archive.tensor(f"{case}.indices")):
            t, r = GRID.neighbours(i, scales[s])
            loss = objective.losses_at(
                Denoiser(online, BOUNDARY), Denoiser(target, BOUNDARY), x_0[s], None, t, r, z[s]
            ).loss.mean()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
            if rise > 0:
                k = float(archive.input(f"{case}.step")[s])
                optimizer.param_groups[0]["lr"] = rate * schedules.rising_rate(k, ramp_steps=rise)
            if clip >= 0:
                torch.nn.utils.clip_grad_norm_(online.parameters(), clip)
            optimizer.step()
            update_average(networks["params_ema"], online, archive.number(f"{case}.ema_rate"))
            update_average(target, online, decays[s])
            for role, network in networks.items():
                rows[role].append(network.named("data"))
        archive.compare(f"{case}.loss", torch.stack(losses), LOSS)
        for weights in archive.matching(f"{case}.w.*"):
            role, name = weights.removeprefix(f"{case}.w.").split(".", 1)
            compare_rows(archive, weights, torch.stack([row[name] for row in rows[role]]))


def compare_rows(archive: Archive, array: str, ours: Tensor) -> None:
    """The values of a parameter after every step, and how far it has moved in all."""
    archive.compare(array, ours, Tolerance(of_norm=2e-5))
    theirs = torch.from_numpy(archive.arrays[array])
    moved = theirs[-1] - theirs[0]
    # The rounding in float32 of a movement that is small beside the value.
    rounding = 2e-7 * float(theirs.norm())
    used = float((ours[-1] - ours[0] - moved).norm()) / (1e-2 * float(moved.norm()) + rounding)
    assert used <= 1, f"{array}: {used:.3g} times the tolerance of the movement"


def schedules_of_run(archive: Archive, case: str) -> tuple[list[int], list[float]]:
    s_0, s_1, total = (
        int(archive.number(f"{case}.{name}")) for name in ("start_scales", "end_scales", "n_iters")
    )
    theirs = [int(n) for n in archive.arrays[f"{case}.num_scales"]]
    scales = [
        jcm_square_root(int(k), near=n, s_0=s_0, s_1=s_1, total_steps=total)
        for k, n in zip(archive.input(f"{case}.step"), theirs, strict=True)
    ]
    archive.compare(f"{case}.num_scales", torch.tensor(scales), EXACT)
    mu_0 = archive.number(f"{case}.start_ema")
    decays = [schedules.decay_as_released(n, s_0=s_0, mu_0=mu_0) for n in scales]
    mu = torch.tensor(decays, dtype=torch.float64)
    archive.compare(f"{case}.target_ema", mu, JCM_DECAY)
    return scales, decays


class WithFlax(nn.Module):
    """The real network as a function of the JAX weights, which therefore receive the gradients."""

    def __init__(self, network: SongUNet, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.network, self.weights = network, song_weights(params, network)
        frequencies = "map_noise.freqs"  # constants of the embedding: no gradient
        self.weights[frequencies] = self.weights[frequencies].detach()

    def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
        output: Data = torch.func.functional_call(self.network, self.weights, (x, c_noise, label))
        return output


def gradient_norm(param: Tensor) -> Tensor:
    return torch.zeros(()) if param.grad is None else param.grad.norm()


def compare_network_losses(archive: Archive) -> None:
    """Consistency training of the real network: l2, N as released; continuous time with stop-gradient."""
    params = read_safetensors(archive.path.parent / "ncsnpp.safetensors")
    params = {name: value.requires_grad_() for name, value in params.items()}
    config = read_json(archive.path.parent / "ncsnpp_config.json")
    grid = KarrasGrid(
        t_min=config.get("t_min", T_MIN),
        t_max=config.get("t_max", T_MAX),
        rho=config.get("rho", RHO),
    )
    boundary = Boundary(
        sigma_data=config.get("data_std", SIGMA_DATA), t_min=grid.t_min, c_noise_scale=NVLABS
    )
    online = Denoiser(WithFlax(jcm_network(archive.path.parent), params), boundary)
    x_0 = channels_first(archive.tensor("image"))
    scales = config.get("num_scales", RELEASED_SCALES)
    t, r = grid.neighbours(archive.tensor("ct.indices"), scales)
    z = channels_first(archive.tensor("ct.z"))
    losses = consistency(DataStep()).losses_at(online, online, x_0, None, t, r, z).loss
    archive.compare("ct.loss", losses.mean(), LOSS)
    losses.mean().backward()
    theirs = [str(name) for name in archive.arrays["param_names"]]
    norms = torch.stack([gradient_norm(params[name]) for name in theirs])
    archive.compare("ct.grad_l2_all", norms, Tolerance(of_each=1e-3, of_largest=1e-5))

    times = UniformTimes(grid=grid)
    objective = ContinuousObjective(
        times=times,
        velocity=DataVelocity(),
        tangent=L2Tangent(),
        weighting=weighting("uniform"),
        stop_gradient=True,
    )
    t, z = times_of_draws(archive, "continuous_ct", times), archive.tensor("continuous_ct.z")
    losses = objective.losses_at(online, online, x_0, None, t, channels_first(z)).loss
    archive.compare("continuous_ct.loss", losses.mean(), LOSS)
