"""EDM's augmentation: an orthonormal filter, images left alone, known moves, labels of what was done."""

import torch

from consistency.augmentation import (  # fmt: skip
    MARGIN,
    SYM6,
    EDMAugmentation,
    doubled,
    halved,
    resampled,
)


def images(batch: int = 4, height: int = 16, width: int = 16) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, height, width, generator=draw) * 2 - 1


def test_the_filter_and_its_even_shifts_are_orthonormal() -> None:
    taps = torch.tensor(SYM6, dtype=torch.float64)
    products = [float(taps[2 * n :] @ taps[: len(taps) - 2 * n]) for n in range(6)]
    torch.testing.assert_close(torch.tensor(products), torch.tensor([1.0, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(taps.sum() ** 2, torch.tensor(2.0, dtype=torch.float64))


def test_halving_undoes_doubling() -> None:
    x = images()
    inside = (slice(None), slice(None), slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    torch.testing.assert_close(halved(doubled(x)), x[inside], rtol=0, atol=1e-5)


def test_closed_gates_leave_images_and_labels_alone() -> None:
    augmentation = EDMAugmentation(p=0.0, xflip=0.0)
    draws = augmentation.draw(4, torch.Generator().manual_seed(1))
    out, labels = augmentation(images(), draws)
    torch.testing.assert_close(out, images(), rtol=0, atol=1e-5)
    assert labels.shape == (4, 8)
    assert not labels.any()


def test_a_move_by_whole_pixels_moves_them() -> None:
    x, move = images(height=12, width=20), torch.tensor([[3.0, -2.0]]).expand(4, 2)
    out = resampled(x, torch.eye(2).expand(4, 2, 2), -move)
    torch.testing.assert_close(out[:, :, :10, 3:], x[:, :, 2:, :17], rtol=0, atol=1e-5)


def test_a_quarter_turn_is_a_rotation_of_the_pixels() -> None:
    augmentation = EDMAugmentation(
        p=1.0, xflip=0.0, yflip=0.0, scale=0.0, aniso=0.0, translate_frac=0.0
    )
    draws = {"rotate_frac.value": torch.full((4,), 0.75), "rotate_frac.gate": torch.zeros(4)}
    across, down = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="xy")
    smooth = (0.3 * across + 0.1 * down).sin().expand(4, 1, 16, 16)
    out, labels = augmentation(smooth, draws)
    torch.testing.assert_close(out, smooth.rot90(1, (2, 3)), rtol=0, atol=0.04)
    torch.testing.assert_close(labels, torch.tensor([[-1.0, 1.0]]).expand(4, 2))


def test_published_probabilities_are_those_of_the_gates() -> None:
    augmentation = EDMAugmentation(p=0.12)
    x = torch.zeros(5000, 1, 2, 2)
    _, labels = augmentation(x, augmentation.draw(len(x), torch.Generator().manual_seed(2)))
    shares = (labels != 0).float().mean(0)
    expected = torch.tensor([0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.12 * 0.5, 0.12, 0.12])
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)


def test_draws_are_a_function_of_the_generator() -> None:
    augmentation = EDMAugmentation(p=0.15)
    first, second = (augmentation.draw(8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
