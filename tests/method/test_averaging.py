"""Laws of the averages of weights."""

import pytest
import torch
from torch import nn

from consistency.averaging import frozen_copy, update_average


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
