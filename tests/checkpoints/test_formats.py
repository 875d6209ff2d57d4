"""Checkpoints of other programs: the same numbers as those programs, and one clear error for every bad file."""

import io
import json
import os
import pickle
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import consistency
import foreign
from conftest import REPORT
from consistency.checkpoints import diffusers as diffusers_folders
from consistency.checkpoints import jcm, nvlabs, openai, ours
from consistency.checkpoints import load as checkpoint
from consistency.checkpoints import safetensors as sealed
from consistency.checkpoints.contents import Hints
from consistency.errors import UserError
from consistency.inference.card import ModelCard
from consistency.inference.model import Model
from consistency.runtime.files import checksum_path
from golden_harness import FOLDER, OUTPUT, Archive, read_json, read_safetensors
from golden_networks import model_configurations, openai_arguments

OPENAI_NETWORKS = sorted(read_json(FOLDER / "openai_unet" / "configs.json"))
NVLABS_NETWORKS = sorted(read_json(FOLDER / "edm" / "configs.json"))
ROLES = ("teacher", "consistency")


def weights_of(folder: str, name: str) -> dict[str, Tensor]:
    return {
        k: v.float() for k, v in read_safetensors(FOLDER / folder / f"{name}.safetensors").items()
    }


def released(name: str) -> dict[str, Any]:
    """What a golden folder says of the released networks; only some folders do."""
    if not (FOLDER / name).is_file():
        pytest.skip(f"a golden folder without {name}")
    return read_json(FOLDER / name)


def agrees(archive: Archive, name: str, ours: Tensor) -> None:
    archive.compare(name, ours, OUTPUT)


# ------------------------------------------------------------------ the same numbers: OpenAI


@pytest.fixture(params=OPENAI_NETWORKS)
def openai_case(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[Archive, Path, dict[str, Any]]:
    """Golden arrays, a file as the published code saves it, and the settings that the file does not hold."""
    name = request.param
    settings = openai_arguments(read_json(FOLDER / "openai_unet" / "configs.json")[name]["cfg"])
    heads = ("num_head_channels", "num_heads", "num_heads_upsample", "image_size")
    hints = {name: settings[name] for name in heads if settings.get(name) is not None}
    path = foreign.write_openai(tmp_path / "ema_0.9999_000000.pt", weights_of("openai_unet", name))
    return Archive(FOLDER / "openai_unet" / f"{name}.npz"), path, hints


def test_openai(openai_case: tuple[Archive, Path, dict[str, Any]]) -> None:
    """Both scalings, the time input 250 ln t and the order of qkv, against the published denoisers."""
    archive, path, hints = openai_case
    label = archive.tensor("y") if "y" in archive else None
    for role, name in (("teacher", "edm"), ("consistency", "boundary")):
        loaded = consistency.load(path, role, **hints)
        assert loaded.card.role == role
        network = loaded.denoiser.network
        agrees(archive, "output", network(archive.tensor("x"), archive.tensor("timesteps"), label))
        if f"denoise_{name}.denoised" in archive:
            found = loaded.denoise(archive.tensor("x"), archive.tensor("denoise.sigma"), label)
            agrees(archive, f"denoise_{name}.denoised", found)


def test_openai_older_torch_form(tmp_path: Path) -> None:
    weights = weights_of("openai_small", "teacher")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = consistency.load(tmp_path / "old.pt", "teacher").denoiser.network.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_released_openai_networks_are_recognised() -> None:
    """Every setting of the two released networks, from names and shapes alone."""
    shipped = model_configurations()
    entries = released("openai_unet/released_architectures.json")
    for entry in entries.values():
        shapes = {name: torch.zeros(1).expand(shape) for name, shape in entry["shapes"].items()}
        found, notes = openai.settings(shapes, Hints())
        name = "adm_imagenet64" if found["image_size"] == 64 else "adm_lsun256"
        expected = shipped[name]["network"] | {"num_heads": 1}
        assert not notes
        assert found == {key: expected[key] for key in found}


def test_pooling_layers_without_weights_are_recognised() -> None:
    from consistency.networks.adm import ADM

    wanted = {"image_size": 32, "in_channels": 3, "model_channels": 32, "num_res_blocks": 1}
    wanted |= {"attention_resolutions": [16], "channel_mult": [1, 2, 2], "resblock_updown": False}
    wanted |= {"use_scale_shift_norm": False, "num_head_channels": 32}
    for conv in (True, False):
        weights = ADM(**wanted, conv_resample=conv).state_dict()
        found, _ = openai.settings(weights, Hints(image_size=32, num_head_channels=32))
        assert found["conv_resample"] is conv
        assert {key: found[key] for key in wanted} == wanted


# ------------------------------------------------------------------ the same numbers: NVlabs


@pytest.mark.parametrize("name", NVLABS_NETWORKS)
def test_nvlabs(name: str, tmp_path: Path) -> None:
    """Snapshots and training states, without augmentation labels; classes; "no class" where no label is given."""
    kwargs = read_json(FOLDER / "edm" / "configs.json")[name]["kwargs"]
    weights = weights_of("edm", name)
    archive = Archive(FOLDER / "edm" / f"{name}.npz")
    x, t = archive.tensor("x"), archive.tensor("sigma")
    paths = [
        foreign.write_nvlabs(tmp_path / "network-snapshot-000001.pkl", kwargs, weights),
        foreign.write_nvlabs_state(tmp_path / "training-state-000001.pt", kwargs, weights),
    ]
    for path in paths:
        loaded = consistency.load(path)
        assert loaded.card.role == "teacher"
        assert loaded.denoiser.preconditioning.c_noise_scale == 0.25
        assert not any("augment" in key for key in loaded.denoiser.network.state_dict())
        if "D_x_nolabels_noaug" in archive:
            agrees(archive, "D_x_nolabels_noaug", loaded.denoise(x, t))
        if "augment_labels" not in archive:
            label = archive.tensor("class_labels") if "class_labels" in archive else None
            label = label.argmax(1) if label is not None and label.ndim == 2 else label
            agrees(archive, "D_x", loaded.denoise(x, t, label))


def test_ect_is_a_consistency_model(tmp_path: Path) -> None:
    """ECT's class has the boundary condition at its own sigma_min."""
    config = read_json(FOLDER / "ect" / "config.json")
    archive = Archive(FOLDER / "ect" / "loss.npz")
    path = foreign.write_nvlabs(
        tmp_path / "ecm.pkl", config["ECMPrecond_kwargs"], weights_of("ect", "net"), "ECMPrecond"
    )
    loaded = consistency.load(path)
    assert loaded.card.role == "consistency"
    if not config["ECMPrecond_kwargs"]["label_dim"]:
        found = loaded.denoise(archive.tensor("precond.x"), archive.tensor("precond.sigma"))
        agrees(archive, "precond.eval_mode", found)
    x = torch.randn(2, *archive.tensor("precond.x").shape[1:])
    assert torch.equal(loaded.denoise(x, torch.full((2,), config["sigma_min"])), x)
    with pytest.raises(UserError, match="a teacher checkpoint"):
        consistency.load(path, "teacher")


def test_released_nvlabs_networks_are_recognised() -> None:
    shipped = model_configurations()
    free = {"dropout", "attention", "checkpoint_activations", "num_classes"}
    for entry in released("edm/released_architectures.json").values():
        kwargs = entry["kwargs"] | {"in_channels": 3, "out_channels": 3}
        found = nvlabs.settings(kwargs["model_type"], kwargs)
        assert any(
            all(
                config["network"].get(key, value) == value
                for key, value in found.items()
                if key not in free
            )
            for config in shipped.values()
            if config["network"]["_target_"] == found["_target_"]
        )


# --------------------------------------------------------------------- the same numbers: JAX


def test_jcm(tmp_path: Path) -> None:
    """Transposed kernels, separate q, k, v, and both scalings around the published network's output."""
    config = read_json(FOLDER / "jcm" / "ncsnpp_config.json")
    path = foreign.write_flax(tmp_path / "checkpoint_80", weights_of("jcm", "ncsnpp"))
    archive = Archive(FOLDER / "jcm" / "ncsnpp.npz")
    hints = {"image_size": config["_size"], "attention_resolutions": config["attn_resolutions"]}
    x, c = archive.tensor("x").permute(0, 3, 1, 2), archive.tensor("time_cond")
    output = archive.tensor("output").permute(0, 3, 1, 2)
    for role, t_min in (("teacher", 0.0), ("consistency", 0.002)):
        loaded = consistency.load(path, role, **hints)
        agrees(archive, "output", loaded.denoiser.network(x, c).permute(0, 2, 3, 1))
        t = torch.exp(4 * c.double())[:, None, None, None]
        x_t = (x * (t**2 + 0.25).sqrt()).float()
        skip, out = 0.25 / ((t - t_min) ** 2 + 0.25), 0.5 * (t - t_min) / (t**2 + 0.25).sqrt()
        expected = skip * x_t + out * output
        found = loaded.denoise(x_t, t.flatten().float())
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_jcm_holds_several_weights(tmp_path: Path) -> None:
    path = foreign.write_flax(tmp_path / "checkpoint_80", weights_of("jcm", "ncsnpp"))
    online = consistency.load(path, "teacher", weights="online").denoiser.network
    assert not any(parameter.any() for parameter in online.parameters())  # as the writer made them
    with pytest.raises(UserError, match="ema, online"):
        consistency.load(path, "teacher", weights="target")


def test_released_jcm_network_is_recognised() -> None:
    entry = released("jcm/cifar10_ncsnpp_param_shapes.json")
    params = {name: torch.zeros(1).expand(shape) for name, shape in entry["shapes"].items()}
    found, notes = jcm.settings(params, Hints())
    expected = model_configurations()["ncsnpp_cifar10"]["network"]
    assert not notes
    assert found == {key: expected[key] for key in found}


# --------------------------------------------------------------- what the file does not say


@pytest.mark.parametrize("kind", ["openai", "jcm", "unet"])
def test_an_unknown_role_is_asked_for(kind: str, files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"role=teacher .* role=consistency") as error:
        consistency.load(files[kind])
    assert "does not record one" in str(error.value)


def test_importing_stays_cheap() -> None:
    import subprocess
    import sys

    code = (
        "import sys, consistency; assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ----------------------------------------------------------------------------- tiny files


TINY_ADM = {
    "_target_": openai.ADM,
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "channel_mult": [1],
    "num_classes": None,
    "dropout": 0.0,
    "num_heads": 1,
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "conv_resample": True,
    "num_groups": 32,
}
TINY_SONG = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 0,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def randomised(network: torch.nn.Module) -> dict[str, Tensor]:
    """Random weights everywhere, also where a network begins at zero; filters stay what they are."""
    torch.manual_seed(0)
    state = network.state_dict()
    for name, value in state.items():
        if not name.endswith("resample_filter"):
            state[name] = torch.randn_like(value) * (
                0.2 if value.ndim < 2 else value[0].numel() ** -0.5
            )
    return state


def tiny_adm() -> dict[str, Tensor]:
    return randomised(checkpoint.build(TINY_ADM, checkpoint.NETWORKS, torch.nn.Module))


def tiny_card(**changes: Any) -> dict[str, Any]:
    scalings = {"_target_": "consistency.preconditioning.Boundary", "sigma_data": 0.5}
    process = {"sigma_data": 0.5, "t_min": 0.002, "t_max": 80.0, "rho": 7.0, "times": [80.0, 1.0]}
    card = {"role": "consistency", "network": TINY_ADM, "process": process, "num_classes": None}
    card |= {"preconditioning": scalings | {"t_min": 0.002, "c_noise_scale": 250.0}}
    return card | {"image": {"channels": 3, "size": 8}} | changes


def tiny(**changes: Any) -> ModelCard:
    return ModelCard.parse(tiny_card(**changes), "a test")


def write_files(folder: Path) -> dict[str, Path]:
    """One small valid checkpoint of every format."""
    weights, card = tiny_adm(), tiny()
    song = nvlabs.settings("SongUNet", TINY_SONG | {"in_channels": 3, "out_channels": 3})
    state = randomised(checkpoint.build(song, checkpoint.NETWORKS, torch.nn.Module))
    prefixed = {f"model.{name}": value for name, value in state.items()}
    files = {
        "ours": folder / "last.ckpt",
        "sealed": folder / "model.safetensors",
        "openai_card": folder / "own.pt",
        "diffusers": folder / "pipeline",
        "unet": folder / "pipeline_of_others" / "unet",
    }
    ours.write({"card": card.saved(), "weights": weights}, files["ours"])
    checksum_path(files["ours"]).unlink()
    sealed.write_sealed(files["sealed"], card, weights)
    openai.write_openai(files["openai_card"], card, weights)
    diffusers_folders.write_diffusers(files["diffusers"], card, weights)
    diffusers_folders.write_diffusers(files["unet"].parent, card, weights)
    unsealed(files["unet"] / "diffusion_pytorch_model.safetensors")
    files["openai"] = foreign.write_openai(folder / "ema.pt", weights)
    files["nvlabs"] = foreign.write_nvlabs(folder / "snapshot.pkl", TINY_SONG, prefixed)
    files["state"] = foreign.write_nvlabs_state(folder / "state.pt", TINY_SONG, prefixed)
    files["jcm"] = foreign.write_flax(folder / "checkpoint_80", weights_of("jcm", "ncsnpp"))
    return files


def unsealed(path: Path) -> None:
    """Rewrites weights as diffusers itself does, without a card."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_files(tmp_path_factory.mktemp("checkpoints"))


CHECKED = ("ours", "sealed", "openai_card", "openai", "state", "diffusers")
"""Files that find every change of their weights: by a zip's CRC or by our own checksum."""

TOLD = ("ours", "sealed", "openai_card", "nvlabs", "state", "diffusers")
"""Files that say their role."""


@pytest.mark.parametrize("kind", [*TOLD, "openai", "jcm", "unet"])
def test_every_tiny_file_opens(kind: str, files: dict[str, Path]) -> None:
    loaded = consistency.load(files[kind], None if kind in TOLD else "consistency")
    x = torch.randn(2, 3, 8, 8)
    found = loaded.denoise(x, torch.tensor([0.01, 80.0]))
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    if kind not in ("nvlabs", "state", "jcm"):
        expected = tiny_adm()
        state = loaded.denoiser.network.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


# --------------------------------------------------------------------------------- diffusers


def pipeline_images(pipe: Any, label: list[int] | None, **steps: Any) -> Tensor:
    """Two images of the real pipeline from a fixed generator, in [-1, 1]."""
    draw = torch.Generator().manual_seed(3)
    images = pipe(
        batch_size=2, class_labels=label, generator=draw, output_type="np", **steps
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def our_images(loaded: Model, label: list[int] | None, times: list[float]) -> Tensor:
    """The same draws through our sampler."""
    from consistency.samplers import multistep

    draw, side = torch.Generator().manual_seed(3), loaded.card.image_size
    return multistep(
        loaded.denoise,
        lambda: torch.randn(2, loaded.card.channels, side, side, generator=draw),
        None if label is None else torch.tensor(label),
        times=times,
        t_min=loaded.card.preconditioning["t_min"],
        t_max=times[0],
        clip=True,
    )


def same_images(pipe: Any, loaded: Model, label: list[int] | None) -> None:
    """One step, and two at points of the pipeline's grid; float32 rounding apart."""
    from consistency.grids import KarrasGrid

    noise = pipe.scheduler.config
    grid = KarrasGrid(t_min=noise.sigma_min, t_max=noise.sigma_max, rho=noise.rho)
    middle = float(grid.points(noise.num_train_timesteps)[22])
    one = pipeline_images(pipe, label, num_inference_steps=1)
    two = pipeline_images(pipe, label, num_inference_steps=None, timesteps=[22, 0])
    assert float(one.std()) > 0.05
    torch.testing.assert_close(our_images(loaded, label, [noise.sigma_max]), one, rtol=0, atol=1e-5)
    ours = our_images(loaded, label, [noise.sigma_max, middle])
    torch.testing.assert_close(ours, two, rtol=0, atol=2e-5)


REAL = {
    "published test network": {
        "sample_size": 16,
        "layers_per_block": 2,
        "num_class_embeds": 10,
        "block_out_channels": (32, 64),
        "attention_head_dim": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "upsample_type": "resnet",
        "downsample_type": "resnet",
    },
    "convolutions between resolutions": {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "lsun kind with one head": {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 32, 64),
        "attention_head_dim": None,
        "norm_num_groups": 16,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "upsample_type": "resnet",
        "downsample_type": "resnet",
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REAL)
def test_a_real_pipeline_opens_here_and_ours_opens_there(name: str, tmp_path: Path) -> None:
    """diffusers' own folder -> our samples; the model written by us -> the real pipeline; the same images each time."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(**REAL[name])
    unet.load_state_dict(randomised(unet))
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)
    pipe = diffusers.ConsistencyModelPipeline(unet.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "theirs")
    loaded = consistency.load(tmp_path / "theirs")
    label = [3, 7] if "num_class_embeds" in REAL[name] else None
    same_images(pipe, loaded, label)

    state = loaded.denoiser.network.state_dict()
    diffusers_folders.write_diffusers(tmp_path / "ours", loaded.card, state)
    back = diffusers.ConsistencyModelPipeline.from_pretrained(
        tmp_path / "ours", use_safetensors=True
    )
    back.set_progress_bar_config(disable=True)
    found, expected = back.unet.state_dict(), unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    same_images(back, consistency.load(tmp_path / "ours"), label)
    assert (back.unet.config.attention_head_dim, back.unet.config.sample_size) == (
        unet.config.attention_head_dim,
        16,
    )

    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)  # diffusers' older form
    alone = consistency.load(tmp_path / "unet", "teacher").denoiser.network.state_dict()
    assert all(torch.equal(alone[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"c_noise_scale": None}, "c_noise_scale=250"),
        ({"num_heads": 2, "num_head_channels": None}, "num_head_channels=32"),
        ({"channel_mult": [2, 2]}, "channel_mult"),
        ({"resblock_updown": False, "conv_resample": False}, "resblock_updown"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(
    change: dict[str, Any], hint: str, tmp_path: Path
) -> None:
    node = TINY_ADM | {"channel_mult": [1, 2], "attention_resolutions": [8]}
    card = tiny_card(network=node | {k: v for k, v in change.items() if k in node})
    card["preconditioning"] = card["preconditioning"] | {
        key: value for key, value in change.items() if key == "c_noise_scale"
    }
    network = checkpoint.build(card["network"], checkpoint.NETWORKS, torch.nn.Module)
    with pytest.raises(UserError, match=hint):
        diffusers_folders.write_diffusers(
            tmp_path / "folder", ModelCard.parse(card, ""), network.state_dict()
        )
    assert not (tmp_path / "folder").exists()


# ------------------------------------------------------------------------------ hostile files


class Call:
    """Pickles as a call of a function by name."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def archive(
    path: Path, program: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes
) -> Path:
    """A torch archive with correct checksums around any program."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", program)
        for key, content in records.items():
            file.writestr(f"archive/data/{key.removeprefix('r')}", content)
    return path


def tensor_program(
    length: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> bytes:
    """A pickle of a state dict whose one tensor is a view of a storage of the given length."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += number(length) + b"tQ"
    view = b"(" + storage + number(offset) + numbers(size) + numbers(stride) + b"\x89}t"
    names = text("time_embed.0.weight"), text("input_blocks.0.0.weight")
    items = b"".join(name + b"ctorch._utils\n_rebuild_tensor_v2\n" + view + b"R" for name in names)
    return b"\x80\x02}(" + items + b"u."


def nested_pickle(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * (levels + 1) + b"a" * levels + b"."


def doubled(levels: int) -> list[Any]:
    """A list that holds the one before twice, `levels` times over: short to store, endless to print or to compare."""
    inner: list[Any] = []
    for _ in range(levels):
        inner = [inner, inner]
    return inner


def safetensors_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def write_card(path: Path, **changes: Any) -> Path:
    """A checkpoint of ours with a changed card and valid weights."""
    ours.write({"card": tiny_card(**changes), "weights": tiny_adm()}, path)
    return path


def write_weights(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    weights = tiny_adm()
    change(weights)
    return foreign.write_openai(path, weights)


def write_config(folder: Path, **changes: Any) -> Path:
    """A UNet of diffusers with a changed configuration."""
    diffusers_folders.write_diffusers(folder, tiny(role="teacher"), tiny_adm())
    unsealed(folder / "diffusion_pytorch_model.safetensors")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def older_program(length: int) -> bytes:
    """The older torch form with a storage that claims `length` numbers."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    program = b"".join(pickle.dumps(part, 2) for part in parts)
    return program + tensor_program(length, 0, (4,), (1,)) + pickle.dumps(["0"], 2) + b"\x00" * 8


def nvlabs_meta(class_name: str, state: dict[str, Any]) -> foreign.PlainPersistent:
    made = foreign.PlainPersistent(class_name)
    made.attributes = state
    return made


def write_persistent(path: Path, ema: Any) -> Path:
    with foreign.persistence():
        path.write_bytes(pickle.dumps({"ema": ema}))
    return path


MARK = "executed_by_a_checkpoint"
Write = Callable[[Path], Path]
LONG = b"\x8e" + struct.pack("<Q", 1 << 62)

HOSTILE: dict[str, tuple[Write, str]] = {
    # Wrong kinds
    "empty": (lambda p: put(p, b""), "an empty file"),
    "text": (lambda p: put(p, b"not a checkpoint at all"), "begins with"),
    "image": (lambda p: put(p, b"\x89PNG\r\n\x1a\n" + b"\x00" * 64), "different names"),
    "arrays": (
        lambda p: (np.savez(p, x=np.zeros(3)), p.with_name(f"{p.name}.npz"))[1],
        "torch did not write",
    ),
    "optimizer state": (lambda p: (torch.save({"state": {}}, p), p)[1], "no model"),
    "a tensor": (lambda p: (torch.save(torch.zeros(3), p), p)[1], "no model"),
    "empty folder": (lambda p: (p.mkdir(), p)[1], "a folder that is neither"),
    "other pipeline": (
        lambda p: (
            p.mkdir(),
            (p / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}'),
            p,
        )[2],
        "DDPMPipeline",
    ),
    # Code
    "os.system": (
        lambda p: put(p, pickle.dumps({"ema": Call(os.system, f"touch {MARK}")})),
        r"posix.system|os.system",
    ),
    "eval in an archive": (
        lambda p: archive(p, pickle.dumps({"card": Call(eval, f"open('{MARK}', 'w')")}, 2)),
        "eval",
    ),
    "torch.load": (lambda p: put(p, pickle.dumps({"ema": Call(torch.load, "x")})), r"torch\S*load"),
    "attribute of a name": (
        lambda p: put(
            p, b"\x80\x02cbuiltins\ngetattr\nccollections\nOrderedDict\nX\x03\x00\x00\x00pop\x86R."
        ),
        "attribute 'pop' of collections.OrderedDict",
    ),
    "call of a method": (
        lambda p: write_persistent(p, Call(foreign.EctLoss().t_to_r, 1.0)),
        "calls Object",
    ),
    "old names": (
        lambda p: put(p, b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
        "os.system",
    ),
    "a class instance": (lambda p: put(p, b"\x80\x02ctorch.nn\nLinear\n)\x81."), "torch.nn.Linear"),
    "instruction INST": (lambda p: put(p, b"\x80\x02(ios\nsystem\n."), "INST"),
    "extension registry": (lambda p: put(p, b"\x80\x02\x82\x01."), "EXT1"),
    "call of a storage": (
        lambda p: put(p, b"\x80\x02ctorch\nFloatStorage\n)R."),
        "torch.FloatStorage",
    ),
    "state on a name": (lambda p: put(p, b"\x80\x02ccollections\nOrderedDict\n}b."), "OrderedDict"),
    # Sizes
    "long bytes": (lambda p: put(p, b"\x80\x04" + LONG + b"abc."), "no sense"),
    "long array of bytes": (
        lambda p: put(p, b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"abc."),
        "no sense",
    ),
    "memo bomb": (lambda p: put(p, b"\x80\x02]r\xff\xff\xff\xff."), "no model"),
    "deep lists": (lambda p: put(p, nested_pickle(50_000)), "no model"),
    "deep keys": (
        lambda p: put(p, b"\x80\x02})" + b"\x85" * 50_000 + b"Ns."),
        "keys that no checkpoint has",
    ),
    "doubled lists": (
        lambda p: archive(p, pickle.dumps({"card": tiny_card(process={"t_min": doubled(60)})}, 2)),
        "card",
    ),
    "doubled settings": (
        lambda p: archive(
            p, pickle.dumps({"card": tiny_card(network={"_target_": doubled(60)})}, 2)
        ),
        "card|weights",
    ),
    "repeated copies": (
        lambda p: put(
            p,
            b"\x80\x02c_codecs\nencode\nq\x00X\x00\x00\x10\x00"
            + b"a" * (1 << 20)
            + b"q\x01"
            + b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R" * 500
            + b".",
        ),
        "over and over",
    ),
    "zip bomb": (
        lambda p: archive(
            p, tensor_program(1 << 24, 0, (4,), (1,)), zipfile.ZIP_DEFLATED, r0=b"\x00" * (1 << 26)
        ),
        "compressed",
    ),
    "short storage": (
        lambda p: archive(p, tensor_program(1 << 40, 0, (4,), (1,)), r0=b"\x00" * 64),
        "full length",
    ),
    "no storage": (lambda p: archive(p, tensor_program(16, 0, (4,), (1,))), "full length"),
    "view beyond": (
        lambda p: archive(p, tensor_program(16, 8, (16,), (1,)), r0=b"\x00" * 64),
        "reaches out",
    ),
    "negative stride": (
        lambda p: archive(p, tensor_program(16, 8, (4,), (-1,)), r0=b"\x00" * 64),
        "impossible",
    ),
    "endless view": (
        lambda p: archive(p, tensor_program(16, 0, (1 << 40,), (0,)), r0=b"\x00" * 64),
        "reaches out",
    ),
    "older storage": (lambda p: put(p, older_program(1 << 44)), "larger than the file"),
    "older short storage": (lambda p: put(p, older_program(4)), "full length|early"),
    "msgpack array": (lambda p: put(p, b"\x81\xa1a\xdd\xff\xff\xff\xff"), "ends early"),
    "msgpack map": (lambda p: put(p, b"\xdf\xff\xff\xff\xff"), "ends early"),
    "msgpack bytes": (lambda p: put(p, b"\x81\xa1a\xc6\xff\xff\xff\xff"), "ends early"),
    "msgpack extension": (lambda p: put(p, b"\x81\xa1a\xc9\xff\xff\xff\xff\x01"), "ends early"),
    "msgpack depth": (lambda p: put(p, b"\x81\xa1a" * 100_000 + b"\xc0"), "deeper"),
    "msgpack shape": (
        lambda p: put(
            p,
            foreign.pack({"params_ema": {}})[:-1]
            + b"\x81\xa1a\xc7\x20\x01\x93\x91\xcf"
            + b"\x00\x00\x00\xff\xff\xff\xff\xff\xa7float32\xc4\x04"
            + b"\x00" * 12,
        ),
        "no sense|array|impossible|early",
    ),
    "header length": (lambda p: put(p, struct.pack("<Q", 1 << 60) + b'{"a":1}'), "begins with"),
    "header nonsense": (lambda p: put(p, safetensors_file(b"{" + b" " * 40)), "no sense"),
    "header as long as a pickle begins": (
        lambda p: put(
            p,
            safetensors_file(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x280), b"\x00" * 4
            ),
        ),
        "1 tensors named a",
    ),
    "tensor past the end": (
        lambda p: put(
            p,
            safetensors_file(
                b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}', b"\x00" * 16
            ),
        ),
        "no sense",
    ),
    # Weights
    "nan": (
        lambda p: write_weights(p, lambda w: w["out.2.weight"].fill_(float("nan"))),
        "not all finite",
    ),
    "infinite": (
        lambda p: write_weights(p, lambda w: w["out.2.bias"].fill_(float("inf"))),
        "not all finite",
    ),
    "integers": (
        lambda p: write_weights(p, lambda w: w.update({"out.2.bias": torch.zeros(3).long()})),
        "floating",
    ),
    "missing": (
        lambda p: write_weights(p, lambda w: w.update({"none": w.pop("out.0.bias")})),
        r"out\.0\.bias",
    ),
    "unknown": (lambda p: write_weights(p, lambda w: w.update(extra=torch.zeros(3))), "extra"),
    "shape": (
        lambda p: write_weights(p, lambda w: w.update({"out.0.bias": torch.zeros(7)})),
        r"out\.0\.bias",
    ),
    "guided diffusion": (
        lambda p: write_weights(
            p, lambda w: w.update({k: v[..., 0] for k, v in w.items() if k.endswith("qkv.weight")})
        ),
        "guided-diffusion",
    ),
    "block far away": (
        lambda p: write_weights(
            p, lambda w: w.update({"output_blocks.99999999999.0.bias": torch.zeros(1)})
        ),
        "another network|no ADM",
    ),
    # Settings
    "foreign target": (
        lambda p: write_card(p, network={"_target_": "os.system", "command": "true"}),
        "os.system",
    ),
    "function as target": (
        lambda p: write_card(p, preconditioning={"_target_": "torch.load", "f": "x"}),
        "torch.load",
    ),
    "own function as target": (
        lambda p: write_card(
            p, network={"_target_": "consistency.networks.layers.zeroed", "module": 1}
        ),
        "zeroed",
    ),
    "interpolation": (
        lambda p: write_card(p, network=TINY_ADM | {"attention": "${oc.env:HOME}"}),
        "plain arguments",
    ),
    "endless network": (
        lambda p: write_card(p, network=TINY_ADM | {"num_res_blocks": 10**6}),
        "more blocks",
    ),
    "huge network": (
        lambda p: write_card(p, network=TINY_ADM | {"model_channels": 1 << 20}),
        "shape",
    ),
    "beyond numbers": (
        lambda p: write_card(p, network=TINY_ADM | {"model_channels": 1 << 70}),
        "plain arguments",
    ),
    "unknown argument": (lambda p: write_card(p, network=TINY_ADM | {"colour": 1}), "colour"),
    "negative sigma_data": (
        lambda p: write_card(
            p, preconditioning=tiny_card()["preconditioning"] | {"sigma_data": -1.0}
        ),
        "sigma_data",
    ),
    "another role": (lambda p: write_card(p, role="student"), "card"),
    "no image": (lambda p: write_card(p, image=None), "card"),
    "card of no kind": (lambda p: archive(p, pickle.dumps({"card": {}}, 2)), "card"),
    "many layers": (
        lambda p: write_config(p, layers_per_block=10**9),
        "layers_per_block=1000000000",
    ),
    "wide blocks": (
        lambda p: write_config(p, block_out_channels=[1 << 40]),
        "plain|no sense|shape",
    ),
    "fourier time": (
        lambda p: write_config(p, time_embedding_type="fourier"),
        "time_embedding_type",
    ),
    "unknown block": (
        lambda p: write_config(p, down_block_types=["KDownBlock2D"]),
        "mirror|KDownBlock2D",
    ),
    "no head": (lambda p: write_config(p, attention_head_dim=0), "attention_head_dim=0"),
    "deep config": (
        lambda p: (write_config(p), (p / "config.json").write_text("[" * 100_000))[0],
        "no sense",
    ),
    "other preconditioning": (
        lambda p: write_persistent(p, nvlabs_meta("VPPrecond", {"_modules": {}})),
        "VPPrecond",
    ),
    "other network": (
        lambda p: write_persistent(
            p, nvlabs_meta("EDMPrecond", {"_modules": {"model": nvlabs_meta("UNet", {})}})
        ),
        "class UNet",
    ),
    "no settings": (
        lambda p: write_persistent(
            p,
            nvlabs_meta(
                "EDMPrecond",
                {"_modules": {"model": nvlabs_meta("SongUNet", {"_init_kwargs": None})}},
            ),
        ),
        "without its settings",
    ),
}


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fails where a file makes its reader hang."""

    def stop(*_: object) -> None:
        raise BaseException("a checkpoint made its reader hang")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


REFUSED: list[str] = []


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_one_error(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    write, hint = HOSTILE[name]
    path = write(tmp_path / "some.file")
    with time_limit(20), pytest.raises(UserError, match=hint) as error:
        consistency.load(
            path, "teacher" if path.is_dir() else None if "card" in hint else "consistency"
        )
    assert len(str(error.value)) < 1200
    assert len(str(error.value).splitlines()) <= 4
    assert not (tmp_path / MARK).exists()
    REFUSED.append(name)
    if name == [*HOSTILE][-1]:
        record_property(REPORT, f"checkpoints: {len(REFUSED)} hostile or wrong files refused")


def test_the_source_inside_an_nvlabs_file_is_not_run(files: dict[str, Path]) -> None:
    assert foreign.SOURCE.encode()[:40] in files["nvlabs"].read_bytes()
    consistency.load(files["nvlabs"])


def test_modules_that_contain_each_other(tmp_path: Path) -> None:
    """A chain in which every module holds the next one twice would take for ever to walk."""
    inner = nvlabs_meta("UNetBlock", {"_modules": {}, "_parameters": {}, "_buffers": {}})
    for _ in range(40):
        both = {"a": inner, "b": inner}
        inner = nvlabs_meta("UNetBlock", {"_modules": both, "_parameters": {}, "_buffers": {}})
    inner.class_name = "SongUNet"
    inner.attributes["_init_kwargs"] = TINY_SONG | {"in_channels": 3, "out_channels": 3}
    path = write_persistent(
        tmp_path / "p", nvlabs_meta("EDMPrecond", {"_modules": {"model": inner}, "sigma_data": 0.5})
    )
    with (
        time_limit(20),
        pytest.raises(UserError, match="contain each other"),
    ):
        consistency.load(path)


# --------------------------------------------------------------------------------------- fuzz


def damaged(content: bytes, draw: np.random.Generator) -> bytes:
    """The content with one kind of damage: cut off, bits flipped, a stretch overwritten, removed, repeated or added."""
    data = bytearray(content)
    place = int(draw.integers(len(data)))
    length = int(draw.integers(1, 64))
    kind = draw.integers(8)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        for _ in range(int(draw.integers(1, 4))):
            data[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
    elif kind == 2:  # most structure stands at the beginning or at the end
        edge = int(draw.integers(min(600, len(data))))
        data[edge if draw.integers(2) else -1 - edge] ^= 1 << int(draw.integers(8))
    elif kind == 3:
        data[place : place + length] = draw.bytes(length)
    elif kind == 4:
        del data[place : place + length]
    elif kind == 5:
        data[place:place] = data[place : place + length]
    elif kind == 6:
        data += draw.bytes(length)
    else:
        data[place : place + length] = bytes(len(data[place : place + length]))
    return bytes(data)


def fuzz(seed: int, files: dict[str, Path], folder: Path) -> str:
    """Damages one file and opens it: one error, or a model that is whole. Returns what came of it."""
    draw = np.random.default_rng(seed)
    kind = sorted(files)[int(draw.integers(len(files)))]
    source = files[kind]
    inside = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    copy = folder / f"{seed}"
    for file in inside:
        target = copy / file.relative_to(source) if source.is_dir() else copy
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    hit = inside[int(draw.integers(len(inside)))]
    target = copy / hit.relative_to(source) if source.is_dir() else copy
    target.write_bytes(damaged(hit.read_bytes(), draw))
    try:
        with time_limit(20):
            loaded = consistency.load(copy, None if kind in TOLD else "consistency")
    except UserError as error:
        assert len(str(error)) < 1500
        return "refused"
    state = loaded.denoiser.network.state_dict()
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    if kind in CHECKED:
        expected = consistency.load(source, None if kind in TOLD else "consistency")
        whole = expected.denoiser.network.state_dict()
        assert all(torch.equal(state[name], whole[name]) for name in whole), (
            f"{kind} changed silently"
        )
        assert loaded.card == expected.card, f"the settings of {kind} changed silently"
    return "opened"


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_damaged_files(first: int, files: dict[str, Path], tmp_path: Path) -> None:
    outcomes = [fuzz(seed, files, tmp_path) for seed in range(first, first + 20)]
    assert outcomes.count("refused") >= 5


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 1100, 100))
def test_damaged_files_at_length(first: int, files: dict[str, Path], tmp_path: Path) -> None:
    outcomes = [fuzz(seed, files, tmp_path) for seed in range(first, first + 100)]
    assert outcomes.count("refused") >= 40


@pytest.mark.parametrize("kind", CHECKED)
def test_a_flipped_bit_in_the_weights_is_found(
    kind: str, files: dict[str, Path], tmp_path: Path
) -> None:
    """A bit of the fraction of one weight: nothing but a checksum can tell."""
    source = files[kind]
    name = source / "unet" / "diffusion_pytorch_model.safetensors" if source.is_dir() else source
    content = bytearray(name.read_bytes())
    loaded = consistency.load(source, None if kind in TOLD else "consistency")
    largest = max(loaded.denoiser.network.state_dict().values(), key=Tensor.numel)
    bytes_of: Any = largest.reshape(-1)[:8].numpy()
    place = content.find(bytes_of.tobytes())
    assert place > 0
    content[place] ^= 1
    if source.is_dir():
        import shutil

        shutil.copytree(source, tmp_path / "copy")
        (tmp_path / "copy" / name.relative_to(source)).write_bytes(content)
    else:
        (tmp_path / "copy").write_bytes(content)
    with pytest.raises(UserError, match=r"checksum|CRC|changed"):
        consistency.load(tmp_path / "copy", None if kind in TOLD else "consistency")


def test_a_checksum_beside_any_file_is_verified(files: dict[str, Path], tmp_path: Path) -> None:
    """Where a file has none of its own, one beside it still finds a flipped bit."""
    import hashlib

    content = bytearray(files["jcm"].read_bytes())
    path = put(tmp_path / "checkpoint_80", bytes(content))
    digest = hashlib.sha256(content).hexdigest()
    checksum_path(path).write_text(f"{digest}  {path.name}\n")
    consistency.load(path, "teacher")
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="changed or is damaged"):
        consistency.load(path, "teacher")


def test_flax_reads_what_the_test_writes() -> None:
    """The test's writer is flax's own, byte by byte, where flax is installed."""
    serialization = pytest.importorskip("flax.serialization")
    state = foreign.flax_state(weights_of("jcm", "ncsnpp"))
    assert serialization.to_bytes(state) == foreign.pack(state)


def test_a_buffer_of_bytes_is_enough() -> None:
    """The reader of pickles works on bytes as on files."""
    from consistency.checkpoints.pickle_reader import Machine

    content = pickle.dumps({"a": [1, 2.5, "text", None, True, (1, 2, 3, 4)], "b": b"bytes"})
    assert Machine(len(content)).run(io.BytesIO(content)) == pickle.loads(content)
