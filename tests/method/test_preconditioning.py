"""Laws of the preconditionings: boundary condition, unit variance, and the networks that solve known data."""

import pytest
import torch
from torch import nn

from analytic import Gaussian, normal, times
from consistency.denoiser import Denoiser
from consistency.errors import UserError
from consistency.grids import KarrasGrid
from consistency.preconditioning import EDM, Boundary, Preconditioning, TrigFlow
from consistency.tensors import Data, Label, Time, broadcast_time

SIGMA_DATA, T_MIN, T_MAX = 0.5, 0.002, 80.0
T = KarrasGrid(t_min=T_MIN, t_max=T_MAX, rho=7.0).points(60)
DATA = Gaussian(0.0, SIGMA_DATA)

edm = EDM(sigma_data=SIGMA_DATA, c_noise_scale=0.25)
boundary = Boundary(sigma_data=SIGMA_DATA, t_min=T_MIN, c_noise_scale=0.25)
trig = TrigFlow(sigma_data=SIGMA_DATA)


class Wild(nn.Module):
    """Some network: a wild function of its input and of the time it is told."""

    def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
        return 100 * (37 * x).sin() + broadcast_time(c_noise, x)


class Solution(nn.Module):
    """A network given as a function of c_in x and t, with t found back from c_noise = 0.25 ln t."""

    def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
        t = (4 * c_noise).exp()
        return broadcast_time((torch.atan(t / SIGMA_DATA) / 2).tan(), x) * x


class Zero(nn.Module):
    def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
        return torch.zeros_like(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_boundary_condition_holds_bit_for_bit(dtype: torch.dtype) -> None:
    """f(x, t_min) = x, whatever the network says [Song et al. 2023, Section 3], at the grid's own t_min."""
    x = normal(6, 3, 4, 4).to(dtype)
    last = KarrasGrid(t_min=T_MIN, t_max=T_MAX, rho=7.0).points(40)[-1]
    t = last.expand(6).to(dtype)
    assert torch.equal(Denoiser(Wild(), boundary)(x, t), x)
    assert torch.equal(Denoiser(Wild(), trig)(x, torch.zeros(6, dtype=dtype)), x)
    assert not torch.equal(Denoiser(Wild(), edm)(x, t), x)


@pytest.mark.parametrize("scalings", [edm, boundary])
def test_the_network_sees_unit_variance(scalings: Preconditioning) -> None:
    variance = scalings(T).c_in ** 2 * (SIGMA_DATA**2 + T**2)
    assert torch.allclose(variance, torch.ones_like(T))
    assert torch.allclose(trig(T).c_in ** 2 * SIGMA_DATA**2, torch.ones_like(T))


def test_the_target_of_a_denoising_network_has_unit_variance() -> None:
    """Var[(x_0 - c_skip x_t) / c_out] = 1 [Karras et al. 2022, Eq. 140]."""
    c = edm(T)
    variance = ((1 - c.c_skip) ** 2 * SIGMA_DATA**2 + c.c_skip**2 * T**2) / c.c_out**2
    assert torch.allclose(variance, torch.ones_like(T))


def test_the_denoiser_of_gaussian_data_is_a_network_of_zeros() -> None:
    x = normal(60, 1, 2, 2)
    assert torch.allclose(Denoiser(Zero(), edm)(x, T), DATA.denoise(x, T), atol=1e-14)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_the_consistency_function_of_gaussian_data_is_a_known_network(
    dtype: torch.dtype, error: float
) -> None:
    """F*(c_in x, t) = tan(arctan(t / sigma_data) / 2) c_in x under EDM scalings, for t_min = 0."""
    x = normal(60, 1, 2, 2).to(dtype)
    t = T.to(dtype)
    f = Denoiser(Solution(), edm)(x, t)
    assert torch.allclose(f, DATA.flow(x, t, torch.zeros_like(t)), atol=error)


def test_the_boundary_scalings_reach_the_same_function() -> None:
    """F* = (f* - c_skip x) / c_out is bounded, so that a network can be it."""
    x, t = torch.ones(60, 1, 1, 1, dtype=torch.float64), T[:-1]
    c = boundary(t)
    f = DATA.flow(x[:-1], t, times(59, T_MIN))[:, 0, 0, 0]
    needed = (f - c.c_skip) / c.c_out / c.c_in
    assert (needed.abs() < 1.1).all()


def test_the_trigflow_network_of_gaussian_data() -> None:
    """F* = -tan(t / 2) x / sigma_data, because all data of that deviation stay where they are."""

    class Trig(nn.Module):
        def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
            return -broadcast_time((c_noise / 2).tan(), x) * x

    t = torch.linspace(0, 1.57, 60, dtype=torch.float64)
    x = SIGMA_DATA * normal(60, 1, 2, 2)
    assert torch.allclose(Denoiser(Trig(), trig)(x, t), x, atol=1e-13)


def test_trigflow_and_edm_are_one_network_up_to_its_sign() -> None:
    """With t = arctan(t_ve / sigma_data): the same function if F_trig = -F_edm [Lu and Song 2024, Appendix B]."""
    t = torch.atan(T / SIGMA_DATA)
    c, e = trig(t), edm(T)
    cos = t.cos()
    assert torch.allclose(c.c_skip / cos, e.c_skip / cos**2, atol=1e-12)
    assert torch.allclose(-c.c_out, e.c_out, atol=1e-14)
    assert torch.allclose(c.c_in * cos, e.c_in, atol=1e-14)


def test_c_noise_is_a_logarithm_of_either_scale() -> None:
    for scale in (0.25, 250.0):
        for scalings in (
            EDM(sigma_data=SIGMA_DATA, c_noise_scale=scale),
            Boundary(sigma_data=SIGMA_DATA, t_min=T_MIN, c_noise_scale=scale),
        ):
            assert torch.equal(scalings(T).c_noise, scale * T.log())


def test_impossible_constants_are_refused() -> None:
    for build in (
        lambda: EDM(sigma_data=0.0, c_noise_scale=0.25),
        lambda: Boundary(sigma_data=0.5, t_min=0.0, c_noise_scale=0.25),
        lambda: TrigFlow(sigma_data=-1.0),
    ):
        with pytest.raises(UserError, match="expected a finite"):
            build()
