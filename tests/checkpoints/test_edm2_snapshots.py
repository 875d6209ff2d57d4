"""EDM2's own pickles are teachers and initial weights; damaged and foreign ones are one clear error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import consistency
import foreign
from autoencoders import write_autoencoder
from conftest import Run
from consistency.checkpoints import edm2, load
from consistency.errors import UserError
from consistency.inference.autoencoder import WEIGHTS, autoencoder_of, hashed
from consistency.inference.card import LatentSpace, ModelCard
from consistency.latents import EDM2
from consistency.preconditioning import EDM
from consistency.runtime.files import fingerprint
from tiny_models import randomised

KWARGS: dict[str, Any] = {
    **{"use_fp16": True, "img_resolution": 8, "img_channels": 3, "label_dim": 2},
    **{"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "channels_per_head": 8},
}


def network(**changes: Any) -> nn.Module:
    built: nn.Module = load.build(edm2.settings(KWARGS | changes), load.NETWORKS, nn.Module)
    return built


def half(**changes: Any) -> dict[str, Tensor]:
    """Random weights of the tiny network, rounded to half precision."""
    return {name: value.half().float() for name, value in randomised(network(**changes)).items()}


def snapshot(path: Path, **others: Any) -> Path:
    kwargs = KWARGS | others.pop("kwargs", {})
    return foreign.write_edm2(path, foreign.edm2_modules(kwargs, half(**kwargs)), **others)


def test_a_snapshot_is_a_teacher_in_float32(tmp_path: Path) -> None:
    model = consistency.load(snapshot(tmp_path / "a.pkl"))
    assert (model.card.role, model.card.num_classes, model.shape) == ("teacher", 2, (3, 8, 8))
    assert model.denoiser.preconditioning == EDM(sigma_data=0.5, c_noise_scale=0.25)
    assert model.card.latents is None
    found = model.denoiser.network.state_dict()
    assert found.keys() == half().keys()
    assert all(v.dtype == torch.float32 and torch.equal(v, half()[k]) for k, v in found.items())


def test_arguments_without_a_name_are_those_in_their_order(tmp_path: Path) -> None:
    """And a snapshot without encoder or loss, which are optional in the released code, is one of pixels."""
    named = {key: KWARGS[key] for key in KWARGS if key not in edm2.POSITIONS}
    module = foreign.edm2_modules(named, half())
    module.__dict__["_init_args"] = (8, 3, 2, True, 0.5, 8)
    path = foreign.write_edm2(tmp_path / "b.pkl", module, encoder=None, loss_fn=None)
    assert consistency.load(path).card == consistency.load(snapshot(tmp_path / "a.pkl")).card


def test_a_snapshot_of_ect_is_a_consistency_model_with_the_scalings_of_edm(tmp_path: Path) -> None:
    path = snapshot(tmp_path / "a.pkl", kwargs={"dropout_res": 4}, loss_fn=foreign.EctLoss())
    model = consistency.load(path)
    assert model.card.role == "consistency"
    assert model.card.network["dropout_resolution"] == 4
    assert isinstance(model.denoiser.preconditioning, EDM)


def test_initial_weights_and_a_teacher_are_those_of_the_file(tmp_path: Path) -> None:
    path = str(snapshot(tmp_path / "a.pkl"))
    student = network()
    load.load_initial(path, student, weights="ema", c_noise_scale=0.25)
    teacher = load.load_teacher(path, weights="ema").network
    for weights in (student.state_dict(), teacher.state_dict()):
        assert all(torch.equal(value, half()[name]) for name, value in weights.items())
    with pytest.raises(UserError, match="attention heads"):
        load.load_initial(path, network(channels_per_head=4), weights="ema", c_noise_scale=0.25)


def test_convert_and_verify(tmp_path: Path, convert: Run) -> None:
    path = snapshot(tmp_path / "a.pkl")
    outcome = convert(f"source={path}", "to=ours", f"output={tmp_path / 'b.safetensors'}")
    assert outcome.status == 0, outcome.err
    a, b = consistency.load(path), consistency.load(tmp_path / "b.safetensors")
    assert a.card == b.card
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    assert torch.equal(a.denoise(x, torch.ones(2), label), b.denoise(x, torch.ones(2), label))
    assert convert(f"verify={path}").status == 0
    outcome = convert(f"source={path}", "to=openai", f"output={tmp_path / 'c.pt'}")
    assert "a network other than ADM" in outcome.err


def broken(change: Callable[[Any], object]) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        module = foreign.edm2_modules(KWARGS, half())
        change(module)
        return foreign.write_edm2(path, module)

    return write


def cut(path: Path) -> Path:
    content = snapshot(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "half a file": (cut, "no sense"),
    "no settings": (broken(lambda m: m.__dict__.pop("_init_kwargs")), "without its settings"),
    "no sigma_data": (broken(lambda m: m.__dict__.pop("sigma_data")), "sigma_data=None"),
    "negative sigma_data": (broken(lambda m: m.__dict__.update(sigma_data=-1.0)), "sigma_data=-1"),
    "no size": (broken(lambda m: m._init_kwargs.pop("img_resolution")), "without img_resolution"),
    "an unknown argument": (broken(lambda m: m._init_kwargs.update(colour=1)), "'colour', which"),
    "another width": (broken(lambda m: m._init_kwargs.update(model_channels=16)), "of shape"),
    "no network": (broken(lambda m: m._modules.pop("unet")), "without its _parameters"),
    "a missing weight": (broken(lambda m: m.unet._parameters.pop("out_gain")), "out_gain"),
    "an unknown weight": (broken(lambda m: m.unet.register_buffer("a", torch.ones(1))), "weights a "),
    "nan": (broken(lambda m: m.unet.out_conv.weight.fill_(float("nan"))), "not all finite"),
    "another loss": (lambda p: snapshot(p, loss_fn=foreign.PlainPersistent("VPLoss")), "VPLoss"),
    "another encoder": (lambda p: snapshot(p, encoder=foreign.PlainPersistent("MyVAE")), "MyVAE"),
    "no network at all": (lambda p: foreign.write_edm2(p, {"a": 1}), "no model"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_foreign_snapshot_is_one_clear_error(fault: str, tmp_path: Path) -> None:
    write, hint = FAULTS[fault]
    with pytest.raises(UserError, match=hint) as error:
        consistency.load(write(tmp_path / "a.pkl"))
    assert len(str(error.value).splitlines()) <= 4


def test_latents_are_those_of_the_named_autoencoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the published scaling; another one is noted with its numbers, and nothing decodes it."""
    four = {"img_channels": 4}
    vae = {"vae_name": "a/vae", "scale": EDM2.factor.flatten().numpy()}
    vae |= {"bias": EDM2.shift.flatten().numpy()}
    encoder = foreign.PlainPersistent("StabilityVAEEncoder", **vae)
    card = consistency.load(snapshot(tmp_path / "a.pkl", kwargs=four, encoder=encoder)).card
    space = {"autoencoder": "a/vae", "sha256": None, "scaling": "edm2"}
    assert card.latents == LatentSpace(**space, channels=3, image_size=64)  # type: ignore[arg-type]
    assert card == ModelCard.parse(card.saved(), "a test")
    assert not capsys.readouterr().err
    other = foreign.PlainPersistent("StabilityVAEEncoder", **vae | {"bias": np.zeros(4, "f4")})
    card = consistency.load(snapshot(tmp_path / "b.pkl", kwargs=four, encoder=other)).card
    assert card.latents is None
    assert "[0.0, 0.0, 0.0, 0.0] of latents y of 'a/vae'" in capsys.readouterr().err
    bare = foreign.PlainPersistent("StabilityVAEEncoder", vae_name="a/vae")
    with pytest.raises(UserError, match="without its scale"):
        consistency.load(snapshot(tmp_path / "c.pkl", encoder=bare))


@pytest.mark.slow
def test_samples_of_latents_are_decoded_by_the_autoencoder_that_is_given(tmp_path: Path) -> None:
    """And a measure of them names its hash, which the snapshot does not record."""
    vae = {"scale": EDM2.factor.flatten().numpy(), "bias": EDM2.shift.flatten().numpy()}
    encoder = foreign.PlainPersistent("StabilityVAEEncoder", vae_name="a/vae", **vae)
    path = snapshot(tmp_path / "a.pkl", kwargs={"img_channels": 4}, encoder=encoder)
    folder = write_autoencoder(tmp_path / "vae", halvings=3)
    model = consistency.load(path, autoencoder=str(folder))
    assert model.sample(2, steps=2).shape == (2, 3, 64, 64)
    assert model.card.latents is not None
    space = hashed(model.card.latents)
    assert space.sha256 == autoencoder_of(space, "cpu").sha256
    assert space.protocol["autoencoder_sha256"] == fingerprint(folder / WEIGHTS)
