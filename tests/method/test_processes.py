"""Laws of the forward processes."""

import math

import torch

from analytic import normal, times
from consistency.processes import trigflow, variance_exploding

SIGMA_DATA = 0.5


def test_variance_exploding_adds_noise_of_standard_deviation_t() -> None:
    x_0, z = normal(5, 1, 2, 2), normal(5, 1, 2, 2, seed=1)
    assert torch.equal(variance_exploding(x_0, z, times(5, 0.0)), x_0)
    noise = variance_exploding(x_0, z, times(5, 3.0)) - x_0
    assert torch.allclose(noise, 3 * z)


def test_trigflow_is_rescaled_variance_exploding() -> None:
    """x_trig = cos(t) x_ve at t_ve = sigma_data tan(t) [Lu and Song 2024, Appendix A]."""
    x_0, z = normal(5, 1, 2, 2), normal(5, 1, 2, 2, seed=1)
    t = torch.tensor([0.0, 0.3, 0.8, 1.2, 1.5], dtype=torch.float64)
    exploded = variance_exploding(x_0, z, SIGMA_DATA * t.tan())
    ours = trigflow(x_0, SIGMA_DATA * z, t)
    assert torch.allclose(ours, t.cos()[:, None, None, None] * exploded, atol=1e-13)


def test_trigflow_keeps_the_standard_deviation_of_the_data() -> None:
    x_0, z = SIGMA_DATA * normal(4000, 1, 1, 1), SIGMA_DATA * normal(4000, 1, 1, 1, seed=1)
    for t in (0.0, 0.4, math.pi / 4, math.pi / 2):
        assert abs(float(trigflow(x_0, z, times(4000, t)).std()) - SIGMA_DATA) < 0.02
