"""Networks under a loss that takes a forward-mode derivative: attention, activations, half precision."""

import pytest
import torch
from torch import nn

from analytic import normal, times
from configurations import composed
from conftest import TINY
from consistency.denoiser import Denoiser
from consistency.derivatives import Derivative, ExactDerivative, FiniteDifference
from consistency.errors import UserError
from consistency.networks.mlp import MLP
from consistency.preconditioning import Unscaled
from consistency.training.build import build_module, tell_of_plain_attention


def test_plain_attention_is_told_once_and_recomputed_activations_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tell_of_plain_attention.cache_clear()
    config = composed("train", *TINY, "mode=sct", "+model.network.checkpoint_activations=false")
    for _ in range(2):
        build_module(config)
    assert capsys.readouterr().out.count("Attention takes its plain formula") == 1
    config.model.network.checkpoint_activations = True
    with pytest.raises(UserError, match="checkpoint_activations=true"):
        build_module(config)


@pytest.mark.parametrize("derivative", [ExactDerivative(), FiniteDifference(e=1e-2)])
def test_under_half_precision_the_derivative_is_that_of_float32(derivative: Derivative) -> None:
    torch.manual_seed(0)
    network = MLP(channels=4, width=16, depth=2, second_time="gap")
    nn.init.normal_(network.last.weight)
    online, x, v = Denoiser(network, Unscaled()), normal(8, 1, 2, 2), normal(8, 1, 2, 2, seed=1)
    given = (x.float(), times(8, 0.7).float(), times(8, 0.2).float(), v.float())
    _, expected = derivative(online, *given, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = online(*given[:2])
        _, found = derivative(online, *given, None)
    assert not torch.equal(half, online(*given[:2]))
    assert torch.equal(found, expected)
