"""`python src/edit.py`: every task from files to files, and one message for every bad input."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from conftest import ROOT, Run
from consistency.checkpoints import ours
from consistency.commands import schema
from consistency.commands.edit import Interpolation, MaskFile, ZeroShot
from consistency.commands.overrides import for_hydra, spelled_out
from consistency.data.listing import read_images
from consistency.editing import Box, Center, Random
from consistency.errors import UserError
from consistency.randomness import generator
from tiny_models import tiny_adm, tiny_card

TASKS = sorted(p.stem for p in (ROOT / "conf" / "task").glob("*.yaml"))
MASKS = sorted(p.stem for p in (ROOT / "conf" / "mask").glob("*.yaml"))
SHORT = ["task.num_scales=4", "outputs=2"]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consistency model of 8x8 colour images, with random weights."""
    path = tmp_path_factory.mktemp("coloured") / "model.ckpt"
    ours.write({"card": tiny_card(), "weights": tiny_adm()}, path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser of such images that has not learnt anything: D(x, t) is near c_skip x."""
    path = tmp_path_factory.mktemp("teacher") / "model.ckpt"
    scalings = {
        "_target_": "consistency.preconditioning.EDM",
        "sigma_data": 0.5,
        "c_noise_scale": 250.0,
    }
    weights = {
        name: value * (0.02 if name.startswith("out.") else 1.0)
        for name, value in tiny_adm().items()
    }
    card = tiny_card(role="teacher", preconditioning=scalings)
    ours.write({"card": card, "weights": weights}, path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of different types and sizes."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels[0, :8, :8]).save(folder / "a.png")
    Image.fromarray(pixels[1]).save(folder / "b.jpg")
    Image.fromarray(pixels[2, :, :, 0]).save(folder / "c.bmp")
    (folder / "notes.txt").write_text("no image")
    return folder


def composed(*overrides: str) -> DictConfig:
    schema.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("edit", [*overrides, "checkpoint=/nowhere", "output=/nowhere"])


@pytest.mark.parametrize("task", TASKS)
def test_every_task_composes_and_builds(task: str) -> None:
    config = composed(f"task={task}")
    assert isinstance(instantiate(config.task, _convert_="all"), ZeroShot | Interpolation)
    assert bool(config.mask) == (task == "inpaint")


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_composes_and_builds(mask: str) -> None:
    settings = {"box": ["mask.box=[1,2,3,4]"], "file": ["mask.path=a.png"]}.get(mask, [])
    config = composed("task=inpaint", f"mask={mask}", *settings)
    classes = {"box": Box, "center": Center, "random": Random, "file": MaskFile}
    if mask in classes:
        built = instantiate(config.task, _convert_="all").pairing.keywords["mask"]
        assert type(built) is classes[mask]


def test_the_published_settings_are_the_defaults() -> None:
    for task in ("inpaint", "colorize", "superres"):
        config = composed(f"task={task}").task
        assert (config.num_scales, config.times, config.start) == (40, None, "reference")
    assert list(composed("task=stroke").task.times) == [5.38, 2.24]
    assert composed("task=superres").task.pairing.patch == 8


@pytest.mark.parametrize("start", ["null", "noise"])
@pytest.mark.parametrize("task", ["inpaint", "colorize", "superres", "stroke", "denoise"])
def test_a_folder_is_edited(
    task: str, start: str, verb: Run, coloured: Path, photos: Path, tmp_path: Path
) -> None:
    output, given = tmp_path / "out", read_images(str(photos), 3, 8)
    short = ["task.pairing.patch=2"] if task == "superres" else []
    outcome = verb(
        "edit",
        f"task={task}",
        f"checkpoint={coloured}",
        f"input={photos}",
        f"output={output}",
        f"start={start}",
        "images=true",
        *SHORT,
        *short,
    )
    assert outcome.status == 0, outcome.err
    with np.load(output / "edited.npz") as arrays:
        results = torch.from_numpy(arrays["arr_0"]).movedim(-1, 2)
    assert results.shape == (3, 2, 3, 8, 8)
    assert len(list((output / "images").iterdir())) == 6
    with Image.open(output / "grid.png") as sheet:
        assert sheet.size[0] > 3 * 8
    known = {
        "inpaint": lambda x: x.float() * (Center()(8, 8, generator(0, "edit")) == 0),
        "superres": lambda x: torch.nn.functional.avg_pool2d(x.float().flatten(0, -4), 2),
        "colorize": lambda x: torch.einsum(
            "...chw,c->...hw", x.float(), torch.tensor([0.2989, 0.5870, 0.1140])
        ),
    }
    if task in known:
        assert "largest change of the known part" in outcome.out
        for column in range(2):
            kept, was = known[task](results[:, column]), known[task](given)
            assert (kept - was).abs().median() <= 0.5
        assert not torch.equal(results[:, 0], results[:, 1])


def test_edits_depend_on_seed_and_number_alone(
    verb: Run, coloured: Path, photos: Path, tmp_path: Path
) -> None:
    found = {}
    for name, more in {"a": [], "b": ["batch_size=1"], "c": ["seed=1"]}.items():
        output = tmp_path / name
        arguments = ["task=inpaint", "mask=random", "mask.share=0.9", f"checkpoint={coloured}"]
        arguments += [f"input={photos}", f"output={output}", *SHORT, *more]
        assert verb("edit", *arguments).status == 0
        with np.load(output / "edited.npz") as arrays:
            found[name] = arrays["arr_0"].astype(int)
    assert np.abs(found["a"] - found["b"]).max() <= 1
    assert np.abs(found["a"] - found["c"]).mean() > 1


def test_a_picture_is_a_mask(verb: Run, coloured: Path, photos: Path, tmp_path: Path) -> None:
    omega = np.zeros((8, 8), dtype=np.uint8)
    omega[:, :3] = 255
    mask = tmp_path / "it's a mask.png"
    Image.fromarray(omega).save(mask)
    output, file = tmp_path / "out", photos / "a.png"
    arguments = ["task=inpaint", f"mask={mask}", f"checkpoint={coloured}", f"input={file}"]
    outcome = verb("edit", *arguments, f"output={output}", *SHORT)
    assert outcome.status == 0, outcome.err
    with np.load(output / "edited.npz") as arrays:
        results = arrays["arr_0"]
    given = np.asarray(Image.open(file))
    assert np.array_equal(results[0, :, :, 3:], np.stack([given[:, 3:]] * 2))
    assert not np.array_equal(results[0, 0, :, :3], results[0, 1, :, :3])


def test_a_path_is_spelled_out_only_where_a_file_may_stand() -> None:
    assert spelled_out("mask=a b.png") == ["mask=file", "mask.path=a b.png"]
    assert for_hydra(["mask=a b.png"]) == ["mask=file", "mask.path='a b.png'"]
    for argument in ("mask=center", "input=a.png", "mask.box=[0,0,1,1]", "--cfg", "task=a.b"):
        assert spelled_out(argument) == [argument]


def test_interpolation_of_drawn_noise(verb: Run, coloured: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["task=interpolate", "task.frames=5", f"checkpoint={coloured}", "outputs=2"]
    outcome = verb("edit", *arguments, f"output={output}")
    assert outcome.status == 0, outcome.err
    with np.load(output / "edited.npz") as arrays:
        assert arrays["arr_0"].shape == (2, 5, 8, 8, 3)
    with Image.open(output / "grid.gif") as gif:
        assert gif.n_frames == 8


def test_interpolation_of_images_measures_its_round_trip(
    verb: Run, coloured: Path, teacher: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ["task=interpolate", f"checkpoint={coloured}", f"teacher={teacher}"]
    outcome = verb("edit", *arguments, f"input={photos}", f"output={output}")
    assert outcome.status == 0, outcome.err
    with np.load(output / "edited.npz") as arrays:
        assert arrays["arr_0"].shape == (2, 9, 8, 8, 3)
    line = next(line for line in outcome.out.splitlines() if "of the teacher" in line)
    assert float(line.rsplit(" ", 1)[1]) < 0.05
    assert "through the model" in outcome.out


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BAD_FILES = {
    "text.png": b"no image at all",
    "empty.png": b"",
    "bomb.png": bomb(),
    "script.svg": b"<svg/>",
    "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0",
}

MISTAKES = {
    "no task": (["task=magic"], "task/magic"),
    "no input": (["task=stroke", "input=null"], "input="),
    "nothing at the path": (["task=stroke", "input=/nowhere/a.png"], "/nowhere/a.png"),
    "unknown start": (["task=stroke", "start=anywhere"], "start="),
    "no outputs": (["task=stroke", "outputs=0"], "outputs"),
    "mask of another task": (["task=stroke", "mask=center"], "task=inpaint"),
    "mask that is not there": (["task=inpaint", "mask=/nowhere/m.png"], "/nowhere/m.png"),
    "mask of no kind": (["task=inpaint", "mask=circle"], "mask/circle"),
    "box without numbers": (["task=inpaint", "mask=box"], "mask.box"),
    "box outside": (["task=inpaint", "mask=box", "mask.box=[5,5,9,9]"], "mask.box"),
    "too large a centre": (["task=inpaint", "mask.size=20"], "mask.size"),
    "patch that does not divide": (["task=superres", "task.pairing.patch=3"], "patch"),
    "rising times": (["task=stroke", "task.times=[2.24,5.38]"], "fall"),
    "indices that do not end": (["task=inpaint", "task.indices=[0,20]"], "39"),
    "images without a teacher": (["task=interpolate"], "teacher="),
    "a start of an interpolation": (["task=interpolate", "start=noise"], "start"),
    "unknown key": (["task=stroke", "task.tims=[1.0]"], "tims"),
    "labels without classes": (["task=stroke", "labels=3"], "labels"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_editing_is_one_message(
    name: str, verb: Run, coloured: Path, photos: Path, tmp_path: Path
) -> None:
    arguments, hint = MISTAKES[name]
    output = tmp_path / "out"
    outcome = verb(
        "edit", f"checkpoint={coloured}", f"input={photos}", f"output={output}", *arguments
    )
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert hint in outcome.err
    assert not output.exists() or not any(output.iterdir())


@pytest.mark.parametrize("kind", ["input", "mask"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_message(
    name: str, kind: str, verb: Run, coloured: Path, photos: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(BAD_FILES[name])
    given = {"input": str(photos), "mask": "center"} | {kind: str(file)}
    outcome = verb(
        "edit",
        "task=inpaint",
        f"checkpoint={coloured}",
        f"output={tmp_path / 'out'}",
        *(f"{key}={value}" for key, value in given.items()),
    )
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert name in outcome.err


def test_an_interpolation_needs_two_images_and_a_denoiser(
    verb: Run, coloured: Path, teacher: Path, photos: Path, tmp_path: Path
) -> None:
    arguments = ["task=interpolate", f"checkpoint={coloured}", f"output={tmp_path / 'out'}"]
    one = verb("edit", *arguments, f"teacher={teacher}", f"input={photos / 'a.png'}")
    assert (one.status, "two images" in one.err) == (2, True)
    other = verb("edit", *arguments, f"teacher={coloured}", f"input={photos}")
    assert (other.status, "teacher" in other.err) == (2, True)


def test_a_mask_that_frees_nothing_is_an_error(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="white"):
        MaskFile(path=str(tmp_path / "black.png"))(8, 8, generator(0, "edit"))


def test_a_small_image_is_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    large = read_images(str(tmp_path / "small.png"), 3, 8)[0]
    assert np.array_equal(large[:, ::2, ::2].permute(1, 2, 0).numpy(), small)
    assert torch.equal(large[:, ::2], large[:, 1::2])


def test_an_upright_photograph_is_read_upright(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = read_images(str(tmp_path / "turned.png"), 3, 8)[0]
    assert turned[:, -1].min() == 255
    assert turned[:, :-1].max() == 0


def test_the_configuration_is_kept_beside_the_result(
    verb: Run, coloured: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ["task=stroke", f"checkpoint={coloured}", f"input={photos}", "outputs=1"]
    assert verb("edit", *arguments, f"output={output}").status == 0
    assert "times:" in (output / "edit.yaml").read_text()
