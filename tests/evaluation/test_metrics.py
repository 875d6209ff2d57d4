"""The measures are the formulas, whoever computes them; the classifier that they are taken in is a classifier."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from conftest import REPORT
from consistency.data.digits import Digits
from consistency.errors import UserError
from consistency.evaluation.extractors import (
    Extracted,
    Extractor,
    SmallClassifier,
    small_classifier,
    train_classifier,
)
from consistency.evaluation.metrics import FrechetDistance, Measure, measure_against
from consistency.evaluation.reference import Reference


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return small_classifier()


@pytest.fixture(scope="module")
def measure(extractor: Extractor, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    return measure_against(
        lambda: Digits(split="train"),
        lambda: Digits(split="held_out"),
        "cpu",
        extractor="classifier",
        reference=None,
        reference_features=50_000,
        cache=str(tmp_path_factory.mktemp("cache")),
        batch_size=100,
        num_workers=0,
    )


def numbered(images: torch.Tensor, size: int = 99) -> list:
    parts = range(len(images)).__getitem__
    return [
        (parts(slice(first, first + size)), images[first : first + size])
        for first in range(0, len(images), size)
    ]


def spoiled(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    images = Digits(split="train").images[:count].float()
    return (images + 40 * torch.randn(images.shape, generator=draw)).clamp(0, 255).byte()


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


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of all samples at once, which the mean over subsets estimates."""

    def k(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    own = k(x, x), k(y, y)
    means = [(g.sum() - np.trace(g)) / (s * (s - 1)) for g, s in zip(own, (n, m), strict=True)]
    return float(sum(means) - 2 * k(x, y).mean())


def test_the_classifier_knows_digits_it_has_not_seen() -> None:
    train = Digits(split="train")
    classifier = train_classifier(train.images, train.labels, num_classes=10, epochs=4)
    held_out = Digits(split="held_out")
    right = classifier.logits(classifier(held_out.images)).argmax(1) == held_out.labels
    assert float(right.float().mean()) > 0.9


def test_the_classifier_is_a_function_of_its_recipe() -> None:
    def trained() -> SmallClassifier:
        train = Digits(split="train")
        return train_classifier(train.images, train.labels, num_classes=10, epochs=2)

    first = trained()
    torch.manual_seed(12345)
    for mine, other in zip(first.parameters(), trained().parameters(), strict=True):
        assert torch.equal(mine, other)


def test_measures_equal_an_independent_computation(extractor: Extractor, measure: Measure) -> None:
    samples, held_out = spoiled(500), Digits(split="held_out").images
    found = measure(numbered(samples), 500)
    seen = [extractor(i) for i in (samples, held_out)]
    x, y = (s.features.double().numpy() for s in seen)
    assert found["frechet_classifier"] == pytest.approx(frechet(x, y), rel=1e-6)
    precision, recall = coverage(x, y)
    assert found["precision_classifier"] == pytest.approx(precision, abs=0.004)
    assert found["recall_classifier"] == pytest.approx(recall, abs=0.004)
    # Subsets of 500 of 500 samples and of 898 references: their mean scatters about the estimate from all.
    spread = found["kernel_std_classifier"] / 10
    assert found["kernel_classifier"] == pytest.approx(kernel(x, y), abs=4 * spread)
    assert seen[0].logits is not None
    p = seen[0].logits.double().softmax(1).numpy()
    whole = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    # Ten parts of 50 samples know less of the marginal than all 500 together.
    assert 0.9 * whole < found["class_score_classifier"] < whole


def test_the_reference_is_at_distance_zero_of_itself(measure: Measure) -> None:
    images = Digits(split="held_out").images
    found = measure(numbered(images), len(images))
    assert found["frechet_classifier"] == pytest.approx(0, abs=1e-6)
    assert (found["precision_classifier"], found["recall_classifier"]) == (1.0, 1.0)


def test_the_batch_size_and_the_order_of_batches_change_nothing(measure: Measure) -> None:
    samples = spoiled(101)
    whole = measure(numbered(samples, 101), 101)
    for size in (1, 7):
        found = measure(reversed(numbered(samples, size)), 101)
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batches: batches[:-1],
        lambda batches: [*batches, batches[0]],
        lambda batches: [batches[0], *batches[:-1]],
    ],
    ids=["one batch short", "one twice", "one in place of another"],
)
def test_other_samples_than_those_asked_for_are_an_error(
    spoil: Callable[[list], list], measure: Measure
) -> None:
    with pytest.raises(UserError, match="each once"):
        measure(spoil(numbered(spoiled(100), 10)), 100)


@pytest.mark.parametrize("offset", [0.0, 100.0, 10_000.0])
def test_the_covariance_is_accumulated_in_float64(
    offset: float, record_property: Callable[[str, object], None]
) -> None:
    """Against centred float64: features of deviation 1 about a mean, 64 of them, in 40 batches."""
    draw = np.random.RandomState(0)
    mix = draw.randn(64, 64) / 8
    x, y = (draw.randn(2000, 64) @ mix * s + offset for s in (1.0, 1.1))
    reference = Reference(
        torch.from_numpy(y.mean(0)), torch.from_numpy(np.cov(y, rowvar=False)), len(y), None, {}
    )
    metric = FrechetDistance(reference)
    for part in torch.from_numpy(x).split(50):
        metric.update(part, real=False)
    error = abs(float(metric.compute()) / frechet(x, y) - 1)
    record_property(REPORT, f"FID from float64 sums, mean {offset:g}: relative error {error:.1e}")
    assert error < 1e-6


def test_an_extractor_without_classes_and_a_reference_without_features_leave_out_what_they_cannot() -> (
    None
):
    moments = Reference(torch.zeros(2).double(), torch.eye(2).double(), None, None, {})
    mean = torch.nn.Conv2d(3, 2, 1)

    def see(network: torch.nn.Module, images: torch.Tensor) -> Extracted:
        return Extracted(network(images.float()).mean((2, 3)), None)

    images = torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8)
    extractor = Extractor(mean, see, name="mean", resize="none")
    assert list(Measure(extractor, moments)(numbered(images), 20)) == ["frechet_mean"]


def test_a_reference_of_unknown_count_gives_its_moments(tmp_path: Path) -> None:
    """The count of a foreign file's images is not known and does not matter."""
    draw = np.random.RandomState(1)
    x, y = draw.randn(50, 3), draw.randn(60, 3) * 2 + 1
    found = []
    for count in (None, 60, 10**6):
        reference = Reference(
            torch.from_numpy(y.mean(0)), torch.from_numpy(np.cov(y, rowvar=False)), count, None, {}
        )
        metric = FrechetDistance(reference)
        metric.update(torch.from_numpy(x), real=False)
        found.append(float(metric.compute()))
    assert found == pytest.approx([frechet(x, y)] * 3, rel=1e-9)
