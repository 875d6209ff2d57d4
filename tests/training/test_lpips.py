"""LPIPS as it is loaded: layers, variants, where its weights come from. Golden data check the numbers."""

import inspect
from pathlib import Path
from typing import get_args

import pytest
import torch
import torchvision
from torch import nn

from consistency.errors import UserError
from consistency.training.lpips import (
    RESIZING,
    TAPS,
    Backbone,
    BackboneName,
    Variant,
    assemble,
    empty_features,
    load_lpips,
)

BACKBONES: tuple[BackboneName, ...] = get_args(BackboneName)
VARIANTS: tuple[Variant, ...] = get_args(Variant)
CHANNELS = {
    "vgg16": [64, 128, 256, 512, 512],
    "alexnet": [64, 192, 384, 256, 256],
    "squeezenet1_1": [64, 128, 256, 384, 384, 512, 512],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch hub's folder of weights, empty, with no way to download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    return tmp_path / "hub" / "checkpoints"


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network")


def stored(hub: Path, backbone: BackboneName) -> Path:
    """A file of random weights under the name that torch hub looks for."""
    with torch.device("meta"):
        network = torchvision.models.get_model(backbone, weights=None)
    state = {
        name: 0.02 * torch.randn(value.shape)
        for name, value in network.state_dict().items()
        if name.startswith("features.")
    }
    hub.mkdir(parents=True)
    path = hub / Path(torchvision.models.get_model_weights(backbone).DEFAULT.url).name
    torch.save(state, path)
    return path


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layers_compared_are_the_published_ones(
    backbone: BackboneName, variant: Variant
) -> None:
    with torch.device("meta"):
        extractor = assemble(empty_features(backbone), backbone, variant).to("meta")
        maps = extractor(torch.zeros(1, 3, 64, 64))
    assert [phi.shape[1] for phi in maps] == CHANNELS[backbone]
    assert len(maps) == len(TAPS[backbone])


def test_one_variant_averages_where_the_other_takes_the_largest() -> None:
    kinds = {
        variant: [type(m) for m in assemble(empty_features("vgg16"), "vgg16", variant).modules()]
        for variant in VARIANTS
    }
    assert nn.MaxPool2d not in kinds["average_pooled_unit"]
    assert nn.AvgPool2d not in kinds["max_pooled_signed"]
    assert kinds["average_pooled_unit"].count(nn.AvgPool2d) == 4
    assert kinds["max_pooled_signed"].count(nn.MaxPool2d) == 4


def test_images_reach_the_network_in_its_own_units() -> None:
    """-1 and 1 are black and white: (0 - mean) / std and (1 - mean) / std of ImageNet."""
    extractor = Backbone(nn.Sequential(nn.Identity()), (0,))
    black, white = (
        extractor(torch.full((1, 3, 2, 2), value))[0][0, :, 0, 0] for value in (-1.0, 1.0)
    )
    assert black.tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    assert white.tolist() == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])


def test_the_variants_resize_as_published() -> None:
    for side, unit, signed in ((32, 224, 224), (64, 224, 224), (256, 256, 224)):
        x = torch.zeros(1, 1, side, side)
        assert RESIZING["average_pooled_unit"](x).shape[-1] == unit
        assert RESIZING["max_pooled_signed"](x).shape[-1] == signed


@pytest.mark.parametrize("backbone", ["alexnet", "squeezenet1_1"])
def test_weights_are_found_where_torch_hub_keeps_them(hub: Path, backbone: BackboneName) -> None:
    stored(hub, backbone)
    d = load_lpips(backbone=backbone, variant="max_pooled_signed")
    assert not any(p.requires_grad for p in d.parameters())
    assert all((w >= 0).all() for w in d.weights)
    x = torch.rand(2, 3, 32, 32).requires_grad_()
    d(x, torch.zeros(2, 3, 32, 32)).sum().backward()
    assert x.grad is not None
    assert float(x.grad.norm()) > 0


def test_offline_the_error_says_which_file_to_put_where(hub: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_lpips(backbone="vgg16", variant="average_pooled_unit")
    message = str(caught.value)
    assert str(hub / "vgg16-397923af.pth") in message
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in message
    assert "TORCH_HOME" in message


def test_unknown_names_are_refused() -> None:
    """Without the checks of types that only the tests have."""
    unchecked = inspect.unwrap(load_lpips)
    for wrong in ({"backbone": "vgg"}, {"variant": "average"}):
        with pytest.raises(UserError, match="expected an LPIPS"):
            unchecked(**{"backbone": "vgg16", "variant": "max_pooled_signed", **wrong})
