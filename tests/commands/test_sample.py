"""Samples depend on (seed, index) alone; outputs are in the forms that others read."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import REPORT, ROOT, TINY, Run
from consistency import load
from consistency.editing import Box, colorize, inpaint
from consistency.errors import UserError
from consistency.inference import generate
from consistency.inference.card import ModelCard, random_labels
from consistency.inference.generate import Request, samples
from consistency.randomness import SampleNoise
from consistency.runtime.devices import in_precision
from consistency.samplers import multistep, onestep, trigflow_multistep
from tiny_models import tiny_card


def arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz") as content:
        return content["arr_0"], content["arr_1"]


def test_samples_do_not_depend_on_the_batch_size(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for batch in (64, 7):
        output = tmp_path / str(batch)
        arguments = [f"checkpoint={trained['ect']}", f"batch_size={batch}", "sampler=multistep"]
        assert verb("sample", *arguments, f"output={output}").status == 0
        found.append(arrays(output))
    (whole, labels), (parts, same) = found
    assert np.array_equal(labels, same)
    difference = np.abs(whole.astype(int) - parts.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


def test_more_samples_begin_with_the_same_ones(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    for count in (8, 16):
        arguments = [f"checkpoint={trained['ect']}", f"num_samples={count}", "batch_size=8"]
        assert verb("sample", *arguments, f"output={tmp_path / str(count)}").status == 0
    few, many = arrays(tmp_path / "8"), arrays(tmp_path / "16")
    assert np.array_equal(few[0], many[0][:8])
    assert np.array_equal(few[1], many[1][:8])


def test_the_seed_changes_the_samples(verb: Run, trained: dict[str, Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        arguments = [
            f"checkpoint={trained['ect']}",
            f"seed={seed}",
            f"output={tmp_path / str(seed)}",
        ]
        assert verb("sample", *arguments).status == 0
    assert not np.array_equal(arrays(tmp_path / "0")[0], arrays(tmp_path / "1")[0])


def test_all_three_forms_hold_the_same_pixels(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [f"checkpoint={trained['ect']}", "num_samples=4", "images=true", "labels=[3,1]"]
    assert verb("sample", *arguments, f"output={tmp_path / 'out'}").status == 0
    pixels, labels = arrays(tmp_path / "out")
    assert labels.tolist() == [3, 1, 3, 1]
    for number in range(4):
        with Image.open(tmp_path / "out" / "images" / f"{number:05d}.png") as opened:
            single = np.asarray(opened)
        assert np.array_equal(single, pixels[number, :, :, 0])
    with Image.open(tmp_path / "out" / "grid.png") as opened:
        grid = np.asarray(opened)
    assert np.array_equal(grid[2:50:6, 2:50:6, 0], pixels[0, :, :, 0])


def test_noise_of_a_sample_is_a_function_of_seed_and_index() -> None:
    alone, among = SampleNoise(5, [9], (1, 4, 4)), SampleNoise(5, [2, 9, 4], (1, 4, 4))
    for _ in range(3):
        assert torch.equal(alone()[0], among()[1])
    assert not torch.equal(SampleNoise(6, [9], (1, 4, 4))(), SampleNoise(5, [9], (1, 4, 4))())


def test_noise_is_standard_normal_and_independent_over_calls() -> None:
    source = SampleNoise(0, range(4000), (1, 2, 2))
    first, second = source().flatten(), source().flatten()
    assert abs(float(first.mean())) < 0.03
    assert abs(float(first.std()) - 1) < 0.02
    assert abs(float((first * second).mean())) < 0.03


def test_labels_are_uniform_and_numbered() -> None:
    labels = random_labels(0, range(10_000), 10)
    counts = torch.bincount(labels, minlength=10)
    assert counts.min() > 850
    assert torch.equal(labels[500:600], random_labels(0, range(500, 600), 10))


def test_generate_rounds_to_the_nearest_grey_value() -> None:
    def constant(
        x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.full_like(x, 0.5)

    def sampler(denoise, noise, label=None):  # noqa: ANN001, ANN202
        return onestep(denoise, noise, label, t_max=80.0, clip=True)

    card = replace(ModelCard.parse(tiny_card(), "a test"), num_classes=None)
    images = samples(Request(denoise=constant, card=card), sampler, 3, 2)
    assert images.shape == (3, *card.shape)
    assert torch.all(images == round(0.5 * 127.5 + 127.5))


def test_multistep_at_one_point_is_onestep_and_counts_its_evaluations() -> None:
    calls = []

    def denoise(
        x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None
    ) -> torch.Tensor:
        calls.append(float(t[0]))
        return x / (1 + t[:, None, None, None])

    def noise() -> torch.Tensor:
        return torch.ones(2, 1, 2, 2)

    single = onestep(denoise, noise, t_max=80.0, clip=False)
    several = multistep(denoise, noise, times=[80.0], t_min=0.002, t_max=80.0, clip=False)
    assert torch.equal(single, several)
    multistep(denoise, noise, times=[80.0, 4.0, 1.0], t_min=0.002, t_max=80.0, clip=False)
    assert calls[2:] == [80.0, 4.0, 1.0]


@pytest.mark.slow
def test_images_do_not_depend_on_the_number_of_devices(
    verb: Run, process: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for devices, run in ((1, verb), (2, process)):
        output = tmp_path / str(devices)
        arguments = [f"checkpoint={trained['ect']}", "num_samples=20", "batch_size=6"]
        arguments += ["sampler=multistep", "device=cpu", f"devices={devices}", f"output={output}"]
        outcome = run("sample", *arguments)
        assert outcome.status == 0, outcome.err
        found.append(arrays(output))
        assert not (output / "parts").exists()
    (one, labels), (two, same) = found
    assert np.array_equal(labels, same)
    assert np.abs(one.astype(int) - two.astype(int)).max() <= 1
    assert len(one) == 20


def test_a_sample_passes_at_most_25_functions(
    verb: Run,
    trained: dict[str, Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """From the command's main function down to the sampler, without `load`, the networks and the masking of output."""
    package, passed, inside = f"{ROOT / 'src' / 'consistency'}/", list[str](), list[FrameType]()
    down: list[int] = []
    left_out = ("checkpoints.", "denoiser.", "networks.", "samplers.", "runtime.redaction.")

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "return" and inside and frame is inside[-1]:
            inside.pop()
        if event != "call" or not code.co_filename.startswith(package):
            return
        module = code.co_filename.removeprefix(package).removesuffix(".py").replace("/", ".")
        name = f"{module}.{code.co_qualname}"
        if name == "commands.sample.sample" or (inside and name.startswith(left_out)):
            inside.append(frame)
        if len(inside) == 1 and "<" not in name and name not in passed:
            passed.append(name)
        if name.startswith("samplers.") and "inference.generate.generate" in passed:
            down.append(len(passed))

    sys.setprofile(profile)
    try:
        outcome = verb(
            "sample", f"checkpoint={trained['ect']}", f"output={tmp_path / 'out'}", "num_samples=4"
        )
    finally:
        sys.setprofile(None)
    assert outcome.status == 0, outcome.err
    assert down[0] <= 25, passed[: down[0]]
    record_property(REPORT, f"functions that a sample passes: {down[0]}, {len(passed)} to the end")


def test_a_stopped_run_goes_on_and_a_finished_one_grows(
    verb: Run, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = [f"checkpoint={trained['ect']}", "batch_size=8"]
    assert verb("sample", *arguments, "num_samples=40", f"output={whole}").status == 0

    real, calls = generate.SampleNoise, itertools.count()

    def until_the_plug_is_pulled(*given: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(generate, "SampleNoise", until_the_plug_is_pulled)
    with pytest.raises(KeyboardInterrupt):
        verb("sample", *arguments, "num_samples=24", f"output={stopped}")
    assert len(list((stopped / "parts").glob("*.npz"))) == 2

    drawn: list[int] = []

    def counted(seed: int, numbers: Any, *given: Any) -> Any:
        drawn.extend(numbers)
        return real(seed, numbers, *given)

    monkeypatch.setattr(generate, "SampleNoise", counted)
    for count, new in ((24, range(16, 24)), (40, range(24, 40))):
        drawn.clear()
        outcome = verb("sample", *arguments, f"num_samples={count}", f"output={stopped}")
        assert outcome.status == 0, outcome.err
        assert drawn == list(new)
        assert np.array_equal(arrays(stopped)[0], arrays(whole)[0][:count])
        assert np.array_equal(arrays(stopped)[1], arrays(whole)[1][:count])
    assert not (stopped / "parts").exists()


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (["seed=1"], "seed"),
        (["weights=online"], "weights"),
        (["sampler=multistep"], "sampler"),
        (["labels=3"], "labels"),
        (["num_samples=4"], "num_samples"),
    ],
)
def test_samples_of_other_settings_are_left_alone(
    change: list[str], hint: str, verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [f"checkpoint={trained['ect']}", "num_samples=8", f"output={tmp_path / 'out'}"]
    assert verb("sample", *arguments).status == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    outcome = verb("sample", *arguments, *change)
    assert outcome.status == 2
    assert hint in outcome.err
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_samples_of_another_checkpoint_are_left_alone(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    for mode, status in (("ect", 0), ("ct", 2)):
        outcome = verb(
            "sample", f"checkpoint={trained[mode]}", f"output={tmp_path / 'out'}", "num_samples=4"
        )
        assert outcome.status == status


def test_half_precision_changes_little(verb: Run, trained: dict[str, Path], tmp_path: Path) -> None:
    arguments = [f"checkpoint={trained['ect']}", "precision=bf16-mixed", "num_samples=4"]
    assert verb("sample", *arguments, f"output={tmp_path / 'out'}").status == 0
    model, x, t = load(trained["ect"]), torch.randn(8, 1, 8, 8), torch.ones(8)
    for weight in model.denoiser.network.parameters():
        weight += 0.1 * torch.randn_like(weight)
    label, device = torch.zeros(8, dtype=torch.int64), torch.device("cpu")
    whole = in_precision(model, "32-true", device)(x, t, label)
    half = in_precision(model, "bf16-mixed", device)(x, t, label)
    assert half.dtype == torch.float32
    apart = float((whole - half).norm() / whole.norm())
    assert 1e-5 < apart < 0.05


@pytest.mark.slow
def test_a_compiled_network_draws_the_same(
    process: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for choice in ("false", "true"):
        output = tmp_path / choice
        arguments = [f"checkpoint={trained['ect']}", f"compile={choice}", "device=cpu"]
        outcome = process("sample", *arguments, f"output={output}")
        assert outcome.status == 0, outcome.err
        found.append(arrays(output)[0].astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1


def test_the_way_of_the_samples_is_shown(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = [f"checkpoint={trained['edm']}", "sampler=heun", "sampler.steps=3"]
    outcome = verb("sample", *arguments, "num_samples=4", "trajectory=true", f"output={output}")
    assert outcome.status == 0, outcome.err
    with Image.open(output / "trajectory.gif") as gif:
        assert gif.n_frames == 5
    with Image.open(output / "trajectory.png") as strip, Image.open(output / "grid.png") as grid:
        last = np.asarray(strip)[18:66, -48 - 2 - 8 : -2 - 8]
        assert last.shape == (48, 48, 3)
        first_sample = np.asarray(grid)[2:50, 2:50]
        columns = [np.asarray(strip)[20:68, left : left + 48] for left in range(strip.width - 48)]
        assert any(np.array_equal(c, first_sample) for c in columns)


def test_a_class_goes_by_index_or_by_name() -> None:
    saved = tiny_card(num_classes=3, class_names=["cat", "dog", "eel"])
    card = ModelCard.parse(saved, "a test")
    assert card.labels(["eel", 0], 0, range(3)).tolist() == [2, 0, 2]
    assert card.labels("dog", 0, range(2)).tolist() == [1, 1]
    assert card.edit_labels(["eel", 0], 0, 2, 2).tolist() == [2, 2, 0, 0]
    assert torch.equal(card.edit_labels(None, 0, 2, 3), random_labels(0, range(6), 3))
    assert replace(card, num_classes=None).labels(None, 0, range(2)) is None
    for wrong in ("cow", 3, -1, [], 1.0, True, ["cat", None]):
        with pytest.raises(UserError, match="labels"):
            card.labels(wrong, 0, range(2))


def test_the_names_of_classes_come_from_the_folders(verb: Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / "data" / ("cats", "dogs")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    data = ["data=folder", f"data.path={tmp_path / 'data'}", "data.source.classes=true"]
    data += ["data.num_classes=2", "data.image_size=8", "data.channels=1", "trainer.max_steps=1"]
    run = tmp_path / "run"
    outcome = verb(
        "train", *TINY, *data, "model.network.attention_resolutions=[4]", f"output={run}"
    )
    assert outcome.status == 0, outcome.err
    assert load(run).card.class_names == ("cats", "dogs")
    output = tmp_path / "out"
    arguments = [f"checkpoint={run}", "labels=[dogs,cats,dogs]", "num_samples=4"]
    outcome = verb("sample", *arguments, f"output={output}")
    assert outcome.status == 0, outcome.err
    assert arrays(output)[1].tolist() == [1, 0, 1, 1]
    wrong = verb("sample", f"checkpoint={run}", "labels=cows", f"output={tmp_path / 'no'}")
    assert (wrong.status, "cats" in wrong.err) == (2, True)


def test_three_lines_of_python_do_what_the_commands_do(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    model = load(trained["ect"])
    images = model.sample(6, steps=2, seed=3)
    arguments = [f"checkpoint={trained['ect']}", "sampler=multistep", "seed=3", "num_samples=6"]
    assert verb("sample", *arguments, f"output={tmp_path / 'out'}").status == 0
    drawn = torch.from_numpy(arrays(tmp_path / "out")[0]).permute(0, 3, 1, 2)
    assert torch.equal(images, drawn)
    edited = model.edit(
        images, partial(inpaint, mask=Box(box=[0, 0, 8, 4])), outputs=2, times=[9.0]
    )
    assert edited.shape == (6, 2, 1, 8, 8)
    assert torch.equal(edited[:, 1, :, 4:], images[:, :, 4:])
    assert not torch.equal(edited[:, 0, :, :4], edited[:, 1, :, :4])
    assert torch.equal(model.sample(2, labels=3), model.sample(2, labels=[3, 3]))
    with pytest.raises(UserError, match="shape"):
        model.edit(images[:, :, :4], colorize)


@pytest.mark.parametrize(("mode", "steps"), [("ect", 1), ("ect", 2), ("ect", 5), ("edm", 4)])
def test_steps_choose_a_sampler_that_suits_the_model(
    mode: str, steps: int, trained: dict[str, Path]
) -> None:
    model, calls = load(trained[mode]), []
    sampler = model.card.sampler(steps)

    def watched(
        x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None
    ) -> torch.Tensor:
        calls.append(float(t[0]))
        return model(x, t, label)

    sampler(watched, SampleNoise(0, [0], model.shape), torch.tensor([0]))
    assert len(calls) == (steps if mode == "ect" else 2 * steps - 1)
    assert calls[0] == 80.0
    if (mode, steps) == ("ect", 2):
        assert calls[1] == pytest.approx(0.821)
    scalings = {"_target_": "consistency.preconditioning.TrigFlow"}
    trig = replace(model.card, preconditioning=scalings, role="consistency")
    assert trig.sampler(1).func is trigflow_multistep


@pytest.mark.parametrize(
    ("side", "device", "images"),
    [
        (8, "cpu", 256),
        (28, "cpu", 64),
        (32, "cpu", 64),
        (256, "cpu", 1),
        (32, "cuda", 256),
        (64, "cuda", 64),
        (1024, "cuda", 1),
    ],
)
def test_a_batch_fits_the_work(side: int, device: str, images: int) -> None:
    assert generate.fitting_batch((3, side, side), device) == images
