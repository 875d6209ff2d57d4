"""The closed forms themselves: what every other oracle stands on."""

import itertools

import torch

from analytic import THREE_MODES, Gaussian, Points, normal, times
from consistency.grids import KarrasGrid
from consistency.solvers import heun_step

GRID = KarrasGrid(t_min=0.002, t_max=80.0, rho=7.0)
GAUSSIAN = Gaussian(0.3, 0.5)


def test_the_flow_is_a_semigroup_and_the_identity_at_equal_times() -> None:
    x = 80 * normal(50, 1, 2, 2)
    t, s, r = times(50, 80.0), times(50, 3.0), times(50, 0.002)
    for law in (GAUSSIAN, THREE_MODES):
        assert torch.allclose(law.flow(x, t, t), x, atol=1e-10)
        over_s = law.flow(law.flow(x, t, s), s, r)
        assert torch.allclose(over_s, law.flow(x, t, r), atol=1e-10)


def test_the_flow_solves_the_ode() -> None:
    x = 80 * normal(50, 1, 2, 2, seed=1)
    points = GRID.points(801)
    for law in (GAUSSIAN, THREE_MODES):
        end = x
        for t, r in itertools.pairwise(points.tolist()):
            end = heun_step(law.denoise, end, times(50, t), times(50, r))
        assert torch.allclose(end, law.flow(x, times(50, 80.0), times(50, 0.002)), atol=1e-3)


def test_the_denoisers_obey_tweedie() -> None:
    """D(x, t) = x + t^2 d ln p_t / dx [Robbins 1956; Song et al. 2023, Appendix A]."""
    t = times(40, 0.7)
    x = normal(40, 1, 1, 1, seed=2).requires_grad_()
    (density,) = torch.autograd.grad(
        THREE_MODES.cdf(x, t[:, None, None, None]).sum(), x, create_graph=True
    )
    (score,) = torch.autograd.grad(density.log().sum(), x)
    assert torch.allclose(THREE_MODES.denoise(x, t), x + 0.49 * score, atol=1e-10)

    points = Points(normal(7, 1, 1, 3, seed=3))
    x = normal(40, 1, 1, 3, seed=4).requires_grad_()
    gaps = x.flatten(1)[:, None] - points.images.flatten(1)
    log_p = (-gaps.square().sum(-1) / (2 * 0.49)).logsumexp(1)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    assert torch.allclose(points.denoise(x, t), x + 0.49 * score, atol=1e-10)


def test_renoising_an_exact_answer_keeps_the_law() -> None:
    """Two exact steps leave the standard deviation sqrt(s^2 + t_min^2), whatever time lies between."""
    t_min, tau, s = 0.002, 0.821, 0.5
    variance = s**2 + t_min**2 + (tau**2 - t_min**2)
    gain = GAUSSIAN.flow(torch.full((1, 1, 1, 1), 1.3), times(1, tau), times(1, t_min)) - 0.3
    assert abs(float(gain) * variance**0.5 - (s**2 + t_min**2) ** 0.5) < 1e-6
