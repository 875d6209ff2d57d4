"""MeanFlow's transformer, as PyTorch code saves it: opens as a model of the rectified flow and as initial weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

import consistency
from consistency.checkpoints import load
from consistency.errors import UserError
from consistency.networks.dit import DiT
from consistency.preconditioning import RectifiedFlow

SETTINGS = dict(image_size=4, in_channels=2, patch_size=2, hidden_size=8, depth=2, num_classes=3)


def transformer(**changes: Any) -> DiT:
    network = DiT(**SETTINGS | {"num_heads": 2, "second_time": "gap"} | changes)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.2)
    return network


def saved(network: DiT, path: Path) -> Path:
    """The file of a training loop: weights, an average, a count."""
    state = network.state_dict()
    online = {name: value + 1 for name, value in state.items()}
    torch.save({"model": online, "ema": state, "steps": 3}, path)
    return path


def test_the_average_opens_as_an_average_velocity(tmp_path: Path) -> None:
    network = transformer()
    path = saved(network, tmp_path / "0000003.pt")
    model = consistency.load(path, num_heads=2)
    x, t, label = torch.randn(3, 2, 4, 4), torch.tensor([0.2, 0.5, 1.0]), torch.arange(3)
    u = network(x, t, label, r=t / 2)
    assert torch.equal(model(x, t, label, r=t / 2), x - t[:, None, None, None] * u)
    assert isinstance(model.denoiser.preconditioning, RectifiedFlow)
    assert model.sample(2, steps=2, seed=0).shape == (2, 2, 4, 4)
    fresh = transformer()
    given: dict[str, Any] = {"weights": "ema", "c_noise_scale": 250.0, "hints": {"num_heads": 2}}
    load.load_initial(str(path), fresh, **given)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.parameters(), network.parameters(), strict=True)
    )
    with pytest.raises(UserError, match="another network"):
        load.load_initial(str(path), transformer(second_time=None), **given)


def test_heads_are_assumed_and_one_time_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consistency.load(saved(transformer(num_heads=1), tmp_path / "two.pt"))
    assert "assumes 1 attention heads" in capsys.readouterr().err
    with pytest.raises(UserError, match="DiT or SiT of one time"):
        consistency.load(saved(transformer(second_time=None), tmp_path / "one.pt"))
