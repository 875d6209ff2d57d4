"""Hints for `teacher=` and `init=`: settings that a file does not hold, as `convert` takes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import consistency
import foreign
from configurations import composed
from conftest import ROOT
from consistency.checkpoints import load
from consistency.checkpoints.contents import HINTS, Hints
from consistency.commands import schema
from consistency.errors import UserError
from consistency.training.build import build_module
from tiny_models import TINY_ADM, randomised

NODE = TINY_ADM | {"channel_mult": [1, 2], "attention_resolutions": [8, 4]}
NODE |= {"num_heads": 4, "num_head_channels": None}
TOLD = {"image_size": 8, "num_heads": 4}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict as OpenAI's code saves it, of four heads."""
    weights = randomised(load.build(NODE, load.NETWORKS, nn.Module))
    return foreign.write_openai(tmp_path_factory.mktemp("hints") / "ema.pt", weights)


def outputs(denoise: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return denoise(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8), torch.ones(1), None)


def test_the_hints_are_the_options_of_convert() -> None:
    assert composed("convert").keys() >= {*HINTS}


def test_a_teacher_with_hints_is_the_converted_one(file: Path) -> None:
    converted = consistency.load(file, "teacher", image_size=8, num_heads=4).denoiser
    teacher = load.load_teacher(str(file), weights="ema", hints=TOLD)
    assert torch.equal(outputs(teacher), outputs(converted))
    guessed = load.load_teacher(str(file), weights="ema")
    assert not torch.allclose(outputs(guessed), outputs(converted))


@pytest.mark.parametrize(
    "hints",
    [{"heads": 4}, {"num_heads": 0}, {"num_heads": "4"}, {"num_heads": True}, {"num_heads": [4]},
     {"attention_resolutions": 8}, {"attention_resolutions": "88"}, {"weights": "ema"}],
)  # fmt: skip
def test_other_names_and_values_are_refused(hints: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="settings among image_size, "):
        Hints.parse(hints, "ema")


@pytest.mark.parametrize(
    ("hints", "got"),
    [
        ({"num_heads": 2}, "num_heads=2, where the file has 1"),
        ({"image_size": 16}, "image_size=16, where the file has 8"),
        ({"attention_resolutions": [4, 8]}, r"attention_resolutions=\[4, 8\], where the file has \[\]"),
        ({"num_heads_upsample": 2}, "where the file has None"),
    ],
)  # fmt: skip
def test_hints_for_what_a_file_holds_are_refused(
    hints: dict[str, Any], got: str, files: dict[str, Path]
) -> None:
    held = {"image_size": 8, "num_head_channels": 32, "attention_resolutions": []}
    for kind in ("ours", "sealed", "diffusers"):
        load.read(files[kind], Hints.parse(held, "ema"))
        with pytest.raises(UserError, match=got):
            load.read(files[kind], Hints.parse(hints, "ema"))


def test_attention_that_the_weights_show_is_refused_otherwise(file: Path) -> None:
    sides = {"attention_resolutions": [4, 8]}
    load.read(file, Hints.parse(TOLD | sides, "ema"))
    with pytest.raises(UserError, match="attention_resolutions"):
        load.read(file, Hints.parse(TOLD | {"attention_resolutions": [4]}, "ema"))


def test_initial_weights_of_other_heads_than_the_network_are_refused(file: Path) -> None:
    """The shapes agree, and the function is another."""
    network = load.build(NODE, load.NETWORKS, nn.Module)
    scale = {"weights": "ema", "c_noise_scale": 250.0}
    load.load_initial(str(file), network, **scale, hints=TOLD)
    with pytest.raises(UserError, match="attention heads"):
        load.load_initial(str(file), network, **scale)
    with pytest.raises(UserError, match="attention heads"):
        load.load_initial(str(file), network, **scale, hints=TOLD | {"num_heads": 2})


def test_a_run_takes_them_and_records_them(file: Path) -> None:
    network = {
        name: value
        for name, value in NODE.items()
        if name in ("model_channels", "num_res_blocks", "num_heads")
    }
    options = [f"model.network.{name}={value}" for name, value in network.items()]
    options += ["model.network.channel_mult=[1,2]", "model.network.attention_resolutions=[8,4]"]
    options += [
        "model.network.num_head_channels=null",
        "model.network.num_classes=null",
        "model.network.image_size=8",
    ]
    options += [
        "data=folder",
        "data.path=/x",
        "data.image_size=8",
        "model=adm_imagenet64",
        "mode=cd",
        f"teacher={file}",
    ]
    config = composed("train", *options, "teacher_hints={image_size:8,num_heads:4}")
    module = build_module(config)
    assert set(load.attention_heads(module)) == {4}  # of student and teacher
    for name in ("teacher", "init"):
        assert module.sources[name]["hints"] == "image_size=8 num_heads=4"
        assert module.config[f"{name}_hints"] == TOLD
    with pytest.raises(UserError, match="attention heads"):
        build_module(composed("train", *options))


@pytest.mark.parametrize(
    "file", sorted((ROOT / "conf" / "mode").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_teacher_of_a_mode_takes_the_hints(file: Path) -> None:
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    for _, node in schema.targets(content):
        if node["_target_"] == "consistency.checkpoints.load.load_teacher":
            assert node["hints"] == "${teacher_hints}"
