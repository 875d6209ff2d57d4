"""Folders of diffusers as they lie about: in parts, in variants, in training, in a cache; others are refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import consistency
from conftest import Run
from consistency.checkpoints.diffusers import write_diffusers
from consistency.checkpoints.diffusers_unet import their_weights
from consistency.errors import UserError
from golden_harness import read_json
from tiny_models import tiny, tiny_adm, tiny_card, write_config

NAME = "diffusion_pytorch_model"
ONLINE = tiny_adm()
EMA = {name: value + 1 for name, value in ONLINE.items()}


def theirs(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of diffusers."""
    found = their_weights(tiny_card()["network"], weights)
    return {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in found.items()
    }


def write_unet(folder: Path) -> Path:
    """A UNet without weights."""
    write_config(folder)
    (folder / f"{NAME}.safetensors").unlink()
    return folder


def put(folder: Path, weights: dict[str, Tensor], name: str) -> None:
    """Weights in one file, or spread over three where the name is that of an index."""
    found = theirs(weights)
    if not name.endswith(".json"):
        save = save_file if name.endswith(".safetensors") else torch.save
        save(found, folder / name)
        return
    places = {}
    for number in range(3):
        part = {key: found[key] for key in sorted(found)[number::3]}
        file = f"{NAME}-{number + 1:05d}-of-00003.{'bin' if '.bin' in name else 'safetensors'}"
        put_part = torch.save if ".bin" in name else save_file
        put_part(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def is_(
    path: Path, expected: dict[str, Tensor], weights: str = "ema", role: Any = "teacher"
) -> bool:
    found = consistency.load(path, role, weights=weights).denoiser.network.state_dict()
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "name",
    [
        f"{NAME}.safetensors",
        f"{NAME}.bin",
        f"{NAME}.fp16.bin",
        f"{NAME}.fp16.safetensors",
        f"{NAME}.bf16.safetensors",
        f"{NAME}.non_ema.safetensors",
        f"{NAME}.safetensors.index.json",
        f"{NAME}.safetensors.index.fp16.json",
        f"{NAME}.bin.index.json",
    ],
)
def test_every_form_of_the_weights_opens(name: str, tmp_path: Path) -> None:
    unet = write_unet(tmp_path / "unet")
    put(unet, ONLINE, name)
    assert is_(unet, ONLINE)
    assert is_(unet / name, ONLINE)


def test_variants_are_offered_by_name(tmp_path: Path) -> None:
    """The usual file holds the average; a file that is named is read, not the usual one beside it."""
    unet = write_unet(tmp_path / "unet")
    put(unet, EMA, f"{NAME}.safetensors")
    put(unet, ONLINE, f"{NAME}.bin")  # the older form of a download, never preferred
    put(unet, ONLINE, f"{NAME}.non_ema.safetensors")
    put(unet, ONLINE, f"{NAME}.fp16.safetensors")
    assert is_(unet, EMA)
    assert is_(unet, ONLINE, "online")
    assert is_(unet, ONLINE, "fp16")
    assert is_(unet / f"{NAME}.non_ema.safetensors", ONLINE)
    assert is_(unet / f"{NAME}.safetensors", EMA)
    with pytest.raises(UserError, match="ema, fp16, online"):
        consistency.load(unet, "teacher", weights="target")


def test_a_variant_that_is_the_average_leaves_the_usual_one_to_training(tmp_path: Path) -> None:
    unet = write_unet(tmp_path / "unet")
    put(unet, ONLINE, f"{NAME}.safetensors")
    put(unet, EMA, f"{NAME}.ema.safetensors")
    assert is_(unet, EMA)
    assert is_(unet, ONLINE, "online")


@pytest.mark.parametrize("role", ["teacher", "consistency"])
def test_a_checkpoint_of_accelerate_holds_both_sets(role: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    for name, weights in (("unet", ONLINE), ("unet_ema", EMA)):
        put(write_unet(folder / name), weights, f"{NAME}.safetensors")
    config = folder / "unet_ema" / "config.json"
    config.write_text(json.dumps(read_json(config) | {"decay": 0.9999, "optimization_step": 100}))
    torch.save({"state": {}}, folder / "optimizer.bin")
    assert is_(folder, EMA, role=role)
    assert is_(folder, ONLINE, "online", role)
    assert is_(folder / "unet", ONLINE, role=role)
    shutil.rmtree(folder / "unet_ema")
    assert is_(folder, ONLINE, role=role)
    assert is_(folder, ONLINE, "online", role=role)


def write_pipeline(folder: Path, name: str = f"{NAME}.safetensors") -> Path:
    write_diffusers(folder, tiny(), ONLINE)
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    put(folder / "unet", ONLINE, name)
    return folder


@pytest.mark.parametrize("name", [f"{NAME}.fp16.safetensors", f"{NAME}.safetensors.index.json"])
def test_a_pipeline_opens_with_every_form_of_its_weights(name: str, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline", name)
    assert is_(folder, ONLINE, role=None)
    assert is_(folder / "unet" / name, ONLINE, role=None)


def into_cache(source: Path, cache: Path, commit: str) -> Path:
    """A folder as the Hugging Face cache keeps it: files by their hash, a snapshot of links, a ref."""
    snapshot = cache / "snapshots" / commit
    (cache / "blobs").mkdir(parents=True, exist_ok=True)
    (cache / "refs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        blob, link = cache / "blobs" / f"{commit}{number}", snapshot / file.relative_to(source)
        blob.write_bytes(file.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(os.path.relpath(blob, link.parent), link)
    return snapshot


def test_the_top_folder_of_a_hub_cache_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "models--someone--model"
    source = write_pipeline(tmp_path / "source", f"{NAME}.safetensors.index.json")
    snapshot = into_cache(source, cache, "a1b2")
    other = tmp_path / "other"
    other.mkdir()
    torch.save(EMA, other / "cd.pt")
    into_cache(other, cache, "c3d4")
    (cache / "refs" / "main").write_text("a1b2")
    assert is_(cache, ONLINE, role=None)
    assert is_(snapshot, ONLINE, role=None)
    assert "takes the snapshot a1b2" in capsys.readouterr().err
    (cache / "refs" / "main").write_text("c3d4")
    assert is_(cache, EMA)
    (cache / "refs" / "main").unlink()
    (cache / "refs" / "v2").write_text("a1b2")
    assert is_(cache, ONLINE, role=None)


def test_a_hub_cache_without_content_is_one_error(tmp_path: Path) -> None:
    for name in ("refs", "snapshots"):
        (tmp_path / "models--a--b" / name).mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs" / "main").write_text("../../..")
    with pytest.raises(UserError, match="a snapshot in"):
        consistency.load(tmp_path / "models--a--b")


@pytest.mark.parametrize(
    "change",
    [
        lambda places: places | {"conv_in.bias": "../secret.safetensors"},
        lambda places: places | {"conv_in.bias": "/etc/secret.safetensors"},
        lambda places: places | {"conv_in.bias": "sub/secret.safetensors"},
        lambda places: places | {"conv_in.bias": ".."},
        lambda places: places | {"conv_in.bias": 7},
        lambda places: places | {"conv_in.bias": f"{NAME}-00009-of-00003.safetensors"},
        lambda places: places | {"nowhere.bias": places["conv_in.bias"]},
        lambda places: {k: v for k, v in places.items() if k != "conv_in.bias"},
        lambda places: [*places],
        lambda places: {},
    ],
)
def test_an_index_that_means_something_else_is_refused(
    change: Callable[[dict[str, str]], object], tmp_path: Path
) -> None:
    unet = write_unet(tmp_path / "unet")
    save_file(theirs(ONLINE), tmp_path / "secret.safetensors")
    index = unet / f"{NAME}.safetensors.index.json"
    put(unet, ONLINE, index.name)
    places = read_json(index)["weight_map"]
    index.write_text(json.dumps({"weight_map": change(places)}))
    with pytest.raises(UserError, match=r"index\.json|conv_in\.bias|nowhere\.bias"):
        consistency.load(unet, "teacher")


# ------------------------------------------------------------------------- other networks

OTHERS: dict[str, object] = {
    "out_channels": 6,
    "in_channels": 9,
    "time_embedding_type": "learned",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "center_input_sample": True,
    "class_embed_type": "timestep",
    "cross_attention_dim": 768,
    "addition_embed_type": "text",
    "prediction_type": "v_prediction",
    "resnet_time_scale_shift": "ada_group",
    "mid_block_type": None,
    "mid_block_scale_factor": 2,
    "add_attention": False,
    "act_fn": "gelu",
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "downsample_type": "kernel",
    "upsample_type": None,
    "norm_num_groups": None,
    "attn_norm_num_groups": 8,
    "attention_head_dim": [8, 8],
    "layers_per_block": [1, 2],
    "sample_size": [8, 16],
    "num_class_embeds": "ten",
    "time_embedding_dim": 64,
    "block_out_channels": 32,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "_class_name": "UNet2DConditionModel",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_that_no_network_of_ours_has_is_refused_by_name_and_value(
    name: str, tmp_path: Path
) -> None:
    folder = write_config(tmp_path / "unet", **{name: OTHERS[name]})
    with pytest.raises(UserError) as error:
        consistency.load(folder, "teacher")
    key = {"_class_name": "class", "down_block_types": "block"}.get(name, name)
    value = OTHERS[name][0] if name == "down_block_types" else OTHERS[name]  # type: ignore[index]
    assert key in str(error.value)
    assert str(value) in str(error.value)


def test_four_latents_of_nine_channels_are_refused(tmp_path: Path) -> None:
    """An inpainting network: its input holds a mask and an image beside the latent."""
    folder = write_config(tmp_path / "unet", in_channels=9, out_channels=4)
    with pytest.raises(UserError, match=r"out_channels=4, where in_channels=9"):
        consistency.load(folder, "teacher")


@pytest.mark.parametrize("verb_of", ["source", "verify"])
def test_a_pipeline_with_a_learned_variance_ends_in_no_stack_trace(
    verb_of: str, convert: Run, tmp_path: Path
) -> None:
    folder = variance(tmp_path)
    outcome = convert(f"{verb_of}={folder}")
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert "out_channels=6" in outcome.err


def test_no_samples_of_a_pipeline_with_a_learned_variance(verb: Run, tmp_path: Path) -> None:
    outcome = verb("sample", f"checkpoint={variance(tmp_path)}", "num_samples=1")
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert "out_channels=6" in outcome.err


def variance(folder: Path) -> Path:
    """A pipeline whose network gives a variance beside its estimate, weights and all."""
    pipeline = write_pipeline(folder / "pipeline")
    config = pipeline / "unet" / "config.json"
    config.write_text(json.dumps(read_json(config) | {"out_channels": 6}))
    path = pipeline / "unet" / f"{NAME}.safetensors"
    weights = load_file(path)
    for part in ("conv_out.weight", "conv_out.bias"):
        weights[part] = torch.cat([weights[part]] * 2)
    save_file(weights, path)
    return pipeline


SCHEDULERS = {
    "_class_name": "DDIMScheduler",
    "prediction_type": "v_prediction",
    "s_noise": 1.1,
    "num_train_timesteps": 1,
    "sigma_min": -1.0,
    "sigma_max": "80",
    "rho": None,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_another_process_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(read_json(config) | {name: SCHEDULERS[name]}))
    with pytest.raises(UserError, match=name.strip("_").removesuffix("_name")):
        consistency.load(folder)


def test_the_network_of_another_pipeline_is_refused_in_its_own_folder_too(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    for path in (folder, folder / "unet", folder / "unet" / f"{NAME}.safetensors"):
        with pytest.raises(UserError, match="DDPMPipeline"):
            consistency.load(path, "teacher")


@pytest.mark.filterwarnings("ignore")
def test_shards_and_averages_as_diffusers_itself_writes_them(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import EMAModel

    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    unet.save_pretrained(tmp_path / "variant", max_shard_size="200KB", variant="fp16")
    assert len(list((tmp_path / "sharded").glob("*-of-*"))) > 1
    average = EMAModel(unet.parameters(), model_cls=diffusers.UNet2DModel, model_config=unet.config)
    unet.save_pretrained(tmp_path / "checkpoint-1" / "unet")
    average.save_pretrained(tmp_path / "checkpoint-1" / "unet_ema")
    found = [
        consistency.load(tmp_path / name, "teacher").denoiser.network.state_dict()
        for name in ("sharded", "variant", "checkpoint-1")
    ]
    torch.save(unet.state_dict(), tmp_path / "plain.pt")
    found.append(
        consistency.load(
            tmp_path / "plain.pt", "teacher", num_head_channels=8, image_size=8
        ).denoiser.network.state_dict()
    )
    assert all(torch.equal(a[k], found[0][k]) for a in found for k in found[0])
