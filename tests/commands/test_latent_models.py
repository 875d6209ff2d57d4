"""Latents of a real AutoencoderKL with random weights, from prepare.py to every picture and number."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import consistency
from autoencoders import write_autoencoder
from conftest import Run
from consistency.data import chunks
from consistency.data.encode import LatentWriter
from consistency.data.latents import Latents
from consistency.inference import autoencoder
from consistency.latents import EDM2, SIT
from originals import noise, write_files

pytestmark = pytest.mark.slow
COUNT = 24
NETWORK = ("model_channels=8", "channel_mult=[1]", "num_head_channels=8", "num_groups=4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder `vae`, another one `other`, and `set`, images of two classes."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("latents")
    write_autoencoder(folder / "vae", seed=0)
    write_autoencoder(folder / "other", seed=1)
    for number in range(COUNT):
        file = folder / "set" / "ab"[number % 2] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(16, 16, 3, seed=number)).save(file)
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 10)
    autoencoder.opened.cache_clear()


def prepared(verb: Run, made: Path, output: Path, *options: str) -> str:
    given = [f"source={made / 'set'}", "classes=true", "to=latents", f"output={output}", *options]
    done = verb("prepare", *given, f"autoencoder={made / 'vae'}", "device=cpu")
    assert done.status == 0, done.err
    return str(done.out)


def images_of(made: Path) -> torch.Tensor:
    """The images in the order of the source: class by class."""
    files = sorted((made / "set").rglob("*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(f))).movedim(2, 0) for f in files])


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("scaling", ["edm2", "sit"])
def test_means_and_deviations_are_those_of_the_encoder(
    verb: Run, made: Path, tmp_path: Path, scaling: str
) -> None:
    from diffusers import AutoencoderKL

    out = prepared(verb, made, tmp_path / "set", "flip=true", "dtype=float32", f"scaling={scaling}")
    assert "8x8x4, moments, 2 orientations" in out
    source = Latents(path=str(tmp_path / "set"), flip=True, num_classes=2)
    items, labels = source.batch([*range(2 * COUNT)])
    network = AutoencoderKL.from_pretrained(str(made / "vae"), use_safetensors=True).eval()
    images = images_of(made)
    pixels = torch.cat([images, images.flip(-1)]) / 255.0
    with torch.no_grad():
        law = network.encode(pixels if scaling == "edm2" else 2 * pixels - 1).latent_dist
    assert torch.allclose(items, torch.cat([law.mean, law.std], 1), atol=1e-5)
    assert labels.tolist() == ([0] * (COUNT // 2) + [1] * (COUNT // 2)) * 2
    scale = {"edm2": EDM2, "sit": SIT}[scaling]
    with torch.no_grad():
        decoded = network.decode(law.mean).sample
    assert (source.decoded(items).int() - scale.to_uint8(decoded).int()).abs().max() <= 1
    drawn = scale.scaled(law.mean + law.std * torch.randn(law.mean.shape)).double()
    shown = json.loads((tmp_path / "set" / "latents.json").read_text())
    assert np.allclose(shown["means"], drawn.mean((0, 2, 3)), atol=0.05)
    assert np.allclose(shown["deviations"], drawn.std((0, 2, 3)), rtol=0.1)


def test_an_interrupted_preparation_equals_a_whole_one(
    verb: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["store=samples", "flip=true"]
    prepared(verb, made, tmp_path / "whole", *options)
    write = LatentWriter.write

    def break_off(self: LatentWriter, span: range, file: Path) -> None:
        if span.start:
            raise KeyboardInterrupt
        write(self, span, file)

    with monkeypatch.context() as patch:
        patch.setattr(LatentWriter, "write", break_off)
        with pytest.raises(KeyboardInterrupt):
            prepared(verb, made, tmp_path / "stopped", *options)
    assert not (tmp_path / "stopped").exists()
    out = prepared(verb, made, tmp_path / "stopped", *options)
    assert "10 images are done already" in out
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert "nothing to do" in prepared(verb, made, tmp_path / "stopped", *options)
    with pytest.raises(AssertionError, match="made from the same images with the same settings"):
        prepared(verb, made, tmp_path / "stopped")
    samples = Latents(path=str(tmp_path / "whole"), flip=True)
    assert tuple(samples[0][0].shape) == (4, 8, 8)
    assert not torch.equal(samples[0][0], samples[COUNT][0])


def test_two_processes_write_what_one_writes(
    verb: Run, process: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 500)
    picture = (made / "set" / "a" / "000.png").read_bytes()
    write_files(tmp_path / "many", {f"{number:03d}.png": picture for number in range(502)})
    given = [
        f"source={tmp_path / 'many'}",
        "to=latents",
        f"autoencoder={made / 'vae'}",
        "device=cpu",
    ]
    for run, devices, output in ((verb, 1, tmp_path / "one"), (process, 2, tmp_path / "two")):
        done = run("prepare", *given, f"devices={devices}", f"output={output}")
        assert done.status == 0, done.err
    assert len(content(tmp_path / "one")) == 3
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_from_training_to_every_picture_and_number(verb: Run, made: Path, tmp_path: Path) -> None:
    prepared(verb, made, tmp_path / "set", "flip=true")
    data = ["data=latents", f"data.path={tmp_path / 'set'}", "data.image_size=8", "data.num_classes=2",
            "data.flip=true", "data.num_workers=0", "data.batch_size=6"]  # fmt: skip
    network = [f"model.network.{name}" for name in NETWORK]
    options = [
        "mode=ect",
        "mode.total_steps=4",
        *data,
        *network,
        "logger=none",
        "trainer.accelerator=cpu",
    ]
    measured = ["evaluation@callbacks.evaluation=classifier", "callbacks.evaluation.num_samples=12",
                "callbacks.evaluation.seeds=[0]", f"callbacks.evaluation.cache={tmp_path / 'cache'}"]  # fmt: skip
    run, parted = tmp_path / "run", tmp_path / "parted"
    done = verb("train", *options, *measured, "trainer.max_steps=4", f"output={run}")
    assert done.status == 0, done.err
    digest = autoencoder.opened(str(made / "vae"), None, "edm2", torch.device("cpu")).sha256
    protocol = json.loads((run / "evaluation.json").read_text())["protocol"]
    assert protocol["autoencoder_sha256"] == digest
    assert protocol["reference"]["decoded"]["autoencoder_sha256"] == digest
    assert protocol["reference"]["shape"] == [3, 16, 16]
    # a resumed run draws the latents of an uninterrupted one
    assert verb("train", *options, "trainer.max_steps=2", f"output={parted}").status == 0
    done = verb("train", f"resume={parted}", "trainer.max_steps=4")
    assert done.status == 0, done.err
    weights = [consistency.load(p, weights="online").denoiser.state_dict() for p in (run, parted)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    model = consistency.load(run)
    assert (model.shape, model.card.shape) == ((3, 16, 16), (4, 8, 8))
    drawn = model.sample(5, steps=2)
    assert (drawn.shape, drawn.dtype) == ((5, 3, 16, 16), torch.uint8)
    done = verb("sample", f"checkpoint={run}", "num_samples=5", "sampler=twostep", "trajectory=true",
                "device=cpu", f"output={tmp_path / 'samples'}")  # fmt: skip
    assert done.status == 0, done.err
    with np.load(tmp_path / "samples" / "samples.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], drawn.permute(0, 2, 3, 1))

    # against pictures, and against the latents of the run
    metrics = [
        "evaluation.extractor=classifier",
        f"evaluation.cache={tmp_path / 'cache'}",
        "logger=none",
    ]
    metrics += ["num_samples=12", "weights=ema", "samplers=onestep", "device=cpu"]
    pictures = [
        "data=folder",
        f"data.path={made / 'set'}",
        "data.image_size=16",
        "data.num_workers=0",
    ]
    for name, reference in (("pictures", pictures), ("latents", data)):
        output = tmp_path / f"evaluation_{name}"
        done = verb("evaluate", f"checkpoint={run}", *reference, *metrics, f"output={output}")
        assert done.status == 0, done.err
        assert digest in (output / "evaluation.md").read_text()
    done = verb("search", f"checkpoint={run}", "num_samples=12", "num_scales=4", "device=cpu",
                f"evaluation.cache={tmp_path / 'cache'}", f"output={tmp_path / 'search'}")  # fmt: skip
    assert done.status == 0, done.err
    found = json.loads((run / "checkpoints" / "last.ckpt.searched.json").read_text())
    assert found["protocol"]["autoencoder_sha256"] == digest

    edit_and_move(verb, made, tmp_path, run)


def edit_and_move(verb: Run, made: Path, tmp_path: Path, run: Path) -> None:
    """Edits are in pixels; the autoencoder may move, but not change."""
    edits = ["edit", f"checkpoint={run}", f"input={made / 'set' / 'a'}", "outputs=1", "device=cpu"]
    done = verb(*edits, "task=inpaint", "task.num_scales=3", f"output={tmp_path / 'inpaint'}")
    assert done.status == 0, done.err
    with np.load(tmp_path / "inpaint" / "edited.npz") as arrays:
        edited = arrays["arr_0"][:, 0]
    before = images_of(made)[: COUNT // 2].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(edited[:, :4], before[:, :4])
    assert not np.array_equal(edited[:, 4:12, 4:12], before[:, 4:12, 4:12])
    done = verb(*edits, "task=denoise", f"output={tmp_path / 'denoised'}")
    assert done.status == 2 and "a model of images for start=input" in done.err
    done = verb("edit", f"checkpoint={run}", "task=interpolate", "task.frames=3", "outputs=2", "device=cpu",
                f"output={tmp_path / 'frames'}")  # fmt: skip
    assert done.status == 0, done.err

    sample = ["sample", f"checkpoint={run}", "num_samples=2", "device=cpu"]
    autoencoder.opened.cache_clear()
    place = shutil.copytree(made / "vae", tmp_path / "pipeline" / "vae").parent
    shutil.move(made / "vae", made / "gone")
    try:
        done = verb(*sample, f"output={tmp_path / 'missing'}")
        assert done.status == 2 and "an AutoencoderKL of diffusers" in done.err
        done = verb(*sample, f"autoencoder={made / 'other'}", f"output={tmp_path / 'another'}")
        assert done.status == 2 and "another one, sha256" in done.err
        done = verb(*sample, f"autoencoder={place}", f"output={tmp_path / 'moved'}")
        assert done.status == 0, done.err
    finally:
        shutil.move(made / "gone", made / "vae")
