"""Comparisons of TrigFlow, sCT and sCD with FastGen and sCM-mnist; of the posterior-mean target; of dropout masks.

Everything is computed in float64 from the recorded draws.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consistency.denoiser import Denoiser
from consistency.distances import L2, L2OverDimension
from consistency.grids import KarrasGrid
from consistency.networks.dhariwal import DhariwalUNet
from consistency.networks.layers import sinusoidal_features
from consistency.pairs import LognormalTimes, QuantisedTimes, TruncatedLognormalTimes
from consistency.preconditioning import EDM, Scalings, TrigFlow, TrigFlowSlope
from consistency.processes import trigflow, variance_exploding
from consistency.schedules import warm_up
from consistency.steps import BatchStep, DataStep, Velocity, log_posterior
from consistency.steps import DataVelocity as ExplodingVelocity
from consistency.tangents import normalised
from consistency.tensors import Data, Denoise, Label, Time, broadcast_time
from consistency.trigflow import (
    CentralDifference,
    DataVelocity,
    ForwardDerivative,
    TeacherVelocity,
    TrigFlowObjective,
    tangent,
)
from consistency.weightings import LearnedWeighting, inverse_level, uniform
from golden_formulas import NVLABS, RHO
from golden_harness import Archive, Tolerance, read_json, read_safetensors, require_known
from golden_later import Masked, Tolerances, Toy, features, numbered, tolerances
from golden_networks import class_indices, nvlabs_module

TIMES = Tolerance(of_each=1e-10)
DOUBLE = Tolerance(of_norm=1e-9)


# ------------------------------------------------------------------------ networks


class Head(LearnedWeighting):
    """The head of a file's network, with the features of that network."""

    def __init__(
        self, weights: dict[str, Tensor], c_noise: Callable[[Time], Time], phi: Callable
    ) -> None:
        width = weights["logvar_linear.weight"].shape[1]
        super().__init__(preconditioning=lambda t: Scalings(t, t, t, c_noise(t)), width=width)
        self.linear.load_state_dict({n: weights[f"logvar_linear.{n}"] for n in ("weight", "bias")})
        self.features = phi


class Networks(NamedTuple):
    """A network of a file in float64, and its head."""

    network: nn.Module
    head: Head

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of all parameters under the names of the file."""
        own = dict(self.network.named_parameters())
        own |= {n.replace("linear", "logvar_linear"): p for n, p in self.head.named_parameters()}
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in own.items()}

    def reset(self) -> None:
        self.network.zero_grad()
        self.head.zero_grad()


NET_READ = {
    *("img_resolution", "img_channels", "label_dim", "sigma_data", "model_type", "augment_dim"),
    *("model_channels", "channel_mult", "channel_mult_noise", "channel_mult_emb", "num_blocks"),
    *("attn_resolutions", "embedding_type", "encoder_type", "decoder_type", "resample_filter"),
    *("dropout", "drop_precond", "schedule_type", "net_pred_type"),
    *("hidden", "max_t", "label_dropout"),  # change nothing in these numbers
}


def networks_of(folder: Path, name: str, net: dict[str, Any], c_noise: Callable) -> Networks:
    """The network of that name and its head, for the settings `net`."""
    off = {n: v for n, v in net.items() if n not in NET_READ}
    assert not any(off.values()), f"nothing reads the settings {off}"
    path = folder / f"{name}.safetensors"
    weights = read_safetensors(path)
    if net.get("model_type", "ToyNet") == "ToyNet":
        network, phi = Toy(path), features
    else:
        left_out = (*off, "drop_precond", "schedule_type", "net_pred_type", "hidden", "max_t")
        network = nvlabs_module({n: v for n, v in net.items() if n not in left_out})
        own = {n: w for n, w in weights.items() if "logvar" not in n}
        missing, unknown = network.load_state_dict(own, strict=False)
        assert not unknown and all(n.endswith("resample_filter") for n in missing)  # constants
        width = weights["logvar_linear.weight"].shape[1]
        if isinstance(network, DhariwalUNet):
            phi = partial(sinusoidal_features, width=width)
        else:
            phi = network.map_noise
    head = Head(weights, c_noise, phi)
    return Networks(network.double(), head.double())


def load_weights(path: Path) -> nn.Module:
    """The network of one file of weights, for the account of the files."""
    entry = read_json(path.with_name("nets.json"))["real"][path.stem.removesuffix("_teacher")]
    return networks_of(path.parent, path.stem, entry["kwargs"], lambda t: t).network


# ------------------------------------------------------------------------ FastGen


class Flow(nn.Module):
    """The slope under TrigFlow of a rectified flow dx/dt = net(x, t), and its time t_rf = k / (1 + k), k = sigma_data tan t."""

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    def time(self, t: Time) -> Time:
        k = self.sigma_data * t.tan()
        return k / (1 + k)

    def inner(self, x_t: Data, t: Time) -> tuple[Data, Time]:
        """x and t of the network's own process."""
        rf = self.time(t)
        return broadcast_time(((1 - rf) ** 2 + (rf / self.sigma_data) ** 2).sqrt(), x_t) * x_t, rf

    def forward(self, x_t: Data, t: Time, label: Label = None) -> Data:
        x, rf = self.inner(x_t, t)
        x_0 = x - broadcast_time(rf, x) * self.network(x, rf, label)
        return (broadcast_time(t.cos(), x) * x_t - x_0) / broadcast_time(t.sin(), x)


class Exploding(nn.Module):
    """The slope under TrigFlow of a denoiser of the variance-exploding process, whatever its sigma_data."""

    def __init__(self, denoise: Denoise, sigma_data: float) -> None:
        super().__init__()
        self.denoise, self.sigma_data = denoise, sigma_data

    def forward(self, x_t: Data, t: Time, label: Label = None) -> Data:
        cos, sin = broadcast_time(t.cos(), x_t), broadcast_time(t.sin(), x_t)
        return (cos * x_t - self.denoise(x_t / cos, self.sigma_data * t.tan(), label)) / sin


class Recorded:
    """A slope that keeps the times at which it is asked."""

    def __init__(self, slope: Denoise) -> None:
        self.slope, self.times = slope, list[Time]()

    def __call__(self, x_t: Data, t: Time, label: Label = None) -> Data:
        self.times.append(t.detach())
        return self.slope(x_t, t, label)


LOSS_READ = {
    *("use_cd", "tangent_warmup_steps", "tangent_warmup_const", "prior_weighting_enabled"),
    *("g_norm_spatial_invariance", "divide_x_0_spatial_dim", "use_jvp_finite_diff"),
    "jvp_finite_diff_eps",
}
TIMES_READ = {
    *("min_t", "max_t", "time_dist_type", "train_p_mean", "train_p_std", "sigma_data", "quantize"),
    *("shift", "t_list", "log_t_df"),  # of other laws
}
CASE_READ = {
    *("loss_config", "sample_t_cfg", "guidance_scale", "net", "iteration", "student", "teacher"),
    "single_train_step",
}


def compare_fastgen(archive: Archive) -> None:
    """Every case: times, path, velocity, network, derivative, tangent, loss and gradients."""
    for name, case in read_json(archive.path.with_suffix(".json"))["cases"].items():
        require_known(case, CASE_READ, name)
        require_known(case["loss_config"], LOSS_READ, name)
        require_known(case["sample_t_cfg"], TIMES_READ, name)
        compare_fastgen_case(archive, name, case)


def compare_fastgen_case(archive: Archive, name: str, case: dict[str, Any]) -> None:
    config, law, net, folder = (
        case["loss_config"],
        case["sample_t_cfg"],
        case["net"],
        archive.path.parent,
    )
    sd, flows = float(law["sigma_data"]), net.get("schedule_type") == "rf"
    assert flows == (net.get("net_pred_type") == "flow") == (net["drop_precond"] == "both"), name
    level = fastgen_times(archive, name, law, flows=flows)
    t = torch.atan2(level, (1 - level) * sd if flows else torch.full_like(level, sd))
    compare_both(archive, f"{name}.t_hat", t, TIMES, TIMES)
    compare_both(archive, f"{name}.sigma_t", level if flows else sd * t.tan(), TIMES, TIMES)
    label = condition(archive, name)

    def online(which: str) -> tuple[Networks, nn.Module]:
        parts = networks_of(folder, which, net, lambda t: own_time(t, sd, flows=flows))
        return parts, slope_of(parts.network, net, sd)

    student, slope = online(case["student"])
    velocity: Velocity = DataVelocity()
    if config["use_cd"]:
        velocity = teacher_velocity(
            online(case["teacher"])[0].network, net, sd, case["guidance_scale"]
        )
    difference = config["use_jvp_finite_diff"]
    derivative = (
        CentralDifference(share=config["jvp_finite_diff_eps"])
        if difference
        else ForwardDerivative()
    )
    prior = partial(inverse_level, sigma_data=sd) if not flows else lambda t, r: 1 / level
    objective = TrigFlowObjective(
        sigma_data=sd,
        times=LognormalTimes(p_mean=0.0, p_std=1.0),
        velocity=velocity,
        derivative=derivative,
        normalisation=partial(
            normalised,
            c=config["tangent_warmup_const"],
            per_root_dimension=config["g_norm_spatial_invariance"],
        ),
        distance=L2OverDimension() if config["divide_x_0_spatial_dim"] else L2(),
        weighting=prior if config["prior_weighting_enabled"] else uniform,
        head=student.head,
    )
    r = warm_up(case["iteration"], ramp_steps=config["tangent_warmup_steps"])
    assert archive.number(f"{name}.iteration") == case["iteration"]
    near = float(level.min()) < 1.3 * law["min_t"] or float(level.max()) > 0.9 * law["max_t"]
    toy = net["model_type"] == "ToyNet"
    allowed = tolerances(difference=difference, ends=near, toy=toy)
    compare_scm(archive, name, objective, student, slope, t, r, label, allowed)


def teacher_velocity(
    network: nn.Module, net: dict[str, Any], sigma_data: float, guidance: float | None
) -> Velocity:
    """The velocity of a teacher of FastGen: ours for a denoiser, its slope for a flow."""
    w = 1.0 if guidance is None else guidance
    if net.get("schedule_type") != "rf":
        teacher = Denoiser(network, net_scalings(net))
        return TeacherVelocity(teacher=teacher, sigma_data=sigma_data, guidance=w)
    assert w == 1, "a flow with guidance"

    def velocity(x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data:
        with torch.no_grad():
            return Flow(network, sigma_data)(x_t, t, label)

    return velocity


def own_time(t: Time, sigma_data: float, *, flows: bool) -> Time:
    """The time input of a network of FastGen at the angle t: that of a flow, or ln(t_ve) / 4."""
    k = sigma_data * t.tan()
    return k / (1 + k) if flows else NVLABS * k.log()


def net_scalings(net: dict[str, Any]) -> EDM:
    assert net.get("schedule_type") != "rf", "a teacher that is a flow"
    return EDM(sigma_data=net["sigma_data"], c_noise_scale=NVLABS)


def slope_of(network: nn.Module, net: dict[str, Any], sigma_data: float) -> nn.Module:
    """The slope of a network of FastGen under TrigFlow; -sigma_data F_edm where both sigma_data agree."""
    if net.get("schedule_type") == "rf":
        return Flow(network, sigma_data)
    if net["sigma_data"] == sigma_data:
        scalings = TrigFlowSlope(sigma_data=sigma_data, c_noise_scale=NVLABS)
        return Denoiser(network, scalings)
    return Exploding(Denoiser(network, net_scalings(net)), sigma_data)


def fastgen_times(archive: Archive, name: str, law: dict[str, Any], *, flows: bool) -> Time:
    """The noise levels of a case: from their draws, or as they were handed in."""
    if flows or f"{name}.u_draw" not in archive or law["time_dist_type"] != "lognormal":
        # Other laws are those of other methods.
        archive.read.update(
            archive.matching(f"{name}.*t_draw") + archive.matching(f"{name}.u_draw")
        )
        archive.read.update([f"{name}.t"])
        return archive.tensor(f"{name}.t.f64")
    times = TruncatedLognormalTimes(
        p_mean=law["train_p_mean"],
        p_std=law["train_p_std"],
        t_lo=law["min_t"],
        t_hi=law["max_t"],
    )
    level = times.at(archive.tensor(f"{name}.u_draw").double())
    if law["quantize"]:
        grid = KarrasGrid(t_min=law["min_t"], t_max=law["max_t"], rho=RHO)
        level = QuantisedTimes(times=times, grid=grid).nearest(level)
    compare_both(archive, f"{name}.t", level, Tolerance(of_each=1e-8), Tolerance(of_each=1e-8))
    return level


def condition(archive: Archive, name: str) -> Label:
    """Classes given as one-hot rows; those of the unguided pass must be none."""
    if f"{name}.condition" not in archive:
        return None
    if f"{name}.neg_condition" in archive:
        assert not archive.input(f"{name}.neg_condition").any()
    return class_indices(archive.tensor(f"{name}.condition"))


def compare_both(
    archive: Archive, name: str, ours: Tensor, double: Tolerance, single: Tolerance
) -> None:
    """Compare the arrays of both runs, where the file has them."""
    assert name in archive or f"{name}.f64" in archive, f"{name}: missing"
    for array, allowed in ((name, single), (f"{name}.f64", double)):
        if array in archive:
            archive.compare(array, ours, allowed)


def compare_scm(
    archive: Archive,
    name: str,
    objective: TrigFlowObjective,
    student: Networks,
    slope: nn.Module,
    t: Time,
    r: float,
    label: Label,
    allowed: Tolerances,
) -> None:
    """Intermediate values by the parts of the objective, the loss and its gradients by the objective itself."""
    sd = objective.sigma_data
    x_0, unit = (archive.tensor(f"{name}.{n}").double() for n in ("real", "z_draw"))
    z = sd * unit
    x_t = trigflow(x_0, z, t)
    v, recorded = objective.velocity(x_0, z, x_t, t, label), Recorded(slope)
    with torch.no_grad():
        u = slope(x_t, t, label)
        du = objective.derivative(recorded, x_0, z, x_t, t, v, label)
    g = tangent(x_t, t, u, v, du, r)
    bounded = objective.normalisation(g)
    rate = t.cos() * t.sin()
    assert objective.head is not None
    length = (g.flatten(1).norm(dim=1) / bounded.flatten(1).norm(dim=1)) - constant_of(objective)
    per_pixel = L2()(bounded, torch.zeros_like(bounded))
    values = {
        **dict.fromkeys(("x_t_hat", "x_t"), (x_t, allowed.output)),
        "dxt_dt": (v, allowed.output),
        "F_theta": (u / sd, allowed.output),
        "F_theta_jvp": (du / sd, allowed.derivative),
        "tangent_raw": (g, allowed.derivative),
        "tangent_norm": (length, allowed.derivative),
        "tangent": (bounded, allowed.derivative),
        "logvar": (objective.head.log_variance(t), allowed.output),
        "loss_unweighted": (
            per_pixel,
            Tolerance(of_norm=max(5 * (allowed.loss.of_norm or 0), 1e-4)),
        ),
        "warmup": (torch.tensor(r, dtype=torch.float64), TIMES),
        "v_t": (rate, Tolerance(of_norm=1e-6)),
    }
    for value, (ours, single) in values.items():
        for array in archive.matching(f"{name}.{value}") + archive.matching(f"{name}.{value}.f64"):
            double = TIMES if value == "warmup" else allowed.double
            archive.compare(array, ours, double if array.endswith(".f64") else single)
    if isinstance(objective.derivative, CentralDifference):
        after, before = recorded.times
        compare_both(archive, f"{name}.fd_t_plus", after, TIMES, TIMES)
        compare_both(archive, f"{name}.fd_t_minus", before, TIMES, TIMES)
        e = Tolerance(of_each=1e-8)
        compare_both(archive, f"{name}.fd_eps", (after - before) / 2, e, e)
    student.reset()
    losses = objective.losses_at(slope, x_0, label, t, r, unit).loss
    if f"{name}.loss" in archive:
        compare_both(archive, f"{name}.loss", losses, allowed.double, allowed.loss)
    compare_both(archive, f"{name}.loss_mean", losses.mean(), allowed.double, allowed.loss)
    losses.mean().backward()
    compare_gradients(archive, name, student, allowed)


def constant_of(objective: TrigFlowObjective) -> float:
    """c of the normalisation."""
    normalisation: Any = objective.normalisation
    return float(normalisation.keywords["c"])


def compare_gradients(archive: Archive, name: str, student: Networks, allowed: Tolerances) -> None:
    """All gradients joined, or norms of each and single ones."""
    gradients = student.gradients()
    if f"{name}.grad" in archive:
        whole = torch.cat([gradient.flatten() for gradient in gradients.values()])
        compare_both(archive, f"{name}.grad", whole, allowed.double_gradient, allowed.gradient)
        return
    archive.compare_names(f"{name}.param_names", list(gradients))
    names = [str(n) for n in archive.arrays[f"{name}.param_names"]]
    norms = torch.stack([gradients[n].norm() for n in names])
    compare_both(archive, f"{name}.grad_l2_all", norms, allowed.double_gradient, allowed.gradient)
    for array in archive.matching(f"{name}.grad.*"):
        parameter = array.removeprefix(f"{name}.grad.").removesuffix(".f64")
        double = array.endswith(".f64")
        ours = gradients[parameter]
        archive.compare(array, ours, allowed.double_gradient if double else allowed.gradient)


# ------------------------------------------------------------------------ sCM-mnist


MNIST_READ = {
    *("sigma_data", "P_mean", "P_std", "consistency_training", "step", "warmup_steps", "c"),
    *("student", "teacher"),
}


def compare_mnist(archive: Archive) -> None:
    """Every case: a network that is told the angle, unit prior weight, root mean square."""
    for name, case in read_json(archive.path.with_suffix(".json"))["cases"].items():
        require_known(case, MNIST_READ, name)
        sd = float(case["sigma_data"])
        times = LognormalTimes(p_mean=case["P_mean"], p_std=case["P_std"])
        level = times.at(archive.tensor(f"{name}.sigma_draw").double())
        t = torch.atan(level / sd)
        single = Tolerance(of_norm=1e-6)
        compare_both(archive, f"{name}.sigma", level, TIMES, single)
        compare_both(archive, f"{name}.t", t, TIMES, single)
        student = networks_of(archive.path.parent, case["student"], {}, lambda t: t)
        slope = Denoiser(student.network, TrigFlowSlope(sigma_data=sd, c_noise_scale=None))
        velocity: Velocity = DataVelocity()
        if not case["consistency_training"]:
            teacher = networks_of(archive.path.parent, case["teacher"], {}, lambda t: t).network
            velocity = TeacherVelocity(teacher=exploding(teacher, sd), sigma_data=sd)
        objective = TrigFlowObjective(
            sigma_data=sd,
            times=times,
            velocity=velocity,
            derivative=ForwardDerivative(),
            normalisation=partial(normalised, c=case["c"], per_root_dimension=True),
            distance=L2(),
            weighting=uniform,
            head=student.head,
        )
        assert archive.number(f"{name}.step") == case["step"]
        r = warm_up(case["step"], ramp_steps=case["warmup_steps"])
        allowed = tolerances()
        compare_scm(archive, name, objective, student, slope, t, r, None, allowed)
        compare_elementwise(archive, name, objective, t)


def compare_elementwise(archive: Archive, name: str, objective: TrigFlowObjective, t: Time) -> None:
    """e^-l g^2 + l of every number, from the tangent and the head that were compared."""
    assert objective.head is not None
    g = torch.from_numpy(archive.arrays[f"{name}.tangent"]).double()
    log_variance = broadcast_time(objective.head.log_variance(t), g)
    ours = (-log_variance).exp() * g.square() + log_variance
    compare_both(archive, f"{name}.loss_elementwise", ours, DOUBLE, Tolerance(of_norm=2e-5))


def exploding(network: nn.Module, sigma_data: float) -> nn.Module:
    """The denoiser of the variance-exploding process of a network of TrigFlow."""

    class Exploded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoise = Denoiser(network, TrigFlow(sigma_data=sigma_data))

        def forward(self, x: Data, level: Time, label: Label = None) -> Data:
            t = torch.atan(level / sigma_data)
            return self.denoise(broadcast_time(t.cos(), x) * x, t, label)

    return Exploded()


# ------------------------------------------------------------------------ posterior means, schedules


def compare_posterior_means(archive: Archive) -> None:
    """Weights, the step with the posterior mean, and the step with the own image."""
    for array in archive.matching("*.reference"):
        case = array.removesuffix(".reference")
        images = archive.tensor(array).double()
        t, r, x_t = (archive.tensor(f"{case}.{n}").double() for n in ("t", "r", "x_t"))
        own, z = archive.tensor(f"{case}.own_index"), archive.tensor(f"{case}.z").double()
        archive.compare(f"{case}.x_t", variance_exploding(images[own], z, t), DOUBLE)
        logits = log_posterior(x_t, t, images)
        archive.compare(f"{case}.log_weight_unnormalised", logits, DOUBLE)
        archive.compare(f"{case}.weight", logits.softmax(dim=1), DOUBLE)
        stepped, at_zero = [], []
        for i in range(len(x_t)):
            # The batch is the whole reference, each image with this noisy one.
            row = [part[i : i + 1].expand(len(images), *part.shape[1:]) for part in (x_t, t, r)]
            at_zero.append(BatchStep()(images, images, *row[:2], 0 * row[2], None)[0])
            stepped.append(BatchStep()(images, images, *row, None)[0])
        archive.compare(f"{case}.x_r", torch.stack(stepped), DOUBLE)
        mean = torch.stack(at_zero)
        archive.compare(f"{case}.posterior_mean", mean, DOUBLE)
        score = (mean - x_t) / broadcast_time(t, x_t) ** 2
        archive.compare(f"{case}.score", score, Tolerance(of_norm=1e-8))
        one = DataStep()(images[own], z, x_t, t, r, None)
        archive.compare(f"{case}.x_r_one_sample", one, DOUBLE)


def compare_fastgen_schedules(archive: Archive) -> None:
    """The processes of FastGen's schedules `edm` and `trig`, the quantised times, and the wrapper around a network."""
    processes: dict[str, tuple[Callable[[Data, Data, Time], Data], Velocity]] = {
        "edm": (variance_exploding, ExplodingVelocity()),
        "trig": (trigflow, DataVelocity()),
    }
    for kind, (process, velocity) in processes.items():
        name = f"schedule.{kind}"
        if f"{name}.t" not in archive:
            continue
        t = archive.tensor(f"{name}.t")
        x, eps = (archive.tensor(f"{name}.{n}")[:, :, None, None] for n in ("x", "eps"))
        one, none = torch.ones(len(t), 1, 1, 1).double(), torch.zeros(len(t), 1, 1, 1).double()
        pairs = {"alpha": (one, none), "sigma": (none, one)}
        for value, ends in pairs.items():
            archive.compare(f"{name}.{value}", process(*ends, t).flatten(), EXACT)
            slope = velocity(*ends, none, t, None).flatten()
            archive.compare(f"{name}.{value}_prime", slope, EXACT)
        archive.compare(f"{name}.x_t", process(x, eps, t).flatten(1), EXACT)
        archive.compare(f"{name}.velocity", velocity(x, eps, x, t, None).flatten(1), EXACT)
        if f"{name}.quantize_in" in archive:
            law = LognormalTimes(p_mean=0.0, p_std=1.0)
            ends = [float(t.min()), float(t.max())]
            grid = KarrasGrid(t_min=ends[0], t_max=ends[1], rho=RHO)
            near = QuantisedTimes(times=law, grid=grid).nearest(
                archive.tensor(f"{name}.quantize_in")
            )
            archive.compare(f"{name}.quantize_out", near, TIMES)
    compare_wrapper(archive)


EXACT = Tolerance(of_each=1e-12, absolute=1e-14)


def compare_wrapper(archive: Archive) -> None:
    """x_t, t, F and the network's output seen through TrigFlow, of denoisers and of a flow."""
    if "trigflow.t_hat" not in archive:
        return
    t, x = archive.tensor("trigflow.t_hat"), archive.tensor("trigflow.x_t_hat").double()
    single, ends = Tolerance(of_norm=1e-5), Tolerance(of_norm=2e-4)
    for name, case in read_json(archive.path.with_suffix(".json"))["cases"].items():
        if not name.startswith("trigflow."):
            continue
        sd, flows = float(case["sigma_data"]), case.get("schedule_type") == "rf"
        net = {"drop_precond": None, **case}
        parts = networks_of(
            archive.path.parent,
            case["net"],
            {n: v for n, v in case.items() if n != "net"},
            lambda t, sd=sd, flows=flows: own_time(t, sd, flows=flows),
        )
        raw: list[Tensor] = []
        parts.network.register_forward_hook(lambda _, __, output, raw=raw: raw.append(output))
        with torch.no_grad():
            slope = slope_of(parts.network, net, sd)
            u = slope(x, t, None)
            if flows:
                inner, own = slope.inner(x, t)
            else:
                inner, own = x / broadcast_time(t.cos(), x), sd * t.tan()
                seen = TeacherVelocity(
                    teacher=Denoiser(parts.network, net_scalings(case)), sigma_data=sd
                )
                archive.compare(f"{name}.F", seen(x, x, x, t, None) / sd, ends)
        archive.compare(f"{name}.x_t", inner, single)
        compare_both(archive, f"{name}.t", own, TIMES, TIMES)
        archive.compare(f"{name}.F", u / sd, ends)
        cos, sin = broadcast_time(t.cos(), x), broadcast_time(t.sin(), x)
        archive.compare(f"{name}.x0", cos * x - sin * u, single)
        archive.compare(f"{name}.field", raw[0], single)
        compare_both(archive, f"{name}.logvar", parts.head.log_variance(t), DOUBLE, single)


# ------------------------------------------------------------------------ dropout


def compare_dropout(path: Path) -> int:
    """The masks of sCT and sCD: as released without `shared_dropout`, and one for all passes with it."""
    content = read_json(path)
    found = {n: m for n, m in content["masks"].items() if "sCT" in n or "sCD" in n}
    for name, masks in found.items():
        difference, distils = "finite difference" in name, "sCD" in name
        for shared in (False, True):
            torch.manual_seed(0)
            online, teacher = list[Tensor](), list[Tensor]()
            velocity: Velocity = DataVelocity()
            if distils:
                velocity = TeacherVelocity(
                    teacher=Denoiser(Masked(teacher), EDM(sigma_data=0.5, c_noise_scale=NVLABS)),
                    sigma_data=0.5,
                )
            objective = TrigFlowObjective(
                sigma_data=0.5,
                times=LognormalTimes(p_mean=0.0, p_std=1.0),
                velocity=velocity,
                derivative=CentralDifference(share=1e-3) if difference else ForwardDerivative(),
                normalisation=partial(normalised, c=0.1, per_root_dimension=True),
                distance=L2(),
                weighting=uniform,
                head=None,
                shared_dropout=shared,
            ).train()
            slope = Denoiser(
                Masked(online), TrigFlowSlope(sigma_data=0.5, c_noise_scale=NVLABS)
            ).train()
            x, t = torch.ones(2, 1, 2, 2), torch.tensor([0.3, 1.2])
            objective.losses_at(slope, x, None, t, 1.0, x)
            passes = [mask for mask in masks if mask != "none"]
            assert ("none" in masks) == bool(teacher)
            assert all(bool((mask == 1).all()) for mask in teacher)
            expected = [0] * len(passes) if shared else passes
            assert numbered(online) == expected, (name, shared, numbered(online))
    return len(found)
