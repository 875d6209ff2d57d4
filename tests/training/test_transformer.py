"""The small transformer under modes of both noise processes."""

import pytest
import torch

from analytic import normal
from configurations import composed
from consistency.tensors import NO_CLASS
from consistency.training.build import build_module


@pytest.mark.parametrize("mode", ["ect", "meanflow"])
def test_every_weight_of_the_transformer_is_trained(mode: str) -> None:
    guided = (
        ["mode.guidance=self", "mode.objective.label_dropout=0.1"] if mode == "meanflow" else []
    )
    config = composed("train", "model=dit_digits", f"mode={mode}", "logger=none", *guided)
    module = build_module(config)
    network = module.online.network
    assert 5e5 < sum(p.numel() for p in network.parameters()) < 1.1e6
    assert network.no_class == NO_CLASS
    for parameter in network.parameters():
        parameter.data.normal_(std=0.1)  # behind a last layer of zeros no gradient passes
    x, label = normal(8, 1, 8, 8).float(), torch.arange(8)
    draws, online = torch.Generator().manual_seed(0), module.online
    module.objective(online, online, x, label, 4, draws).loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
