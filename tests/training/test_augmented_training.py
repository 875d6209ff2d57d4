"""Training on augmented images: the network is told of the augmentation, whatever the number of devices."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configurations import composed
from conftest import TINY, Run
from consistency.checkpoints.load import load
from consistency.errors import UserError
from consistency.training import build

SONG = [
    *TINY[:8],
    "mode=edm",
    "model=ddpmpp_cifar10",
    "model.network.image_size=8",
    "model.network.in_channels=1",
    "model.network.out_channels=1",
    "model.network.model_channels=8",
    "model.network.channel_mult=[1]",
    "model.network.num_res_blocks=1",
    "model.network.num_classes=10",
    "model.network.augment_dim=9",
    "mode.augmentation=edm",
    "parts.augmentation.edm.p=1.0",
]


def test_a_run_tells_its_network_of_the_augmentation(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original = build.build_module

    def watched(*given: object) -> nn.Module:
        module = original(*given)  # type: ignore[arg-type]

        def note(_: nn.Module, __: object, given: dict[str, Tensor]) -> None:
            seen.extend(given.values())  # none in samples

        module.online.network.register_forward_pre_hook(note, with_kwargs=True)
        return module

    monkeypatch.setattr(build, "build_module", watched)
    outcome = verb("train", *SONG, "trainer.max_steps=2", f"output={tmp_path / 'run'}")
    assert outcome.status == 0, outcome.err
    assert [labels.shape for labels in seen] == [(8, 9)] * 2
    assert not torch.equal(*seen)
    assert bool((seen[0][:, 2] != 0).all())
    samples = load(tmp_path / "run").sample(2)  # without labels
    assert samples.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["model.network.augment_dim=0"], "augment_dim=9"),
        (["data.flip=true"], "without a second flip"),
    ],
)
def test_an_augmentation_that_the_run_cannot_use_is_one_message(
    given: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        build.build_module(composed("train", *SONG, *given))
