"""Latents: the published scalings, what training draws of a folder, and the card of a model of latents."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from consistency.data.latents import TABLE, Latents
from consistency.data.memory import load_into_memory
from consistency.data.module import DataModule
from consistency.editing import ImageSpace, Pixels, Task, edit
from consistency.errors import UserError
from consistency.inference import autoencoder
from consistency.inference.card import LatentSpace, ModelCard, Process
from consistency.inference.generate import Request
from consistency.latents import EDM2, SCALINGS, SIT, scaling_of
from consistency.randomness import Share
from consistency.tensors import Data, Label, Time

SPACE = LatentSpace(
    autoencoder="somebody/vae", sha256="0" * 64, scaling="edm2", channels=3, image_size=16
)


def folder_of(
    folder: Path, *, counts: tuple[int, ...] = (3, 4), stored: str = "moments", **changes: Any
) -> Tensor:
    """Write a folder of latents 4x8x8, image and mirror image, with class i % 2, and return all of them."""
    draw, count = Generator().manual_seed(0), sum(counts)
    channels = 8 if stored == "moments" else 4
    latents = torch.randn(count, 2, channels, 8, 8, generator=draw).abs().half()
    labels = torch.arange(count) % 2
    folder.mkdir()
    names = [f"{n}.safetensors" for n in range(len(counts))]
    for name, part, classes in zip(names, latents.split(counts), labels.split(counts), strict=True):
        save_file({"latents": part.contiguous(), "labels": classes}, folder / name)
    table = {"latents": vars(SPACE), "shape": [4, 8, 8], "stored": stored, "orientations": 2,
             "num_classes": 2, "class_names": ["a", "b"], "left_out": 0,
             "files": list(zip(names, counts, strict=True))}  # fmt: skip
    (folder / TABLE).write_text(json.dumps(table | changes))
    return latents


# ------------------------------------------------------------------------------------- scalings


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_scaling_is_inverted(scaling: Any) -> None:
    latents = 5 * torch.randn(64, 4, 3, 3, generator=Generator().manual_seed(0))
    assert torch.allclose(scaling.unscaled(scaling.scaled(latents)), latents, atol=1e-5)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    pixels = scaling.from_uint8(levels)
    assert (pixels.min(), pixels.max()) == (scaling.black, 1)
    unit = scaling.to_unit(pixels)
    assert torch.allclose(unit, levels / 127.5 - 1, atol=1e-6)
    assert torch.allclose(scaling.from_unit(unit), pixels, atol=1e-6)
    assert (scaling.to_uint8(pixels + 1e-6).int() - levels.int()).abs().max() == 0
    assert scaling.to_uint8(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2)).flatten().tolist() == [
        0,
        255,
    ]


def test_the_published_constants_give_the_published_deviations() -> None:
    """EDM2: mean 0 and deviation 0.5 of latents with its statistics; SiT: one factor."""
    mean, std = (torch.tensor(numbers)[None, :, None, None] for numbers in (EDM2.mean, EDM2.std))
    assert torch.allclose(EDM2.scaled(mean), torch.zeros(()), atol=1e-6)
    assert torch.allclose(EDM2.scaled(mean + std), torch.tensor(0.5))
    assert torch.equal(SIT.scaled(torch.ones(1, 16, 2, 2)), torch.full((1, 16, 2, 2), 0.18215))


def test_a_scaling_is_refused_by_name_and_by_channels() -> None:
    with pytest.raises(UserError, match="scaling among edm2, sit"):
        scaling_of("other", 4)
    with pytest.raises(UserError, match="latents of 4 channels for scaling=edm2"):
        scaling_of("edm2", 16)
    assert scaling_of("sit", 16) == SIT


# ------------------------------------------------------------------------------------- the data


def test_entries_are_the_images_and_then_their_mirror_images(tmp_path: Path) -> None:
    latents = folder_of(tmp_path / "set")
    source = Latents(path=str(tmp_path / "set"), flip=True, num_classes=2)
    assert (len(source), source.shape, source.image_shape) == (14, (4, 8, 8), (3, 16, 16))
    items, labels = source.batch([*range(14)])
    assert torch.equal(items, torch.cat([latents[:, 0], latents[:, 1]]))
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0] * 2
    assert len(Latents(path=str(tmp_path / "set"), flip=False)) == 7
    assert load_into_memory(source) is source
    with pytest.raises(IndexError):
        source[14]


def test_each_use_draws_mean_plus_std_times_noise(tmp_path: Path) -> None:
    latents = folder_of(tmp_path / "set").float()[:, 0]
    source = Latents(path=str(tmp_path / "set"), flip=False)
    items, _ = source.batch([*range(6)])
    first, again, other = (
        source.training_data(items, Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    n = torch.randn(6, 4, 8, 8, generator=Generator().manual_seed(0))
    mean, std = latents[:6].chunk(2, dim=1)
    assert torch.allclose(first, EDM2.scaled(mean + std * n))
    halves = [
        source.training_data(items[3 * i : 3 * i + 3], Generator().manual_seed(0), Share(i, 2))
        for i in (0, 1)
    ]
    assert torch.equal(torch.cat(halves), first)


def test_stored_samples_are_taken_as_they_are(tmp_path: Path) -> None:
    latents = folder_of(tmp_path / "set", stored="samples").float()[:, 0]
    source = Latents(path=str(tmp_path / "set"), flip=False)
    x_0 = source.training_data(source.batch([2])[0], Generator())
    assert torch.equal(x_0[0], EDM2.scaled(latents[2:3])[0])


def test_a_data_module_takes_them_as_it_takes_images(tmp_path: Path) -> None:
    folder_of(tmp_path / "set")
    source = partial(Latents, path=str(tmp_path / "set"), flip=True)
    shape = {"image_size": 8, "channels": 4, "num_classes": 2, "batch_size": 7}
    rest = {"held_out": None, "device_batch_size": None, "num_workers": 0, "flip": True, "seed": 0}
    module = DataModule(source=source, **shape, **rest)
    assert "Latents of somebody/vae, sha256 000000000000, scaling edm2" in module.summary(1)
    order = module.batches(split=module.split(1), total=2)
    batches = list(module.loader(order))
    assert [tuple(items.shape) for items, _ in batches] == [(7, 8, 8, 8)] * 2
    assert module.augmented(batches[0][0], Generator()).shape == (7, 4, 8, 8)
    with pytest.raises(UserError, match="images of 3 channels"):
        DataModule(source=source, **shape | {"channels": 3}, **rest)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"orientations": 1}, {"flip": True}, "latents of mirror images too, for data.flip=true"),
        ({}, {"scaling": "sit"}, "another range"),
        ({"num_classes": None}, {"num_classes": 2}, "got: no classes"),
        ({}, {"num_classes": 1}, "got: 2 classes"),
        ({"files": [["../../0.safetensors", 3]]}, {}, "another content of latents.json"),
        ({"stored": "pickles"}, {}, "another content of latents.json"),
        ({"shape": None}, {}, "damaged latents.json"),
        ({"latents": {"autoencoder": "x"}}, {}, "latents with autoencoder, sha256"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    folder_of(tmp_path / "set", **changes)
    with pytest.raises(UserError, match=message):
        Latents(path=str(tmp_path / "set"), **{"flip": False, **options})


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a folder of latents with latents\.json"):
        Latents(path=str(tmp_path), flip=False)
    folder_of(tmp_path / "set")
    (tmp_path / "set" / "1.safetensors").write_bytes(b"nothing")
    source = Latents(path=str(tmp_path / "set"), flip=False)
    assert source[2][1] == 0
    with pytest.raises(UserError, match=r"latents of shape \(4, 2, 8, 8, 8\) in .*1\.safetensors"):
        source[3]


# ---------------------------------------------------------------------------- models of latents


def card(latents: LatentSpace | None = SPACE) -> ModelCard:
    process = Process(sigma_data=0.5, t_min=0.002, t_max=80.0, rho=7.0)
    parts: dict[str, Any] = {"network": {"_target_": "a"}, "preconditioning": {"_target_": "b"}}
    return ModelCard(role="consistency", process=process, channels=4, image_size=8,
                     num_classes=None, latents=latents, **parts)  # fmt: skip


def test_a_card_keeps_its_latents_and_clips_nothing() -> None:
    assert ModelCard.parse(card().saved(), "here") == card()
    assert "latents" not in card(None).saved()
    assert card().image_shape == (3, 16, 16)
    assert card().sampler(1).keywords["clip"] is False  # type: ignore[attr-defined]
    assert card(None).sampler(1).keywords["clip"] is True  # type: ignore[attr-defined]
    for wrong in ({**vars(SPACE), "scaling": "own"}, {**vars(SPACE), "more": 1}, ["x"]):
        with pytest.raises(UserError, match="in here"):
            ModelCard.parse(card().saved() | {"latents": wrong}, "here")
    with pytest.raises(UserError, match="a model of images for start=input"):
        card().require_start("input")


def test_a_missing_or_different_autoencoder_is_one_error(tmp_path: Path) -> None:
    folder = tmp_path / "vae"

    def open_autoencoder() -> object:
        moved = autoencoder.moved(card(), str(folder))
        return Request(denoise=lambda x, t, label=None: x, card=moved).space

    with pytest.raises(UserError, match=r"an AutoencoderKL of diffusers, .* at autoencoder="):
        open_autoencoder()
    folder.mkdir()
    (folder / autoencoder.SETTINGS).write_text("{}")
    (folder / autoencoder.WEIGHTS).write_bytes(b"others")
    with pytest.raises(UserError, match=f"weights of sha256 {'0' * 64}"):
        open_autoencoder()
    with pytest.raises(UserError, match="a model of latents for autoencoder="):
        autoencoder.moved(card(None), str(folder))


class Doubled:
    """x_0 is twice the image, on half the pixels."""

    def encoded(self, images: Data) -> Data:
        return 2 * images[..., ::2, ::2]

    def decoded(self, x_0: Data) -> Data:
        return x_0.repeat_interleave(2, -1).repeat_interleave(2, -2) / 2


def test_an_edit_in_another_space_keeps_the_known_pixels_exactly() -> None:
    y = torch.rand(2, 3, 8, 8, generator=Generator().manual_seed(0)) * 2 - 1
    omega = torch.zeros(1, 1, 8, 8)
    omega[..., :4] = 1
    seen = []

    def denoise(x_t: Data, t: Time, label: Label = None) -> Data:
        seen.append(tuple(x_t.shape))
        return torch.full_like(x_t, 0.5)

    settings: Any = {"times": [80.0, 1.0], "t_min": 0.002, "start": "reference", "clip": False}
    noise = partial(torch.zeros, 2, 3, 4, 4)
    edited = edit(denoise, noise, y, Task(Pixels(), omega), space=Doubled(), **settings)
    assert seen == [(2, 3, 4, 4)] * 2
    assert torch.equal(edited[..., 4:], y[..., 4:])
    assert torch.equal(edited[..., :4], torch.full((2, 3, 8, 4), 0.25))
    assert ImageSpace().encoded(y) is y
