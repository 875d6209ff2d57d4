"""Samples depend on (seed, index) alone; outputs are in the forms that others read."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from conftest import Run
from consistency.generation import drawn_labels, generate
from consistency.randomness import SampleNoise
from consistency.samplers import multistep, onestep


def arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    content = np.load(folder / "samples.npz")
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
    labels = drawn_labels(0, range(10_000), 10)
    counts = torch.bincount(labels, minlength=10)
    assert counts.min() > 850
    assert torch.equal(labels[500:600], drawn_labels(0, range(500, 600), 10))


def test_generate_rounds_to_the_nearest_grey_value() -> None:
    def constant(
        x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.full_like(x, 0.5)

    def sampler(denoise, noise, label=None):  # noqa: ANN001, ANN202
        return onestep(denoise, noise, label, t_max=80.0, clip=True)

    batches = generate(
        constant,
        sampler,
        indices=range(3),
        labels=None,
        shape=(1, 2, 2),
        seed=0,
        batch_size=2,
        device="cpu",
    )
    images = torch.cat(list(batches))
    assert images.shape == (3, 1, 2, 2)
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
