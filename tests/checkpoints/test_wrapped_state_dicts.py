"""State dicts as other programs wrap them: prefixes come off, every set of weights is offered, the rest is named."""

from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import consistency
from conftest import Run
from consistency.checkpoints import diffusers_unet, load, nvlabs, wrapped
from consistency.checkpoints.contents import Hints
from consistency.errors import UserError
from golden_harness import FOLDER, read_json
from tiny_models import TINY_ADM, TINY_SONG, randomised, tiny_adm

ONLINE = tiny_adm()
EMA = {name: value + 1 for name, value in ONLINE.items()}
State = dict[str, Any]


def under(prefix: str, weights: dict[str, Tensor]) -> State:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def opened(path: Path, weights: str = "ema") -> dict[str, Tensor]:
    found = consistency.load(path, "consistency", weights=weights)
    return found.denoiser.network.state_dict()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name].float()) for name in found
    )


def lit_ema(prefix: str) -> State:
    """LitEma of latent diffusion: names without dots, behind one prefix."""
    names = {f"{prefix}{name}".replace(".", ""): value for name, value in EMA.items()}
    return under("model_ema.", names) | {"model_ema.decay": torch.tensor(0.9999)}


STEPS = {"step": torch.tensor(3), "initted": torch.tensor(True)}
ADAM = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}

ONE: dict[str, State] = {
    "compiled": under("_orig_mod.", ONLINE),
    "DDP": under("module.", ONLINE),
    "DDP of compiled": under("module._orig_mod.", ONLINE),
    "compiled DDP": under("_orig_mod.module.", ONLINE),
    "compiled part by part": {
        f"module.{name.replace('_blocks.0.', '_blocks.0._orig_mod.')}": value
        for name, value in ONLINE.items()
    },
    "recomputed part by part": {
        name.replace(".0.in_layers", ".0._checkpoint_wrapped_module.in_layers"): value
        for name, value in ONLINE.items()
    },
    "Lightning, model": {"state_dict": under("model.", ONLINE), "epoch": 3, "loops": {"a": {}}},
    "Lightning, net": {"state_dict": under("net.", ONLINE), "optimizer_states": [ADAM]},
    "Lightning, compiled": {"state_dict": under("model._orig_mod.", ONLINE)},
    "model_state_dict": {"model_state_dict": ONLINE, "optimizer_state_dict": ADAM, "loss": 0.1},
    "deeper": {"checkpoint": {"trainer": {"networks": {"generator": ONLINE}}}},
    "DeepSpeed": {"module": under("module.", ONLINE), "ds_config": {}},
    "buffers beside": ONLINE | {"betas": torch.zeros(9), "sqrt_alphas_cumprod": torch.zeros(9)},
    "k-diffusion's buffers": under("inner_model.", ONLINE) | {"sigmas": torch.zeros(9)},
    "an averaged model": under("module.", ONLINE) | {"n_averaged": torch.tensor(7)},
    "half precision": {"model": {k: v.to(torch.bfloat16) for k, v in ONLINE.items()}},
    "parameters": {"model": {k: nn.Parameter(v) for k, v in ONLINE.items()}},
    "arrays of numpy": {"model": {k: v.numpy() for k, v in ONLINE.items()}},
    "a step number beside": ONLINE | {"global_step": 7, "name": "run", "args": Namespace(lr=0.1)},
    "an optimizer by name": {"net": ONLINE, "optim": {"exp_avg": EMA}},
}

TWO: dict[str, State] = {
    "model and ema": {"model": ONLINE, "ema": EMA},
    "net and ema": {"ema": EMA, "net": ONLINE, "step": 3},
    "k-diffusion": {
        "model": under("inner_model.", ONLINE),
        "model_ema": under("inner_model.", EMA),
        "opt": ADAM,
        "sched": {"last_epoch": 3},
    },
    "ema_pytorch": under("online_model.", ONLINE) | under("ema_model.", EMA) | STEPS,
    "Lightning with an average": {"state_dict": under("model.", ONLINE) | under("ema_model.", EMA)},
    "LitEma": {"state_dict": under("model.diffusion_model.", ONLINE) | lit_ema("diffusion_model.")},
    "LitEma of a bare network": under("model.", ONLINE) | lit_ema(""),
    "state_dict_ema": {"state_dict": under("module.", ONLINE), "state_dict_ema": EMA},
    "params": {"params": ONLINE, "params_ema": EMA},
    "shadow": {"model": ONLINE, "ema": {"decay": 0.999, "shadow": EMA}},
    "shadow_params": {
        "model": under("module.", ONLINE),
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": [*EMA.values()]},
    },
    "an average inside": ONLINE | under("ema.", EMA),
    "DDP and an average": {"model": under("module.", ONLINE), "ema": under("_orig_mod.", EMA)},
    "non_ema": {"non_ema": ONLINE, "ema": EMA},
    "ema_pytorch below a key": {
        "model": ONLINE,
        "ema": under("online_model.", ONLINE) | under("ema_model.", EMA) | STEPS,
    },
    "a list": {"networks": [under("online.", ONLINE), under("average.", EMA)], "epoch": 3},
    "default dictionaries": defaultdict(dict, {"net": OrderedDict(ONLINE), "net_ema": EMA}),
}


@pytest.mark.parametrize("name", ONE)
def test_one_set_of_weights_opens_wherever_it_stands(name: str, tmp_path: Path) -> None:
    torch.save(ONE[name], tmp_path / "model.pt")
    expected = ONLINE
    if name == "half precision":
        expected = {k: v.to(torch.bfloat16) for k, v in ONLINE.items()}
    assert same(opened(tmp_path / "model.pt"), expected)


@pytest.mark.parametrize("name", TWO)
def test_both_sets_are_offered_by_name(name: str, tmp_path: Path) -> None:
    torch.save(TWO[name], tmp_path / "model.ckpt")
    assert same(opened(tmp_path / "model.ckpt"), EMA)
    assert same(opened(tmp_path / "model.ckpt", "online"), ONLINE)
    with pytest.raises(UserError, match=r"online.*ema|ema.*online"):
        opened(tmp_path / "model.ckpt", "target")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".safetensors", ""])
def test_the_suffix_does_not_matter(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"pytorch_model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(under("module.", ONLINE), path)
    assert same(opened(path), ONLINE)
    if suffix in (".pt", ".bin"):
        torch.save(TWO["model and ema"], path, _use_new_zipfile_serialization=False)
        assert same(opened(path), EMA)


def test_a_folder_of_accelerate_opens(tmp_path: Path) -> None:
    import json

    torch.save(under("module.", ONLINE), tmp_path / "pytorch_model.bin")
    assert same(opened(tmp_path), ONLINE)
    (tmp_path / "pytorch_model.bin").unlink()
    places = {}
    for number in range(2):
        part = dict(list(ONLINE.items())[number::2])
        torch.save(part, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
        places |= dict.fromkeys(part, f"pytorch_model-0000{number}-of-00002.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert same(opened(tmp_path), ONLINE)
    assert same(opened(index), ONLINE)


def test_several_averages_have_names_of_their_own(tmp_path: Path) -> None:
    content = {"model": ONLINE, "ema": {"0.99": EMA, "0.999": ONLINE}, "target_model": EMA}
    torch.save(content, tmp_path / "model.pt")
    assert same(opened(tmp_path / "model.pt", "ema:0.999"), ONLINE)
    assert same(opened(tmp_path / "model.pt", "ema:0.99"), EMA)
    assert same(opened(tmp_path / "model.pt", "target"), EMA)
    assert same(opened(tmp_path / "model.pt"), EMA)


def test_networks_of_two_sizes_in_one_file_open(tmp_path: Path) -> None:
    """A teacher and a smaller student: the settings are those of the set that is loaded."""
    network = load.build(TINY_ADM | {"channel_mult": [1, 2]}, load.NETWORKS, nn.Module)
    larger = network.state_dict()
    torch.save({"student": ONLINE, "teacher": larger}, tmp_path / "model.pt")
    assert same(opened(tmp_path / "model.pt", "online"), ONLINE)
    assert same(opened(tmp_path / "model.pt", "teacher"), larger)


def test_what_was_taken_off_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = under("module._orig_mod.", ONLINE) | {"lpips.lin0.weight": torch.zeros(3)}
    torch.save({"state_dict": content, "ema": EMA}, tmp_path / "model.pt")
    opened(tmp_path / "model.pt", "online")
    (line,) = (r for r in capsys.readouterr().err.splitlines() if "takes" in r)
    assert "below state_dict.module._orig_mod" in line
    assert "weights=ema" in line
    assert "1 other tensors, such as lpips.lin0.weight" in line
    torch.save(ONLINE, tmp_path / "plain.pt")
    opened(tmp_path / "plain.pt")
    assert "takes" not in capsys.readouterr().err


def test_an_average_that_cannot_be_told_apart_is_refused_by_name(tmp_path: Path) -> None:
    listed = [*EMA.values()][::-1]
    torch.save({"model": ONLINE, "ema": {"shadow_params": listed}}, tmp_path / "model.pt")
    assert same(opened(tmp_path / "model.pt", "online"), ONLINE)
    with pytest.raises(UserError, match=r"ema\.shadow_params: \d+ tensors without names"):
        opened(tmp_path / "model.pt")


def test_only_the_set_that_is_there_is_listed(tmp_path: Path) -> None:
    torch.save({"model": ONLINE, "target_model": EMA}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="online, target"):
        opened(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"backbone.conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}},
        {"backbone.conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)},
        under("module.", {"backbone.conv1.weight": torch.zeros(2)}),
    ],
)
def test_other_weights_are_refused_with_their_first_names(content: State, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"backbone\.conv1\.weight.*time_embed\.0\.weight"):
        opened(tmp_path / "model.pt")


def test_a_damaged_set_is_refused_with_its_name(tmp_path: Path) -> None:
    weights = dict(ONLINE)
    weights["out.9.bias"] = weights.pop("out.0.bias")
    torch.save({"model": under("module.", weights)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"out\.[09]\.bias"):
        opened(tmp_path / "model.pt")


def test_code_beside_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"model": ONLINE, "hook": nn.Linear(2, 2)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="Linear, which no checkpoint needs"):
        opened(tmp_path / "model.pt")


def test_a_file_that_holds_itself_is_read_to_its_end(tmp_path: Path) -> None:
    content: State = {"model": ONLINE}
    content["again"] = content
    inner: State = {}
    for _ in range(60):
        inner = {"a": inner, "b": inner}
    torch.save(content | {"doubled": inner}, tmp_path / "model.pt")
    assert same(opened(tmp_path / "model.pt"), ONLINE)


# -------------------------------------------------------------------------- other names


def song_state(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kwargs = TINY_SONG | {"in_channels": 3, "out_channels": 3} | changes
    settings = nvlabs.settings(kwargs["model_type"], kwargs)
    network = load.build(settings, load.NETWORKS, nn.Module)
    return settings, randomised(network)


def test_state_dicts_of_nvlabs_networks_open(tmp_path: Path) -> None:
    """All settings are in names and shapes; which scalings belong to it is not, and is asked for."""
    changes = {
        "channel_mult": [1, 2],
        "attn_resolutions": [4],
        "encoder_type": "residual",
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
        "label_dim": 4,
    }
    for change in ({}, changes):
        settings, weights = song_state(**change)
        torch.save({"net": under("module.model.", weights)}, tmp_path / "net.pt")
        loaded = consistency.load(tmp_path / "net.pt", "teacher")
        assert same(loaded.denoiser.network.state_dict(), weights)
        assert loaded.card.network == settings | {"dropout": 0.0}
        assert loaded.denoiser.preconditioning.c_noise_scale == 0.25
        with pytest.raises(UserError, match="does not record"):
            consistency.load(tmp_path / "net.pt")


def test_released_nvlabs_networks_are_known_by_their_names() -> None:
    path = FOLDER / "edm" / "released_architectures.json"
    if not path.is_file():
        pytest.skip("a golden folder without the released architectures")
    for entry in read_json(path).values():
        kwargs = entry["kwargs"] | {"in_channels": 3, "out_channels": 3}
        shapes = {
            name.removeprefix("model."): torch.zeros(1).expand(shape)
            for name, shape in entry["shapes"].items()
        }
        found, notes = nvlabs.settings_of(shapes, Hints())
        assert found == nvlabs.settings(kwargs["model_type"], kwargs) | {"dropout": 0.0}
        assert not notes


def test_state_dicts_in_the_names_of_diffusers_open(tmp_path: Path) -> None:
    node = TINY_ADM | {"channel_mult": [1, 2], "attention_resolutions": [4], "num_classes": 5}
    for in_blocks in (True, False):
        node = node | {"resblock_updown": in_blocks}
        weights = randomised(load.build(node, load.NETWORKS, nn.Module))
        theirs = diffusers_unet.their_weights(node, weights)
        torch.save({"state_dict": under("model.", theirs)}, tmp_path / "unet.ckpt")
        loaded = consistency.load(
            tmp_path / "unet.ckpt", "teacher", image_size=8, num_head_channels=32
        )
        assert same(loaded.denoiser.network.state_dict(), weights)
        assert loaded.card.network == node


# ------------------------------------------------------------------------- heads, outputs


def test_heads_that_a_state_dict_does_not_hold_can_be_given(convert: Run, tmp_path: Path) -> None:
    node = TINY_ADM | {"channel_mult": [1, 2], "attention_resolutions": [8, 4]}
    node |= {"num_heads": 2, "num_head_channels": None, "num_heads_upsample": 4}
    weights = randomised(load.build(node, load.NETWORKS, nn.Module))
    torch.save(weights, tmp_path / "model.pt")
    heads = ["num_heads=2", "num_heads_upsample=4", "image_size=8"]
    target = tmp_path / "ours"
    outcome = convert(f"source={tmp_path / 'model.pt'}", "role=teacher", *heads, f"output={target}")
    assert outcome.status == 0, outcome.err
    assert consistency.load(target).card.network == node
    for to, hint in (("diffusers", "4 attention heads on the way up"), ("openai", None)):
        outcome = convert(f"source={target}", f"to={to}", f"output={tmp_path / to}")
        assert outcome.status == (2 if hint else 0), outcome.err
        assert hint is None or hint in outcome.err


@pytest.mark.parametrize("verb_of", ["source", "verify"])
def test_a_learned_variance_is_refused_by_name(verb_of: str, convert: Run, tmp_path: Path) -> None:
    node = TINY_ADM | {"out_channels": 6}
    weights = load.build(node, load.NETWORKS, nn.Module).state_dict()
    torch.save({"model": under("module.", weights)}, tmp_path / "model.pt")
    outcome = convert(f"{verb_of}={tmp_path / 'model.pt'}", "role=consistency")
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert "6 output channels (out.2.weight) for 3" in outcome.err


def test_first_names_tell_what_a_file_holds() -> None:
    assert wrapped.first_names({"a": 1, "b": 2}) == "the keys a, b"
    assert wrapped.first_names([1]) == "a list"
    content = {"m": {"x": torch.zeros(1), "y": torch.zeros(1)}}
    assert wrapped.first_names(content, 1) == "2 tensors below 'm' named x ..."
