"""Laws of randomness: a draw is a function of its place, and two passes drop the same units."""

import pytest
import torch
from torch import nn

from consistency.randomness import DropoutState, SampleNoise, generator, key

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


def test_keys_of_a_generator_are_distinct_and_stable() -> None:
    places = [(0, "train", 0, 0), (0, "train", 0, 1), (0, "train", 1, 0), (1, "train", 0, 0)]
    keys = {key(*place) for place in [*places, (0, "dropout", 0, 0)]}
    assert len(keys) == 5
    assert all(0 <= k < 2**63 for k in keys)
    # A resumed run on another machine must find the same draws.
    assert key(0, "train", 0, 0) == 6578950792936650312


def test_a_generator_does_not_depend_on_earlier_draws() -> None:
    first = torch.randn(5, generator=generator(0, "train", 3))
    torch.randn(1000, generator=generator(0, "train", 2))
    assert torch.equal(torch.randn(5, generator=generator(0, "train", 3)), first)


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    together, alone = SampleNoise(0, [4, 5, 6], (1, 2, 2)), SampleNoise(0, [5], (1, 2, 2))
    for _ in range(3):
        assert torch.equal(together()[1], alone()[0])


@pytest.mark.parametrize("device", DEVICES)
def test_both_passes_drop_the_same_units(device: str) -> None:
    dropout, ones = nn.Dropout(0.5), torch.ones(1000, device=device)
    state = DropoutState(ones.device)
    first = dropout(ones)
    with state.replayed():
        second = dropout(ones)
    assert torch.equal(first, second)
    assert not torch.equal(first, dropout(ones))


@pytest.mark.parametrize("device", DEVICES)
def test_a_replay_leaves_the_present_state_as_it_was(device: str) -> None:
    dropout, ones = nn.Dropout(0.5), torch.ones(1000, device=device)

    def after(replay: bool) -> torch.Tensor:
        torch.manual_seed(0)
        state = DropoutState(ones.device)
        dropout(ones)
        if replay:
            with pytest.raises(RuntimeError, match="inside"), state.replayed():
                dropout(ones)
                raise RuntimeError("inside")
        return dropout(ones)

    assert torch.equal(after(replay=True), after(replay=False))
