"""Laws of sCT and sCD, with data and functions known in closed form."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Generator, Tensor, nn

from analytic import DOUBLE, Gaussian, Points, normal, times
from consistency.denoiser import Denoiser
from consistency.distances import L2, L2OverDimension
from consistency.grids import KarrasGrid
from consistency.networks.mlp import MLP
from consistency.objectives import ContinuousObjective
from consistency.pairs import LognormalTimes, QuantisedTimes, TruncatedLognormalTimes
from consistency.preconditioning import EDM, Boundary, TrigFlow, TrigFlowSlope
from consistency.processes import trigflow, variance_exploding
from consistency.schedules import warm_up
from consistency.solvers import euler_step
from consistency.steps import BatchStep
from consistency.steps import DataVelocity as ExplodingVelocity
from consistency.tangents import L2Tangent, normalised
from consistency.tensors import Data, Label, Time, broadcast_time
from consistency.trigflow import (
    CentralDifference,
    DataVelocity,
    Derivative,
    ForwardDerivative,
    TeacherVelocity,
    TrigFlowObjective,
    tangent,
)
from consistency.weightings import LearnedWeighting, Weighting, inverse_level, uniform

SD = 0.5
SHAPE = (6, 1, 2, 2)
ANGLES = torch.linspace(0.05, 1.55, SHAPE[0], dtype=DOUBLE)
SLOPE = TrigFlowSlope(sigma_data=SD, c_noise_scale=0.25)
ENDS = EDM(sigma_data=SD, c_noise_scale=0.25)


def network(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    module = MLP(channels=4, width=16, depth=2)
    nn.init.normal_(module.last.weight)
    return module.double()


def objective(
    *,
    weighting: Weighting = uniform,
    derivative: Derivative | None = None,
    normalisation: Callable[[Data], Data] = lambda g: g,
    head: LearnedWeighting | None = None,
    shared_dropout: bool = True,
) -> TrigFlowObjective:
    return TrigFlowObjective(
        sigma_data=SD,
        times=LognormalTimes(p_mean=-1.0, p_std=1.4),
        velocity=DataVelocity(),
        derivative=derivative or ForwardDerivative(),
        normalisation=normalisation,
        distance=L2(),
        weighting=weighting,
        head=head,
        shared_dropout=shared_dropout,
    )


def exact_slope(std: float) -> Callable[..., Data]:
    """u = (cos x - f) / sin of the consistency function f = s x / sqrt(cos^2 s^2 + sin^2 sigma_data^2) of Gaussian data."""

    def slope(x_t: Data, t: Time, label: Label = None) -> Data:
        cos, sin = broadcast_time(t.cos(), x_t), broadcast_time(t.sin(), x_t)
        f = std * x_t / (cos**2 * std**2 + sin**2 * SD**2).sqrt()
        return (cos * x_t - f) / sin

    return slope


@pytest.mark.parametrize("std", [SD, 0.8])
def test_the_tangent_of_the_exact_function_vanishes(std: float) -> None:
    slope, teacher = exact_slope(std), Gaussian(0.0, std)
    x_t, t = normal(*SHAPE), ANGLES
    v = TeacherVelocity(teacher=teacher.denoise, sigma_data=SD)(x_t, x_t, x_t, t, None)
    variance = t.cos() ** 2 * std**2 + t.sin() ** 2 * SD**2
    exact = t.sin() * t.cos() * (SD**2 - std**2) / variance
    assert torch.allclose(v, broadcast_time(exact, x_t) * x_t, atol=1e-13)
    u, du = slope(x_t, t), ForwardDerivative()(slope, x_t, x_t, x_t, t, v, None)
    assert float(tangent(x_t, t, u, v, du, 1.0).abs().max()) < 1e-13
    assert float(tangent(x_t, t, u, v, SD * du, 1.0).abs().max()) > 0.01


def test_the_difference_tends_to_the_derivative_in_second_order() -> None:
    """Along the path of the data, whose velocity is that of consistency training."""
    x_0, z, t = SD * normal(*SHAPE), SD * normal(*SHAPE, seed=1), ANGLES[:-1]
    x_0, z = x_0[:-1], z[:-1]
    x_t, slope = trigflow(x_0, z, t), Denoiser(network(), SLOPE)
    v = DataVelocity()(x_0, z, x_t, t, None)
    with torch.no_grad():
        exact = ForwardDerivative()(slope, x_0, z, x_t, t, v, None)
        errors = [
            float((CentralDifference(share=share)(slope, x_0, z, x_t, t, v, None) - exact).norm())
            for share in (1e-2, 5e-3, 2.5e-3)
        ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_the_difference_follows_the_data_in_distillation_too() -> None:
    x_0, z, t = SD * normal(*SHAPE), SD * normal(*SHAPE, seed=1), ANGLES
    x_t, slope = trigflow(x_0, z, t), Denoiser(network(), SLOPE)
    other = normal(*SHAPE, seed=2)
    with torch.no_grad():
        first, second = (
            [
                part(slope, x_0, z, x_t, t, v, None)
                for v in (DataVelocity()(x_0, z, x_t, t, None), other)
            ]
            for part in (CentralDifference(share=1e-3), ForwardDerivative())
        )
    assert torch.equal(*first)
    assert not torch.allclose(*second)


def test_an_edm_network_under_trigflow_is_the_same_with_the_other_sign() -> None:
    """F_trig(x, t) = -F_edm(x / sigma_data, ln(sigma_data tan t) / 4), and f is its denoiser's estimate."""
    inner, x_t, t = network(), SD * normal(*SHAPE), ANGLES
    u = Denoiser(inner, SLOPE)(x_t, t)
    f_edm = inner(x_t / SD, (SD * t.tan()).log() / 4)
    assert torch.allclose(u, -SD * f_edm, atol=1e-14)
    edm = Denoiser(inner, ENDS)
    cos, sin = broadcast_time(t.cos(), x_t), broadcast_time(t.sin(), x_t)
    assert torch.allclose(edm(x_t / cos, SD * t.tan()), cos * x_t - sin * u, atol=1e-13)
    seen = TeacherVelocity(teacher=edm, sigma_data=SD)(x_t, x_t, x_t, t, None)
    assert torch.allclose(seen, u, atol=1e-12)
    sampled = Denoiser(inner, Boundary(sigma_data=SD, t_min=1e-8, c_noise_scale=0.25))
    assert torch.allclose(sampled(x_t / cos, SD * t.tan()), cos * x_t - sin * u, atol=1e-7)


def test_a_network_of_trigflow_is_told_the_angle() -> None:
    inner, x_t, t = network(), SD * normal(*SHAPE), ANGLES
    u = Denoiser(inner, TrigFlowSlope(sigma_data=SD, c_noise_scale=None))(x_t, t)
    assert torch.allclose(u, SD * inner(x_t / SD, t), atol=1e-14)
    f = Denoiser(inner, TrigFlow(sigma_data=SD))(x_t, t)
    cos, sin = broadcast_time(t.cos(), x_t), broadcast_time(t.sin(), x_t)
    assert torch.allclose(f, cos * x_t - sin * u, atol=1e-14)


def gradient(loss: Tensor, module: nn.Module) -> Tensor:
    module.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_the_gradient_is_that_of_the_continuous_loss_on_the_variance_exploding_path() -> None:
    """With the weights (D / 2) cos(t) sin(t) of one over the other, and no bound on the tangent."""
    inner, x_0, z, t = network(), SD * normal(*SHAPE), normal(*SHAPE, seed=1), ANGLES
    dimension = x_0[0].numel()
    ours = objective(weighting=lambda t, r: dimension / 2 * t.cos() * t.sin())
    slope = Denoiser(inner, SLOPE)
    simplified = gradient(ours.losses_at(slope, x_0, None, t, 1.0, z).loss.sum(), inner)
    continuous = ContinuousObjective(
        times=ours.times,
        velocity=ExplodingVelocity(),
        tangent=L2Tangent(),
        weighting=uniform,
        stop_gradient=True,
    )
    edm = Denoiser(inner, ENDS)
    losses = continuous.losses_at(edm, edm, x_0, None, SD * t.tan(), z)
    known = gradient(losses.loss.sum(), inner)
    assert float((simplified - known).norm() / known.norm()) < 1e-10


def test_at_the_start_of_the_warm_up_the_loss_is_that_of_a_denoiser() -> None:
    """Its gradient is that of cos^2(t) |u - v|^2 / 2 by the weights 2 / D / sigma_data."""
    inner, x_0, unit, t = network(), SD * normal(*SHAPE), normal(*SHAPE, seed=1), ANGLES
    slope = Denoiser(inner, SLOPE)
    ours = gradient(objective().losses_at(slope, x_0, None, t, 0.0, unit).loss.sum(), inner)
    x_t = trigflow(x_0, SD * unit, t)
    v = DataVelocity()(x_0, SD * unit, x_t, t, None)
    squares = (slope(x_t, t) - v).square().mean(dim=(1, 2, 3))
    known = gradient((t.cos() ** 2 * squares).sum() / SD, inner)
    assert torch.allclose(ours, known, rtol=1e-10, atol=1e-14)


def test_the_tangent_has_a_bound() -> None:
    g = 7 * normal(*SHAPE)
    length = g.flatten(1).norm(dim=1)
    for per_root, size in ((False, length), (True, length / 2)):
        bounded = normalised(g, c=0.1, per_root_dimension=per_root)
        assert torch.allclose(bounded * broadcast_time(size + 0.1, g), g)
    assert torch.equal(normalised(0 * g, c=0.1, per_root_dimension=False), 0 * g)


def test_the_loss_is_the_square_of_the_bounded_tangent() -> None:
    """F and stopgrad F cancel."""
    bound = partial(normalised, c=0.1, per_root_dimension=False)
    x_0, z = SD * normal(*SHAPE), normal(*SHAPE, seed=1)
    losses = objective(normalisation=bound).losses_at(
        Denoiser(network(), SLOPE), x_0, None, ANGLES, 1.0, z
    )
    assert (losses.loss < 1 / x_0[0].numel()).all()
    twice = L2OverDimension()(x_0, z)
    assert torch.allclose(twice, L2()(x_0, z) / x_0[0].numel())


def head() -> LearnedWeighting:
    return LearnedWeighting(preconditioning=SLOPE, width=8).double()


def test_the_learned_weighting_starts_at_one_and_is_best_at_the_log_of_the_loss() -> None:
    learned, loss = head(), normal(*SHAPE[:1]).square() + 0.1
    assert torch.equal(learned(loss, ANGLES), loss)
    nn.init.normal_(learned.linear.weight)
    log_variance = learned.log_variance(ANGLES)
    best = learned(log_variance.exp().detach(), ANGLES)
    assert torch.allclose(best, 1 + log_variance)
    assert float(gradient(best.sum(), learned).norm()) < 1e-12


def test_the_learned_weighting_takes_a_gradient_in_the_objective() -> None:
    learned = head()
    x_0, z = SD * normal(*SHAPE), normal(*SHAPE, seed=1)
    slope = Denoiser(network(), SLOPE)
    losses = objective(head=learned).losses_at(slope, x_0, None, ANGLES, 1.0, z)
    plain = objective().losses_at(slope, x_0, None, ANGLES, 1.0, z)
    assert torch.equal(losses.loss, plain.loss)
    assert float(gradient(losses.loss.sum(), learned).norm()) > 0.1


def test_the_prior_weight_is_one_over_the_noise_level() -> None:
    level = SD * ANGLES.tan()
    assert torch.allclose(inverse_level(ANGLES, ANGLES, sigma_data=SD) * level, times(6, 1.0))


def test_the_derivative_keeps_float32_under_half_precision() -> None:
    halves: list[bool] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network().float()

        def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
            halves.append(torch.is_autocast_enabled("cpu"))
            return self.inner(x, c_noise, label)

    x_0, z, t = (part.float() for part in (SD * normal(*SHAPE), normal(*SHAPE, seed=1), ANGLES))
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective().losses_at(Denoiser(Watched(), SLOPE), x_0, None, t, 1.0, z)
    assert halves == [True, False]
    assert losses.loss.dtype == torch.float32


def test_the_posterior_mean_of_a_full_set_is_the_empirical_denoiser() -> None:
    images, t, r = SD * normal(*SHAPE), times(6, 0.4), times(6, 0.1)
    x_t = variance_exploding(images, normal(*SHAPE, seed=1), t)
    ours = BatchStep()(images, x_t, x_t, t, r, None)
    assert torch.allclose(ours, euler_step(Points(images).denoise, x_t, t, r), atol=1e-13)
    label = torch.arange(6) % 2
    by_class = BatchStep()(images, x_t, x_t, t, r, label)
    for each in (0, 1):
        own = label == each
        alone = BatchStep()(images[own], x_t[own], x_t[own], t[own], r[own], None)
        assert torch.allclose(by_class[own], alone, atol=1e-13)


def test_the_warm_up_rises_to_one() -> None:
    assert [warm_up(k, ramp_steps=100) for k in (0, 25, 100, 1000)] == [0.0, 0.25, 1.0, 1.0]
    assert warm_up(0, ramp_steps=0) == 1.0


def test_quantised_times_are_the_nearest_points_of_the_grid() -> None:
    grid = KarrasGrid(t_min=0.002, t_max=80.0, rho=7.0)
    law = TruncatedLognormalTimes(p_mean=-1.0, p_std=1.4, t_lo=0.01, t_hi=10.0)
    quantised, points = QuantisedTimes(times=law, grid=grid, points=30), grid.points(30)
    t = law(500, Generator().manual_seed(0)).double()
    assert 0.01 <= float(t.min()) < float(t.max()) <= 10.0
    near = quantised(500, Generator().manual_seed(0)).double()
    distances = (near[:, None] - points).abs().min(dim=1).values
    assert float(distances.max()) < 1e-6
    assert ((near - t).abs() <= (points - t[:, None]).abs().min(dim=1).values + 1e-6).all()


def test_the_difference_stays_below_the_end_of_the_angles() -> None:
    t = torch.tensor([1.57, 1.5702], dtype=torch.float32)
    x = SD * normal(2, 1, 2, 2).float()
    slope = Denoiser(network().float(), SLOPE)
    du = CentralDifference(share=1e-3)(slope, x, x, x, t, x, None)
    assert du.isfinite().all()
