"""The distances are the formulas, and the classifier that they are measured in is a classifier."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from consistency.data.digits import Digits
from consistency.evaluation.classifier import SmallClassifier, train_classifier
from consistency.evaluation.quality import ClassifierQuality, stacked


@pytest.fixture(scope="module")
def classifier() -> SmallClassifier:
    return train_classifier(
        Digits(split="train"), num_classes=10, seed=0, epochs=4, batch_size=64, lr=3e-3
    )


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(gap + np.trace(a + b - 2 * np.real(sqrtm(a @ b))))


def coverage(samples: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        own = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radius = np.sort(own, axis=1)[:, k]
        return float(
            (np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radius).any(1).mean()
        )

    return inside(samples, reference), inside(reference, samples)


def test_the_classifier_knows_digits_it_has_not_seen(classifier: SmallClassifier) -> None:
    held_out = Digits(split="held_out")
    right = classifier.logits(held_out.images).argmax(1) == held_out.labels
    assert float(right.float().mean()) > 0.9


def test_the_classifier_is_a_function_of_its_recipe(classifier: SmallClassifier) -> None:
    torch.manual_seed(12345)
    again = train_classifier(
        Digits(split="train"), num_classes=10, seed=0, epochs=4, batch_size=64, lr=3e-3
    )
    for mine, other in zip(classifier.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_measures_equal_an_independent_computation(classifier: SmallClassifier) -> None:
    held_out = Digits(split="held_out")
    draw = torch.Generator().manual_seed(0)
    samples = Digits(split="train").images[:500].float()
    samples = (samples + 40 * torch.randn(samples.shape, generator=draw)).clamp(0, 255).byte()
    found = ClassifierQuality(classifier, held_out).measure(iter(samples.split(99)))
    x, y = (classifier(i).double().numpy() for i in (samples, stacked(held_out)))
    assert found.frechet == pytest.approx(frechet(x, y), rel=1e-4)
    precision, recall = coverage(x, y)
    assert found.precision == pytest.approx(precision, abs=0.004)
    assert found.recall == pytest.approx(recall, abs=0.004)


def test_the_held_out_images_are_at_distance_zero_of_themselves(
    classifier: SmallClassifier,
) -> None:
    held_out = Digits(split="held_out")
    found = ClassifierQuality(classifier, held_out).measure(iter([stacked(held_out)]))
    assert found.frechet == pytest.approx(0, abs=1e-3)
    assert (found.precision, found.recall) == (1.0, 1.0)
