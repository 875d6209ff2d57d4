"""Laws of the objectives, with data and functions known in closed form."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from analytic import DOUBLE, THREE_MODES, Gaussian, normal, times
from consistency import trigflow
from consistency.average_velocity import MeanFlowObjective
from consistency.averaging import frozen_copy
from consistency.denoiser import Denoiser
from consistency.derivatives import ExactDerivative, FiniteDifference
from consistency.distances import L1, L2, Adaptive, Distance, PseudoHuber, SquaredNorm
from consistency.errors import UserError
from consistency.flow_pairs import FirstPairs
from consistency.grids import KarrasGrid
from consistency.networks.mlp import MLP
from consistency.objectives import (
    ConsistencyObjective,
    ContinuousObjective,
    DenoisingObjective,
    Objective,
    ProgressiveObjective,
    TruncatedObjective,
)
from consistency.pairs import LognormalTimes, RatioPairs, UniformPairs, UniformTimes
from consistency.preconditioning import Boundary
from consistency.randomness import Share
from consistency.solvers import euler_step, heun_step
from consistency.steps import (
    DataStep,
    DataVelocity,
    FlowVelocity,
    Step,
    TeacherStep,
    TeacherVelocity,
)
from consistency.tangents import HessianTangent, L1Tangent, L2Tangent, normalised
from consistency.tensors import Data, Label, PerSample, Time
from consistency.trigflow import TrigFlowObjective
from consistency.weightings import inverse_gap, karras, snr, truncated_snr, uniform

GRID = KarrasGrid(t_min=0.002, t_max=80.0, rho=7.0)
BOUNDARY = Boundary(sigma_data=0.5, t_min=0.002, c_noise_scale=0.25)
LAW = Gaussian(0.0, 0.5)
SHAPE = (32, 1, 2, 2)


class Dropping(nn.Module):
    """A network that drops units."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(channels=4, width=16, depth=2, second_time="gap")
        nn.init.normal_(self.inner.last.weight)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
        return self.inner(self.dropout(x), c_noise, label)


def network(seed: int = 0, *, drop: bool = False) -> Denoiser:
    torch.manual_seed(seed)
    module: nn.Module = Dropping()
    if not drop:
        module = module.inner  # type: ignore[assignment]
    return Denoiser(module, BOUNDARY).double()


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def consistency(
    *, step: Step | None = None, distance: Distance | None = None, stop_gradient: bool = True
) -> ConsistencyObjective:
    return ConsistencyObjective(
        pairs=UniformPairs(grid=GRID),
        step=step or DataStep(),
        distance=distance or L2(),
        weighting=uniform,
        stop_gradient=stop_gradient,
    )


def continuous(*, stop_gradient: bool) -> ContinuousObjective:
    return ContinuousObjective(
        times=UniformTimes(grid=GRID),
        velocity=DataVelocity(),
        tangent=L2Tangent(),
        weighting=uniform,
        stop_gradient=stop_gradient,
    )


def progressive() -> ProgressiveObjective:
    return ProgressiveObjective(grid=GRID, distance=L2(), weighting=truncated_snr)


def denoising() -> DenoisingObjective:
    return DenoisingObjective(
        times=LognormalTimes(p_mean=-1.2, p_std=1.2), distance=L2(), weighting=snr
    )


def simplified(derivative: trigflow.Derivative | None = None) -> TrigFlowObjective:
    return TrigFlowObjective(
        sigma_data=0.5,
        times=LognormalTimes(p_mean=-1.0, p_std=1.4),
        velocity=trigflow.DataVelocity(),
        derivative=derivative or trigflow.ForwardDerivative(),
        normalisation=partial(normalised, c=0.1, per_root_dimension=False),
        distance=L2(),
        weighting=uniform,
        head=None,
    )


def truncated() -> TruncatedObjective:
    return TruncatedObjective(
        first_stage=network(2),
        t_split=1.0,
        boundary_share=0.25,
        boundary_weight=0.1,
        pairs=RatioPairs(times=LognormalTimes(p_mean=1.0, p_std=1.0), k=8.0, b=1.0),
        step=DataStep(),
        distance=L2(),
        weighting=inverse_gap,
    )


def velocities() -> MeanFlowObjective:
    return MeanFlowObjective(
        pairs=FirstPairs(mean_t=-0.4, std_t=1.0, mean_r=-0.4, std_r=1.0, equal=0.25),
        velocity=FlowVelocity(),
        derivative=ExactDerivative(),
        distance=Adaptive(p=0.75, c=1e-3),
    )


ALL: dict[str, Callable[[], nn.Module]] = {
    "consistency": consistency,
    "continuous": lambda: continuous(stop_gradient=False),
    "continuous_stop_gradient": lambda: continuous(stop_gradient=True),
    "progressive": progressive,
    "denoising": denoising,
    "simplified": simplified,
    "truncated": truncated,
    "velocities": velocities,
}
every = pytest.mark.parametrize("build", ALL.values(), ids=ALL.keys())


# ------------------------------------------------------------------------ laws of all


@every
def test_an_objective_is_a_function_of_its_arguments(build: Callable[[], nn.Module]) -> None:
    objective, online, target = build(), network().float(), network(1).float()
    assert isinstance(objective, Objective)
    x_0 = 0.5 * normal(*SHAPE).float()
    first, again, other = (
        objective(online, target, x_0, None, 18, generator(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.loss, other.loss)
    for name in ("loss", "t", "r"):
        assert getattr(first, name).shape == (32,)
        assert getattr(first, name).dtype == torch.float32


@every
def test_a_part_of_a_batch_uses_the_times_and_noise_of_its_rows(
    build: Callable[[], nn.Module],
) -> None:
    objective, online, target = build(), network(), network(1)
    x_0 = 0.5 * normal(*SHAPE)
    whole = objective(online, target, x_0, None, 18, generator())
    for number, part in enumerate(x_0.split(8)):
        share = Share(number, 4)
        found = objective(online, target, part, None, 18, generator(), share)
        for name in ("loss", "t", "r"):
            expected = getattr(whole, name)[share.rows(8)]
            torch.testing.assert_close(getattr(found, name), expected, rtol=1e-5, atol=1e-6)


@every
def test_only_the_online_network_takes_gradients(build: Callable[[], nn.Module]) -> None:
    online, target = network().float(), network(1).float()
    x_0 = 0.5 * normal(*SHAPE).float()
    build()(online, target, x_0, None, 18, generator()).loss.mean().backward()
    assert any(float(p.grad.norm()) > 0 for p in online.parameters() if p.grad is not None)
    assert all(p.grad is None for p in target.parameters())


@every
def test_the_loss_of_a_sample_does_not_depend_on_the_others(build: Callable[[], nn.Module]) -> None:
    """Another last image changes the last loss alone."""
    objective, online = build(), network().float()
    x_0 = 0.5 * normal(*SHAPE).float()
    changed = x_0.clone()
    changed[-1] += 1
    a, b = (objective(online, online, x, None, 18, generator()).loss for x in (x_0, changed))
    assert torch.allclose(a[:-1], b[:-1], rtol=1e-4, atol=0)
    assert not torch.allclose(a[-1:], b[-1:], rtol=1e-4, atol=0)


@every
def test_a_forward_mode_derivative_needs_all_activations(build: Callable[[], nn.Module]) -> None:
    objective, saving = build(), network().network
    assert isinstance(objective, Objective)
    objective.require_suited(saving)
    saving.recompute = True
    if not objective.forward_mode:
        objective.require_suited(saving)
        return
    with pytest.raises(UserError, match="checkpoint_activations=true"):
        objective.require_suited(saving)


def test_only_exact_derivatives_are_of_forward_mode() -> None:
    names = {"continuous", "continuous_stop_gradient", "simplified", "velocities"}
    assert {name for name, build in ALL.items() if build().forward_mode} == names
    velocity, pairs = FlowVelocity(), FirstPairs(mean_t=0, std_t=1, mean_r=0, std_r=1, equal=0.25)
    parts: dict[str, Any] = {"velocity": velocity, "pairs": pairs, "distance": L2()}
    assert not MeanFlowObjective(**parts, derivative=FiniteDifference(e=1e-4)).forward_mode
    assert not simplified(trigflow.CentralDifference(share=1e-3)).forward_mode


# ------------------------------------------------------------------------ consistency losses


def test_forward_draws_pairs_and_noise_and_calls_losses_at() -> None:
    """forward draws the pair first, then the noise, and calls losses_at."""
    objective, online, target = consistency(), network().float(), network(1).float()
    x_0 = 0.5 * normal(*SHAPE).float()
    draw = generator()
    t, r = objective.pairs(32, 18, draw)
    z = torch.randn(SHAPE, generator=draw)
    ours = objective(online, target, x_0, None, 18, generator())
    x_t, x_r = x_0 + t[:, None, None, None] * z, x_0 + r[:, None, None, None] * z
    expected = (online(x_t, t) - target(x_r, r)).square().flatten(1).mean(1)
    assert torch.equal(ours.t, t)
    assert torch.equal(ours.r, r)
    assert torch.allclose(ours.loss, expected)


def test_both_passes_drop_the_same_units() -> None:
    """A loss between one network and itself at one time is 0 only then."""
    online = network(drop=True).train()
    objective = consistency()
    t, x_0, z = times(32, 3.0), 0.5 * normal(*SHAPE), normal(*SHAPE, seed=1)
    losses = objective.losses_at(online, online, x_0, None, t, t, z).loss
    assert torch.equal(losses, torch.zeros_like(losses))
    again = objective.losses_at(online, network(drop=True).train(), x_0, None, t, t, z).loss
    assert torch.equal(again, torch.zeros_like(again))


def test_the_continuous_passes_drop_the_same_units() -> None:
    """<f, g> of the two passes is that of one pass that yields both."""
    torch.manual_seed(3)
    online = network(drop=True).train()
    objective = continuous(stop_gradient=True)
    t, x_0, z = times(32, 3.0), 0.5 * normal(*SHAPE), normal(*SHAPE, seed=1)
    torch.manual_seed(4)
    ours = objective.losses_at(online, online, x_0, None, t, z).loss
    torch.manual_seed(4)
    x_t = x_0 + 3.0 * z
    f, g = torch.func.jvp(lambda x, s: online(x, s), (x_t, t), (z, torch.ones_like(t)))
    assert torch.allclose(ours, (f * g).sum((1, 2, 3)))


@pytest.mark.parametrize("distance", [SquaredNorm(), PseudoHuber(c=0.03, per_root_dimension=False)])
def test_with_r_0_the_loss_is_denoising(distance: Distance) -> None:
    """Stage 0 of ECT for t below ln 7: the target is the clean image [Geng et al. 2024, Section 3.2]."""
    online = network()
    x_0, z = 0.5 * normal(*SHAPE), normal(*SHAPE, seed=1)
    t = torch.linspace(0.01, 1.9, 32, dtype=DOUBLE)
    law = RatioPairs(times=LognormalTimes(p_mean=-1.1, p_std=2.0), k=8.0, b=1.0)
    r = law.ratio_map(t, 2)
    assert torch.equal(r, torch.zeros_like(r))
    tuning = ConsistencyObjective(
        pairs=law, step=DataStep(), distance=distance, weighting=inverse_gap
    )
    plain = DenoisingObjective(
        times=LognormalTimes(p_mean=-1.1, p_std=2.0), distance=distance, weighting=inverse_gap
    )
    ours = tuning.losses_at(online, online, x_0, None, t, r, z).loss
    assert torch.allclose(ours, plain.losses_at(online, x_0, None, t, z).loss)
    assert torch.isfinite(ours).all()


def test_the_weight_belongs_to_the_noisier_time() -> None:
    objective = ConsistencyObjective(
        pairs=UniformPairs(grid=GRID), step=DataStep(), distance=L2(), weighting=snr
    )
    x_0, z, t, r = 0.5 * normal(*SHAPE), normal(*SHAPE, seed=1), times(32, 4.0), times(32, 2.0)
    plain = consistency().losses_at(network(), network(1), x_0, None, t, r, z).loss
    weighed = objective.losses_at(network(), network(1), x_0, None, t, r, z).loss
    assert torch.allclose(weighed, plain / 16)


def test_without_stop_gradient_the_target_takes_one_too() -> None:
    online, target = network(), network(1)
    objective = consistency(stop_gradient=False)
    x_0, z, t, r = 0.5 * normal(*SHAPE), normal(*SHAPE, seed=1), times(32, 4.0), times(32, 2.0)
    objective.losses_at(online, target, x_0, None, t, r, z).loss.mean().backward()
    assert any(float(p.grad.norm()) > 0 for p in target.parameters() if p.grad is not None)


def test_the_exact_function_has_no_distillation_loss() -> None:
    """With a teacher's exact solution in place of a solver, f(x_t, t) = f(x_r, r)."""
    for law in (LAW, THREE_MODES):

        def exact(
            x_t: Data,
            t: Time,
            label: Label = None,
            law: Gaussian = law,  # type: ignore[assignment]
        ) -> Data:
            return law.flow(x_t, t, torch.full_like(t, 0.002))

        def solve(
            x_0: Data,
            z: Data,
            x_t: Data,
            t: Time,
            r: Time,
            label: Label,
            law: Gaussian = law,  # type: ignore[assignment]
        ) -> Data:
            return law.flow(x_t, t, r)

        x_0, z = law.flow(normal(*SHAPE), times(32, 1.0), times(32, 0.5)), normal(*SHAPE, seed=1)
        t, r = times(32, 4.0), times(32, 2.0)
        losses = consistency(step=solve).losses_at(exact, exact, x_0, None, t, r, z).loss
        assert float(losses.max()) < 1e-18


# ------------------------------------------------------------------------ fixed points


class Gains(nn.Module):
    """f(x, t_i) = a_i x with one free a per sample at t; the target's at r is given."""

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, x: Data, t: Time, label: Label = None) -> Data:
        return self.gain[:, None, None, None] * x


def gradients(step: Step, gain: float, target_gain: float, t: float, r: float) -> Tensor:
    """The gradient of the loss of each of many samples with respect to its own gain at t."""
    count = 200_000
    online, target = Gains(torch.full((count,), gain, dtype=DOUBLE)), target_gain
    objective = consistency(step=step, distance=SquaredNorm())
    x_0, z = LAW.sample(count, 1, 1, 1), normal(count, 1, 1, 1, seed=7)
    losses = objective.losses_at(
        online, lambda x, s, label=None: target * x, x_0, None, times(count, t), times(count, r), z
    )
    losses.loss.sum().backward()
    assert online.gain.grad is not None
    return online.gain.grad


def vanishes(values: Tensor) -> bool:
    """Whether the mean is within 4 standard errors, or rounding, of 0."""
    error = float(values.std() / len(values) ** 0.5)
    return abs(float(values.mean())) < 4 * error + 1e-12


@pytest.mark.parametrize("i", [2, 9, 16])
def test_the_gradient_vanishes_at_the_fixed_point_of_training(i: int) -> None:
    """a_{n+1} = a_n (s^2 + t_n t_{n+1}) / (s^2 + t_{n+1}^2), and not beside it."""
    t, r = (float(time) for time in GRID.points(18)[i : i + 2])
    s_2, before, h = LAW.std**2, 0.7, t - r
    first = before * (s_2 + r * t) / (s_2 + t**2)
    up, low = t / (s_2 + t**2), r / (s_2 + r**2)
    second = before * (1 - h / 2 * (up + low * (1 - h * up)))
    for step, fixed in (
        (DataStep(), first),
        (TeacherStep(teacher=LAW.denoise, solver=euler_step), first),
        (TeacherStep(teacher=LAW.denoise, solver=heun_step), second),
    ):
        assert vanishes(gradients(step, fixed, before, t, r))
        assert not vanishes(gradients(step, 1.02 * fixed, before, t, r))


# Root-mean-square error of the best possible map in standard deviations of the data.
BEST_CT = {11: 0.333, 21: 0.223, 41: 0.161}
BEST_CD = {11: 0.246, 21: 0.142, 41: 0.082, 81: 0.046}


def interpolated(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """A function given at ascending knots, straight between them and beyond."""
    right = torch.searchsorted(knots, x).clamp(1, len(knots) - 1)
    left = right - 1
    way = (x - knots[left]) / (knots[right] - knots[left])
    return values[left] + way * (values[right] - values[left])


def best_map_error(n: int, mean_of_target: Callable[..., Tensor]) -> float:
    """What a loss of squares ends at on the mixture, from t_min up, one time of the grid after another."""
    spread = torch.linspace(-6, 6, 6001, dtype=DOUBLE)
    points = GRID.points(n).flip(0)
    knots = spread * (points[0] ** 2 + 0.4).sqrt()
    values = knots.clone()
    for r, t in itertools.pairwise(points):
        x_t = spread * (t**2 + 0.4).sqrt()
        values = mean_of_target(x_t, float(t), float(r), knots, values)
        knots = x_t
    start = 80 * torch.special.ndtri((torch.arange(8000, dtype=DOUBLE) + 0.5) / 8000)
    image = start[:, None, None, None]
    exact = THREE_MODES.flow(image, times(8000, 80.0), times(8000, 0.002)).flatten()
    error = interpolated(start, knots, values) - exact
    return float(error.square().mean().sqrt()) / THREE_MODES.std


def mean_of_distillation(x_t: Tensor, t: float, r: float, knots: Tensor, values: Tensor) -> Tensor:
    """f(x_r) with x_r from the teacher."""
    image, count = x_t[:, None, None, None], len(x_t)
    step = TeacherStep(teacher=THREE_MODES.denoise, solver=euler_step)
    x_r = step(image, image, image, times(count, t), times(count, r), None)
    return interpolated(x_r.flatten(), knots, values)


def mean_of_training(x_t: Tensor, t: float, r: float, knots: Tensor, values: Tensor) -> Tensor:
    """E[f(x_r) | x_t] over x_0 given x_t, by Gauss-Hermite quadrature in every mode of the mixture."""
    # Golub and Welsch 1969: nodes and weights from the eigenvectors of the recurrence.
    band = torch.diag(torch.arange(1, 16, dtype=DOUBLE).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(band + band.T)
    weights = vectors[0] ** 2
    count, total = len(x_t), torch.zeros_like(x_t)
    chance = THREE_MODES.posterior(x_t, torch.full_like(x_t, t))
    for mode, (m, s) in enumerate(zip(THREE_MODES.means, THREE_MODES.stds, strict=True)):
        variance = s**2 + t**2
        mean = m + s**2 / variance * (x_t - m)
        for node, weight in zip(nodes, weights, strict=True):
            x_0 = (mean + node * s * t / variance.sqrt())[:, None, None, None]
            z = (x_t[:, None, None, None] - x_0) / t
            x_r = DataStep()(x_0, z, x_0, times(count, t), times(count, r), None)
            total += chance[:, mode] * weight * interpolated(x_r.flatten(), knots, values)
    return total


@pytest.mark.parametrize(("n", "error"), BEST_CD.items())
def test_distillation_of_a_mixture_ends_at_the_tabled_error(n: int, error: float) -> None:
    assert best_map_error(n, mean_of_distillation) == pytest.approx(error, abs=0.0016)


@pytest.mark.parametrize(("n", "error"), BEST_CT.items())
def test_training_on_a_mixture_ends_at_the_tabled_error(n: int, error: float) -> None:
    """Farther from the exact map than distillation: the spread of the target blurs between the modes."""
    assert best_map_error(n, mean_of_training) == pytest.approx(error, abs=0.0016)


# ------------------------------------------------------------------------ continuous time


def weights_of(network: Denoiser, losses: PerSample) -> Tensor:
    """The gradient of the mean loss, all parameters in one row."""
    grads = torch.autograd.grad(losses.mean(), list(network.parameters()))
    return torch.cat([g.flatten() for g in grads])


def test_small_steps_lead_to_the_continuous_loss() -> None:
    """grad ||f - sg f_r||^2 / 2(t - r) -> grad <f, sg df/dt>, with an error in proportion to t - r."""
    online = network()
    target = frozen_copy(online)
    x_0, z = 0.5 * normal(*SHAPE), normal(*SHAPE, seed=1)
    t = torch.linspace(0.5, 5.0, 32, dtype=DOUBLE)
    limit = continuous(stop_gradient=True).losses_at(online, target, x_0, None, t, z).loss
    expected = weights_of(online, limit)
    discrete = ConsistencyObjective(
        pairs=UniformPairs(grid=GRID),
        step=DataStep(),
        distance=SquaredNorm(),
        weighting=inverse_gap,
    )
    errors = []
    for gap in (1e-2, 1e-3, 1e-4):
        losses = discrete.losses_at(online, target, x_0, None, t, t - gap, z).loss / 2
        errors.append(float((weights_of(online, losses) - expected).norm() / expected.norm()))
    assert errors[0] < 0.1
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("tangent", [L1Tangent(), L2Tangent(), HessianTangent(distance=L2())])
def test_the_exact_function_has_no_continuous_loss(tangent: nn.Module) -> None:
    objective = ContinuousObjective(
        times=UniformTimes(grid=GRID),
        velocity=TeacherVelocity(teacher=LAW.denoise),
        tangent=tangent,
        weighting=uniform,
        stop_gradient=False,
    )

    def exact(x_t: Data, t: Time, label: Label = None) -> Data:
        return LAW.flow(x_t, t, torch.full_like(t, 0.002))

    x_0, z = LAW.sample(*SHAPE), normal(*SHAPE, seed=1)
    t = GRID.points(32)
    assert float(objective.losses_at(exact, exact, x_0, None, t, z).loss.max()) < 1e-10
    # Half a solution has a tangent that does not vanish.
    half = objective.losses_at(LAW.denoise, LAW.denoise, x_0, None, t, z).loss
    assert float(half.max()) > 1e-3


def test_a_stop_gradient_needs_a_metric_tensor() -> None:
    with pytest.raises(UserError, match="L2Tangent or HessianTangent"):
        ContinuousObjective(
            times=UniformTimes(grid=GRID),
            velocity=DataVelocity(),
            tangent=L1Tangent(),
            weighting=uniform,
            stop_gradient=True,
        )


# ------------------------------------------------------------------------ the others


class Kept(nn.Module):
    """A distance that keeps what it was given."""

    def forward(self, x: Data, y: Data) -> PerSample:
        self.x, self.y = x, y
        return (x - y).square().mean((1, 2, 3))


@pytest.mark.parametrize("n", [1, 4, 64])
def test_one_step_of_the_student_lands_where_two_of_the_teacher_do(n: int) -> None:
    kept, teacher = Kept(), network(1)
    objective = ProgressiveObjective(grid=GRID, distance=kept, weighting=truncated_snr)
    i = torch.arange(32) % n
    x_0, z = 0.5 * normal(*SHAPE), normal(*SHAPE, seed=1)
    losses = objective.losses_at(network(), teacher, x_0, None, i, n, z)
    t, middle, r = (GRID.at(i + part, n + 1).float() for part in (0, 0.5, 1))
    assert torch.equal(losses.t, t)
    assert torch.equal(losses.r, r)
    x_t = x_0 + t[:, None, None, None] * z
    twice = euler_step(teacher, euler_step(teacher, x_t, t, middle), middle, r)
    once = euler_step(lambda x, s, label=None: kept.y, x_t, t, r)
    assert torch.allclose(once, twice, atol=1e-5)


def test_progressive_steps_reach_from_t_max_to_t_min() -> None:
    online = network().float()
    losses = progressive()(online, online, torch.zeros(256, 1, 2, 2), None, 4, generator())
    assert float(losses.t.max()) == 80.0
    assert float(losses.r.min()) == pytest.approx(0.002)


@pytest.mark.parametrize("distance", [L2(), L1()])
def test_the_denoising_loss_is_least_at_the_exact_denoiser(distance: Distance) -> None:
    """In the mean of many draws, against denoisers a little off; for l1 because the posterior is symmetric."""
    objective = DenoisingObjective(
        times=LognormalTimes(p_mean=-1.2, p_std=1.2),
        distance=distance,
        weighting=lambda t, r: karras(t, r, sigma_data=0.5),
    )
    x_0, z = LAW.sample(20_000, 1, 1, 1), normal(20_000, 1, 1, 1, seed=1)
    t = objective.times.at(normal(20_000, seed=2))

    def mean_loss(factor: float) -> float:
        def denoise(x_t: Data, t: Time, label: Label = None) -> Data:
            return factor * LAW.denoise(x_t, t)

        return float(objective.losses_at(denoise, x_0, None, t, z).loss.mean())

    assert mean_loss(1.0) < min(mean_loss(0.9), mean_loss(1.1))
