"""Laws of the distances."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from analytic import normal
from consistency.distances import (
    L1,
    L2,
    LPIPS,
    Distance,
    L2At32,
    LInf,
    PseudoHuber,
    Resize,
    SquaredNorm,
)
from consistency.errors import UserError
from consistency.tensors import Data

X, Y = normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1)


class Edges(nn.Module):
    """Features: the image, and the differences of its neighbouring rows."""

    def forward(self, x: Data) -> list[Tensor]:
        return [x, x.diff(dim=2)]


def lpips(resize: nn.Module | None = None) -> LPIPS:
    weights = [torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, 0.0, 2.0])]
    return LPIPS(features=Edges(), weights=weights, resize=resize or nn.Identity()).double()


DISTANCES: list[Callable[[], Distance]] = [
    L1,
    L2,
    LInf,
    L2At32,
    SquaredNorm,
    lambda: PseudoHuber(c=0.0, per_root_dimension=False),
    lambda: PseudoHuber(c=0.03, per_root_dimension=False),
    lambda: PseudoHuber(c=0.00054, per_root_dimension=True),
    lpips,
]


@pytest.mark.parametrize("build", DISTANCES)
def test_a_distance_is_symmetric_and_0_only_for_equal_images(build: Callable[[], Distance]) -> None:
    d = build()
    assert d(X, Y).shape == (4,)
    assert torch.allclose(d(X, Y), d(Y, X))
    assert (d(X, Y) > 0).all()
    assert (d(X, X).abs() < 1e-12).all()


@pytest.mark.parametrize("build", DISTANCES)
def test_the_distance_of_a_sample_does_not_depend_on_its_batch(
    build: Callable[[], Distance],
) -> None:
    each = torch.cat([build()(X[i : i + 1], Y[i : i + 1]) for i in range(4)])
    assert torch.allclose(build()(X, Y), each)


@pytest.mark.parametrize("build", DISTANCES)
def test_gradients_are_finite_where_the_images_are_equal(build: Callable[[], Distance]) -> None:
    x = X.clone().requires_grad_()
    build()(x, X).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_the_simple_distances() -> None:
    gap = X - Y
    assert torch.allclose(L1()(X, Y), gap.abs().flatten(1).mean(1))
    assert torch.allclose(L2()(X, Y), gap.square().flatten(1).mean(1))
    assert torch.allclose(SquaredNorm()(X, Y), L2()(X, Y) * 768)
    assert torch.allclose(LInf()(X, Y), gap.abs().flatten(1).amax(1))


def test_pseudo_huber_takes_one_norm_per_image() -> None:
    """Not one per pixel, which would sum to several times as much."""
    huber = PseudoHuber(c=0.03, per_root_dimension=False)
    norm = (X - Y).flatten(1).norm(dim=1)
    assert torch.allclose(huber(X, Y), (norm**2 + 0.03**2).sqrt() - 0.03)
    per_pixel = (((X - Y) ** 2 + 0.03**2).sqrt() - 0.03).flatten(1).sum(1)
    assert (per_pixel > 10 * huber(X, Y)).all()


def test_pseudo_huber_lies_between_the_norm_and_its_square() -> None:
    small, large = X + 1e-6 * Y, X + 1e3 * Y
    huber = PseudoHuber(c=0.03, per_root_dimension=False)
    plain = PseudoHuber(c=0.0, per_root_dimension=False)
    squares = SquaredNorm()(X, small) / (2 * 0.03)
    assert torch.allclose(huber(X, small), squares, rtol=1e-4)
    assert torch.allclose(huber(X, large), plain(X, large), rtol=1e-4)


def test_the_published_constants_of_pseudo_huber() -> None:
    """c = 0.00054 sqrt(d) [Song and Dhariwal 2023, Section 3.3]."""
    huber = PseudoHuber(c=0.00054, per_root_dimension=True)
    for side, c in ((32, 0.02993), (64, 0.05986)):
        assert huber.constant(torch.empty(1, 3, side, side)) == pytest.approx(c, abs=6e-6)


def test_l2_at_32_resizes_without_a_filter() -> None:
    for side in (16, 32, 48):
        x, y = normal(2, 3, side, side), normal(2, 3, side, side, seed=1)
        plain = interpolate(x - y, size=(32, 32), mode="bilinear", align_corners=False)
        assert torch.allclose(L2At32()(x, y), plain.square().flatten(1).mean(1))


@pytest.mark.parametrize(("side", "resized"), [(64, 224), (255, 224), (256, 256), (300, 300)])
def test_resizing_only_below_a_side(side: int, resized: int) -> None:
    resize = Resize(size=224, only_below=256, antialias=False)
    assert resize(torch.zeros(1, 1, side, side)).shape[-1] == resized
    always = Resize(size=224, only_below=None, antialias=True)
    assert always(torch.zeros(1, 1, side, side)).shape[-1] == 224


def test_lpips_is_the_formula() -> None:
    def unit(phi: Tensor) -> Tensor:
        return phi / phi.norm(dim=1, keepdim=True)

    d = lpips()
    expected = torch.zeros(4, dtype=torch.float64)
    for w, phi_x, phi_y in zip(d.weights, Edges()(X), Edges()(Y), strict=True):
        gap = (unit(phi_x) - unit(phi_y)) ** 2
        expected += (w[:, None, None] * gap).sum(1).mean((1, 2))
    assert torch.allclose(d(X, Y), expected)
    assert torch.allclose(d.per_layer(X, Y).sum(0), expected)


def test_lpips_ignores_contrast() -> None:
    """Features are compared by direction."""
    assert (lpips()(X, 3 * X) < 1e-12).all()


def test_lpips_is_smooth_where_all_features_are_0() -> None:
    x = X.clone()
    x[:, :, 3, 3] = 0
    x.requires_grad_()
    (first,) = torch.autograd.grad(lpips()(x, Y).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.isfinite(second).all()


def test_lpips_resizes_first() -> None:
    resized = lpips(Resize(size=8, only_below=None, antialias=False))
    x, y = (interpolate(image, size=(8, 8), mode="bilinear") for image in (X, Y))
    assert torch.allclose(resized(X, Y), lpips()(x, y))


def test_lpips_computes_in_single_precision() -> None:
    weights = [torch.ones(3)]

    class Linear(nn.Module):
        def forward(self, x: Data) -> list[Tensor]:
            return [nn.functional.conv2d(x, torch.eye(3)[:, :, None, None])]

    d = LPIPS(features=Linear(), weights=weights, resize=nn.Identity())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = d(X.float(), Y.float())
    assert ours.dtype == torch.float32
    assert torch.equal(ours, d(X.float(), Y.float()))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="c >= 0"):
        PseudoHuber(c=-1.0, per_root_dimension=False)
    with pytest.raises(UserError, match="size > 0"):
        Resize(size=0, only_below=None, antialias=False)
