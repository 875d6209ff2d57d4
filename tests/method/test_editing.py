"""Laws of zero-shot editing: what was given is kept, what was free varies, and noises lie on a sphere."""

import itertools
import math
from functools import partial

import pytest
import torch

from analytic import DOUBLE, Gaussian, normal, times
from consistency.editing import (
    LUMINANCE,
    Box,
    Center,
    ColourBasis,
    Pairing,
    PatchBasis,
    Pixels,
    Random,
    Task,
    colorize,
    difference,
    edit,
    grid_times,
    inpaint,
    interpolate,
    invert,
    orthonormal_basis,
    regenerate,
    spherical,
    superres,
)
from consistency.errors import UserError
from consistency.grids import KarrasGrid
from consistency.randomness import generator
from consistency.samplers import Noise
from consistency.tensors import Data, Label, Time

SHAPE = (3, 8, 8)
GRID = KarrasGrid(t_min=0.002, t_max=80.0, rho=7.0)
LAW = Gaussian(0.1, 0.4)
TASKS: dict[str, Pairing] = {
    "inpaint a box": partial(inpaint, mask=Box(box=[1, 2, 3, 5])),
    "inpaint the centre": partial(inpaint, mask=Center(size=4)),
    "inpaint at random": partial(inpaint, mask=Random(share=0.4)),
    "colorize": colorize,
    "superres by 2": partial(superres, patch=2),
    "superres by 8": partial(superres, patch=8),
}


def source(shape: torch.Size, seed: int, dtype: torch.dtype = torch.float32) -> Noise:
    seeds = itertools.count(1000 * seed)
    return lambda: normal(*shape, seed=next(seeds), dtype=dtype)


def consistency(x_t: Data, t: Time, label: Label = None) -> Data:
    return LAW.flow(x_t, t, torch.full_like(t, GRID.t_min))


def edited(task: Task, y: Data, seed: int, start: str = "reference", points: int = 9) -> Data:
    return edit(
        consistency,
        source(y.shape, seed, y.dtype),
        y,
        task,
        times=grid_times(GRID, points + 1),
        t_min=GRID.t_min,
        start=start,
        clip=True,
    )


@pytest.mark.parametrize("start", ["reference", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("points", [1, 9])
@pytest.mark.parametrize("name", TASKS)
def test_an_edit_keeps_the_known_part_and_varies_the_free_part(
    name: str, points: int, dtype: torch.dtype, start: str
) -> None:
    task, y = TASKS[name](SHAPE, generator(0, "edit")), 0.3 * normal(4, *SHAPE, dtype=dtype)
    first, second = (edited(task, y, seed, start, points) for seed in (0, 1))
    a, known = task.transform, (task.omega == 0).expand_as(task.transform(y))
    rounding = 8 * torch.finfo(dtype).eps
    assert known.any()
    assert float((a(first) - a(y))[known].abs().max()) <= rounding
    assert float((a(first) - a(second))[~known].abs().mean()) > 0.1
    assert torch.equal(first, edited(task, y, 0, start, points))
    if isinstance(a, Pixels):
        assert torch.equal(first[known], y[known])


def test_superresolution_keeps_patch_means_and_colorization_keeps_brightness() -> None:
    y = 0.3 * normal(2, *SHAPE)
    small = edited(superres(SHAPE, generator(0, "edit"), patch=4), y, 0)
    pooled = torch.nn.functional.avg_pool2d
    assert torch.allclose(pooled(small, 4), pooled(y, 4), atol=1e-12)
    assert not torch.allclose(small, y, atol=0.1)
    coloured = edited(colorize(SHAPE, generator(0, "edit")), y, 0)
    weights = torch.tensor(LUMINANCE, dtype=DOUBLE)[:, None, None]
    assert torch.allclose((weights * coloured).sum(1), (weights * y).sum(1), atol=1e-12)


@pytest.mark.parametrize("transform", [ColourBasis(), PatchBasis(2), PatchBasis(4), Pixels()])
def test_a_transform_is_orthogonal_and_undone_by_its_inverse(
    transform: ColourBasis | PatchBasis | Pixels,
) -> None:
    x, y = normal(3, *SHAPE), normal(3, *SHAPE, seed=1)
    assert torch.allclose(transform.inverse(transform(x)), x, atol=1e-12)
    assert torch.allclose((transform(x) * transform(y)).sum(), (x * y).sum())


def test_the_colour_basis_is_the_published_one() -> None:
    published = torch.tensor(
        [[0.4471, -0.8204, 0.3563], [0.8780, 0.4785, 0.0], [0.1705, -0.3129, -0.9343]]
    ).double()
    ours = ColourBasis().matrix
    assert torch.allclose(ours.abs(), published.abs(), atol=2e-4)
    assert torch.allclose(ours[:, 0], published[:, 0], atol=2e-4)
    basis = orthonormal_basis([1.0] * 16)
    assert torch.allclose(basis[:, 0], torch.full((16,), 0.25, dtype=DOUBLE))


def test_the_loop_is_algorithm_4_word_by_word() -> None:
    y, task = 0.3 * normal(2, *SHAPE), TASKS["inpaint a box"](SHAPE, generator(0, "edit"))
    points, z = [80.0, 5.0, 0.7], [normal(2, *SHAPE, seed=s) for s in range(3)]
    omega = task.omega
    x = consistency(y * (1 - omega) + 80.0 * z[0], times(2, 80.0))
    x = y * (1 - omega) + x * omega
    for t, noise in zip(points[1:], z[1:], strict=True):
        x = consistency(x + math.sqrt(t**2 - GRID.t_min**2) * noise, times(2, t))
        x = y * (1 - omega) + x * omega
    remaining = iter(z)
    ours = edit(
        consistency,
        lambda: next(remaining),
        y,
        task,
        times=points,
        t_min=GRID.t_min,
        start="reference",
        clip=False,
    )
    assert torch.allclose(ours, x, atol=1e-12)


def test_strokes_guide_and_the_noisy_input_is_cleaned() -> None:
    y, task = 0.3 * normal(2, *SHAPE), regenerate(SHAPE, generator(0, "edit"))
    z = normal(2, *SHAPE, seed=3)
    settings = {"t_min": GRID.t_min, "clip": False}
    guided = edit(consistency, lambda: z, y, task, times=[5.38], start="reference", **settings)
    assert torch.equal(guided, consistency(y + 5.38 * z, times(2, 5.38)))
    free = edit(consistency, lambda: z, y, task, times=[5.38], start="noise", **settings)
    assert torch.equal(free, consistency(5.38 * z, times(2, 5.38)))
    noisy = y + 0.5 * z
    cleaned = edit(consistency, lambda: z, noisy, task, times=[0.5], start="input", **settings)
    assert torch.equal(cleaned, consistency(noisy, times(2, 0.5)))


def test_the_free_part_of_the_input_does_not_change_the_edit() -> None:
    task, y = TASKS["inpaint a box"](SHAPE, generator(0, "edit")), 0.3 * normal(2, *SHAPE)
    other = torch.where(task.omega == 1, torch.full_like(y, 0.9), y)
    assert torch.equal(edited(task, y, 0), edited(task, other, 0))


def test_masks_hold_the_specified_values() -> None:
    draw = generator(0, "edit")
    assert Box(box=[1, 2, 3, 4])(8, 9, draw)[2:6, 1:4].sum() == 12 == Box(box=[1, 2, 3, 4])(8, 9, draw).sum()  # fmt: skip
    assert Center(size=4)(8, 8, draw)[2:6, 2:6].sum() == 16 == Center()(8, 8, draw).sum()
    random = Random(share=0.25)(8, 8, generator(1, "edit"))
    assert random.sum() == 16
    assert torch.equal(random, Random(share=0.25)(8, 8, generator(1, "edit")))
    assert not torch.equal(random, Random(share=0.25)(8, 8, generator(2, "edit")))


@pytest.mark.parametrize(
    ("pairing", "shape", "hint"),
    [
        (partial(inpaint, mask=Box(box=[6, 0, 3, 2])), SHAPE, "mask.box"),
        (partial(inpaint, mask=Box(box=[1, 2, 3])), SHAPE, "mask.box"),
        (partial(inpaint, mask=Box(box=[0, 0, 0, 2])), SHAPE, "mask.box"),
        (partial(inpaint, mask=Center(size=9)), SHAPE, "mask.size"),
        (partial(inpaint, mask=Random(share=0.0)), SHAPE, "mask.share"),
        (partial(inpaint, mask=Random(share=1.5)), SHAPE, "mask.share"),
        (colorize, (1, 8, 8), "3 channels"),
        (partial(superres, patch=3), SHAPE, "patch"),
        (partial(superres, patch=1), SHAPE, "patch"),
        (partial(superres, patch=16), SHAPE, "patch"),
    ],
)
def test_a_task_that_does_not_fit_is_an_error(
    pairing: Pairing, shape: tuple[int, int, int], hint: str
) -> None:
    with pytest.raises(UserError, match=hint):
        pairing(shape, generator(0, "edit"))


def test_spherical_interpolation_stays_on_the_sphere() -> None:
    z_0, z_1 = normal(5, 3, 16, 16), normal(5, 3, 16, 16, seed=1)
    z_1 = z_1 * (z_0.flatten(1).norm(dim=1) / z_1.flatten(1).norm(dim=1))[:, None, None, None]
    for share in (0.0, 0.3, 0.5, 1.0):
        z = spherical(z_0, z_1, share)
        assert torch.allclose(z.flatten(1).norm(dim=1), z_0.flatten(1).norm(dim=1))
    assert torch.allclose(spherical(z_0, z_1, 0.0), z_0)
    assert torch.allclose(spherical(z_0, z_1, 1.0), z_1)
    assert torch.allclose(spherical(z_0, z_0, 0.4), z_0)
    angle = torch.cosine_similarity(z_0.flatten(1), spherical(z_0, z_1, 0.25).flatten(1)).arccos()
    whole = torch.cosine_similarity(z_0.flatten(1), z_1.flatten(1)).arccos()
    assert torch.allclose(angle, whole / 4)


def test_inversion_and_back_is_a_round_trip() -> None:
    """The image -> noise -> image error falls with the square of the number of points, Heun's order."""
    y, errors = LAW.sample(20, 1, 4, 4), []
    for steps in (40, 80, 160):
        z = invert(LAW.denoise, y, grid=GRID, steps=steps)
        back = consistency(GRID.t_max * z, times(20, GRID.t_max))
        errors.append(float(difference(back, y).mean()))
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.15)
    exact = LAW.flow(y, times(20, GRID.t_min), times(20, GRID.t_max)) / GRID.t_max
    assert torch.allclose(z, exact, atol=0.01)


def test_interpolation_begins_and_ends_at_the_two_images() -> None:
    z_0, z_1 = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    frames = interpolate(consistency, z_0, z_1, frames=5, t_max=80.0, clip=False)
    assert frames.shape == (5, 2, 1, 4, 4)
    for z, frame in ((z_0, frames[0]), (z_1, frames[-1])):
        assert torch.allclose(frame, consistency(80.0 * z, times(2, 80.0)), atol=1e-12)
    with pytest.raises(UserError, match="frames"):
        interpolate(consistency, z_0, z_1, frames=1, t_max=80.0, clip=False)


def test_the_default_points_are_the_published_grid_without_its_last_point() -> None:
    points = grid_times(GRID, 40)
    assert (len(points), points[0]) == (39, 80.0)
    assert points == GRID.points(40)[:-1].tolist()
