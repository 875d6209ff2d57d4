"""Checkpoints of other programs give the same numbers as those programs."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import consistency
import foreign
from consistency.checkpoints import jcm, nvlabs, openai
from consistency.checkpoints.contents import Hints
from consistency.errors import UserError
from golden_harness import FOLDER, OUTPUT, Archive, read_json
from golden_networks import model_configurations, openai_arguments
from tiny_models import WITH_ROLE, tiny_adm, weights_of

OPENAI_NETWORKS = sorted(read_json(FOLDER / "openai_unet" / "configs.json"))


NVLABS_NETWORKS = sorted(read_json(FOLDER / "edm" / "configs.json"))


ROLES = ("teacher", "consistency")


def released(name: str) -> dict[str, Any]:
    """Return the golden folder's description of the released networks; skip if it has none."""
    if not (FOLDER / name).is_file():
        pytest.skip(f"a golden folder without {name}")
    return read_json(FOLDER / name)


def agrees(archive: Archive, name: str, ours: Tensor) -> None:
    archive.compare(name, ours, OUTPUT)


@pytest.fixture(params=OPENAI_NETWORKS)
def openai_case(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[Archive, Path, dict[str, Any]]:
    """Golden arrays, a file as the published code saves it, and the settings that the file lacks."""
    name = request.param
    settings = openai_arguments(read_json(FOLDER / "openai_unet" / "configs.json")[name]["cfg"])
    heads = ("num_head_channels", "num_heads", "num_heads_upsample", "image_size")
    hints = {name: settings[name] for name in heads if settings.get(name) is not None}
    path = foreign.write_openai(tmp_path / "ema_0.9999_000000.pt", weights_of("openai_unet", name))
    return Archive(FOLDER / "openai_unet" / f"{name}.npz"), path, hints


def test_openai(openai_case: tuple[Archive, Path, dict[str, Any]]) -> None:
    """Both scalings, the time input 250 ln t and the order of qkv agree with the published denoisers."""
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
    """Names and shapes determine every setting of the two released networks."""
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


@pytest.mark.parametrize("name", NVLABS_NETWORKS)
def test_nvlabs(name: str, tmp_path: Path) -> None:
    """Snapshots and training states, without augmentation labels; classes; no label means "no class"."""
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
            if config["network"].get("_target_") == found["_target_"]
        )


def test_jcm(tmp_path: Path) -> None:
    """Transposed kernels, separate q, k, v and both scalings reproduce the published network's output."""
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


def test_a_jcm_checkpoint_has_ema_and_online_weights(tmp_path: Path) -> None:
    path = foreign.write_flax(tmp_path / "checkpoint_80", weights_of("jcm", "ncsnpp"))
    online = consistency.load(path, "teacher", weights="online").denoiser.network
    assert not any(
        parameter.any() for parameter in online.parameters()
    )  # the writer makes them zero
    with pytest.raises(UserError, match="ema, online"):
        consistency.load(path, "teacher", weights="target")


def test_released_jcm_network_is_recognised() -> None:
    entry = released("jcm/cifar10_ncsnpp_param_shapes.json")
    params = {name: torch.zeros(1).expand(shape) for name, shape in entry["shapes"].items()}
    found, notes = jcm.settings(params, Hints())
    expected = model_configurations()["ncsnpp_cifar10"]["network"]
    assert not notes
    assert found == {key: expected[key] for key in found}


@pytest.mark.parametrize("kind", ["openai", "jcm", "unet"])
def test_a_checkpoint_without_a_role_needs_one(kind: str, files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"role=teacher .* role=consistency") as error:
        consistency.load(files[kind])
    assert "does not record one" in str(error.value)


@pytest.mark.parametrize("kind", [*WITH_ROLE, "openai", "jcm", "unet"])
def test_a_checkpoint_of_every_format_opens(kind: str, files: dict[str, Path]) -> None:
    loaded = consistency.load(files[kind], None if kind in WITH_ROLE else "consistency")
    x = torch.randn(2, 3, 8, 8)
    found = loaded.denoise(x, torch.tensor([0.01, 80.0]))
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    if kind not in ("nvlabs", "state", "jcm"):
        expected = tiny_adm()
        state = loaded.denoiser.network.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_the_writer_of_flax_files_agrees_with_flax() -> None:
    """The tests' writer and flax write the same bytes, if flax is installed."""
    serialization = pytest.importorskip("flax.serialization")
    state = foreign.flax_state(weights_of("jcm", "ncsnpp"))
    assert serialization.to_bytes(state) == foreign.pack(state)


def test_the_pickle_reader_reads_a_buffer() -> None:
    """The pickle reader reads bytes as it reads files."""
    from consistency.checkpoints.pickle_reader import Machine

    content = pickle.dumps({"a": [1, 2.5, "text", None, True, (1, 2, 3, 4)], "b": b"bytes"})
    assert Machine(len(content)).run(io.BytesIO(content)) == pickle.loads(content)
