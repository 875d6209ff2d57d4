"""Laws of the averages of weights."""

import pytest
import torch
from torch import nn

from consistency.averaging import (
    frozen_copy,
    posthoc_coefficients,
    power_decay,
    power_exponent,
    relative_width,
    update_average,
)


def linear(value: float) -> nn.Module:
    layer = nn.Linear(2, 2)
    for p in layer.parameters():
        nn.init.constant_(p, value)
    return layer


def test_a_frozen_copy_shares_no_weights_and_takes_no_gradient() -> None:
    online = linear(1.0)
    copy = frozen_copy(online)
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in online.parameters())
    with torch.no_grad():
        for p in online.parameters():
            p.zero_()
    assert all((p == 1).all() for p in copy.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.9999, 1.0])
def test_an_average_of_constant_weights_converges_geometrically(decay: float) -> None:
    """theta-_n = theta + decay^n (theta-_0 - theta)."""
    online = linear(1.0).double()
    average = frozen_copy(linear(0.0).double())
    for _ in range(20):
        update_average(average, online, decay)
    for p in average.parameters():
        assert torch.allclose(p, torch.full_like(p, 1 - decay**20), atol=1e-14)


def test_decay_0_copies_and_decay_1_keeps_to_the_last_bit() -> None:
    online, average = nn.Linear(5, 5), frozen_copy(nn.Linear(5, 5))
    before = [p.clone() for p in average.parameters()]
    update_average(average, online, 1.0)
    assert all(torch.equal(p, b) for p, b in zip(average.parameters(), before, strict=True))
    update_average(average, online, 0.0)
    pairs = zip(average.parameters(), online.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert not any(p.requires_grad for p in average.parameters())


def test_networks_of_different_shape_are_refused() -> None:
    with pytest.raises(RuntimeError):
        update_average(nn.Linear(2, 2), nn.Linear(3, 3), 0.5)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_a_power_average_weighs_steps_by_its_closed_form(width: float) -> None:
    """Step i of k has the weight (i/k)^(gamma + 1) - ((i - 1)/k)^(gamma + 1)."""
    steps = 200
    average = torch.zeros(steps, dtype=torch.float64)
    for k, online in enumerate(torch.eye(steps, dtype=torch.float64), start=1):
        average = average.lerp(online, 1 - power_decay(k, width))
    edges = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** (power_exponent(width) + 1)
    assert torch.allclose(average, edges.diff(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 12**-0.5])
def test_the_relative_width_is_the_deviation_of_the_profile(width: float) -> None:
    """Of tau^gamma on [0, 1], by its moments."""
    gamma = power_exponent(width)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=1e-10)
    assert relative_width(gamma) == pytest.approx(width, rel=1e-12)


def test_a_stored_average_is_its_own_reconstruction() -> None:
    steps, widths = [10, 20, 30, 10, 20, 30], [0.05] * 3 + [0.1] * 3
    for n in (2, 5):
        coefficients = posthoc_coefficients(steps, widths, 30, widths[n])
        expected = torch.eye(6, dtype=torch.float64)[n]
        assert torch.allclose(coefficients, expected, rtol=0, atol=1e-12)


def test_other_widths_follow_from_two_stored_ones() -> None:
    """A random walk of weights: the reconstruction is far nearer than the nearest stored average."""
    walk = torch.randn(2000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    walk = walk.cumsum(0)
    stored, direct = {}, {w: torch.zeros(8, dtype=torch.float64) for w in (0.05, 0.07, 0.1)}
    for k, online in enumerate(walk, start=1):
        for width, average in direct.items():
            average.lerp_(online, 1 - power_decay(k, width))
        if k % 200 == 0:
            stored |= {(k, w): direct[w].clone() for w in (0.05, 0.1)}
    steps, widths = zip(*stored, strict=True)
    coefficients = posthoc_coefficients(steps, widths, 2000, 0.07)
    rebuilt = sum(c * a for c, a in zip(coefficients, stored.values(), strict=True))
    error = (rebuilt - direct[0.07]).norm()
    assert error < 0.03 * (direct[0.05] - direct[0.07]).norm()
