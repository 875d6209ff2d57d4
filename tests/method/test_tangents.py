"""Laws of tangents and of their lengths."""

from functools import partial

import torch

from analytic import DOUBLE, THREE_MODES, Gaussian, normal, times
from consistency.distances import L2, PseudoHuber, SquaredNorm
from consistency.networks.adm import ADM
from consistency.networks.layers import Attention
from consistency.tangents import (
    HessianTangent,
    L1Tangent,
    L2Tangent,
    LInfTangent,
    TangentMetric,
    derivative_along,
)
from consistency.tensors import Data, Label, Time

F, G = normal(4, 3, 4, 4), normal(4, 3, 4, 4, seed=1)


def test_the_derivative_is_the_limit_of_a_difference() -> None:
    x, t, v = normal(8, 1, 2, 2), times(8, 0.7), normal(8, 1, 2, 2, seed=1)
    f, g = derivative_along(THREE_MODES.denoise, x, t, v, None)
    assert torch.equal(f, THREE_MODES.denoise(x, t))
    for step in (1e-3, 1e-4):
        after = THREE_MODES.denoise(x + step * v, t + step)
        before = THREE_MODES.denoise(x - step * v, t - step)
        assert torch.allclose(g, (after - before) / (2 * step), atol=200 * step**2)


def test_the_tangent_of_the_exact_function_vanishes() -> None:
    law = Gaussian(0.3, 0.5)
    t = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=DOUBLE)
    x = 0.3 + t[:, None, None, None] * normal(4, 1, 2, 2)
    v = (x - law.denoise(x, t)) / t[:, None, None, None]

    def consistency(x_t: Data, t: Time, label: Label = None) -> Data:
        return law.flow(x_t, t, torch.full_like(t, 0.002))

    _, g = derivative_along(consistency, x, t, v, None)
    assert float(g.abs().max()) < 1e-14
    _, wrong = derivative_along(consistency, x, t, -v, None)
    assert float(wrong.abs().max()) > 0.01


def test_every_attention_has_a_forward_derivative() -> None:
    """The fused kernels have none of their own."""

    def network(kind: Attention) -> ADM:
        torch.manual_seed(0)
        adm = ADM(
            image_size=4,
            in_channels=3,
            model_channels=8,
            channel_mult=[1],
            num_res_blocks=1,
            attention_resolutions=[4],
            num_heads=2,
            num_head_channels=None,
            num_groups=4,
            use_scale_shift_norm=False,
            resblock_updown=False,
            attention=kind,
        )
        for p in adm.parameters():
            torch.nn.init.normal_(p, std=0.2)
        return adm.double()

    tangents = []
    for kind in ("sdpa", "plain"):
        adm = network(kind)
        _, g = derivative_along(partial(adm), F, times(4, 0.3), G, None)
        g.sum().backward()
        tangents.append((g, adm.get_parameter("out.2.weight").grad))
    assert torch.allclose(tangents[0][0], tangents[1][0])
    assert torch.allclose(tangents[0][1], tangents[1][1])


def test_the_lengths_are_the_norms() -> None:
    flat = G.flatten(1)
    assert torch.allclose(L1Tangent().length(F, G), flat.abs().mean(1))
    assert torch.allclose(LInfTangent().length(F, G), flat.abs().amax(1))
    assert torch.allclose(L2Tangent().length(F, G), flat.norm(dim=1))
    assert torch.equal(L2Tangent().lowered(F, G), G)


def test_lengths_without_a_metric_tensor_have_none() -> None:
    assert isinstance(L2Tangent(), TangentMetric)
    assert isinstance(HessianTangent(distance=L2()), TangentMetric)
    assert not isinstance(L1Tangent(), TangentMetric)
    assert not isinstance(LInfTangent(), TangentMetric)


def test_the_hessian_of_known_distances() -> None:
    """2 for the squared norm, 2/d for its mean, 1/c for pseudo-Huber."""
    for distance, factor in (
        (SquaredNorm(), 2.0),
        (L2(), 2 / 48),
        (PseudoHuber(c=0.1, per_root_dimension=False), 10.0),
    ):
        hessian = HessianTangent(distance=distance)
        assert torch.allclose(hessian.lowered(F, G), factor * G)
        assert torch.allclose(hessian.length(F, G), factor * G.square().sum((1, 2, 3)))


def test_a_distance_is_half_its_length_to_second_order() -> None:
    """d(f + e g, f) = e^2 / 2 g^T H g + O(e^3), for a distance that is no square."""

    class Curved(torch.nn.Module):
        def forward(self, x: Data, y: Data) -> torch.Tensor:
            return (x.exp() - y.exp()).square().sum((1, 2, 3))

    length = HessianTangent(distance=Curved()).length(F, G)
    for e in (1e-3, 1e-4):
        assert torch.allclose(Curved()(F + e * G, F), e**2 / 2 * length, rtol=50 * e)


def test_gradients_pass_through_the_hessian() -> None:
    f, g = F.clone().requires_grad_(), G.clone().requires_grad_()

    class Cubic(torch.nn.Module):
        def forward(self, x: Data, y: Data) -> torch.Tensor:
            return (x - y).square().sum((1, 2, 3)) * y.mean((1, 2, 3))

    HessianTangent(distance=Cubic()).length(f, g).sum().backward()
    mean = F.mean((1, 2, 3), keepdim=True)
    assert f.grad is not None and g.grad is not None
    assert torch.allclose(g.grad, 4 * mean * G)
    squares = 2 * G.square().sum((1, 2, 3), keepdim=True) / 48
    assert torch.allclose(f.grad, squares.expand_as(F))
    detached = HessianTangent(distance=Cubic()).lowered(F, G)
    assert not detached.requires_grad
