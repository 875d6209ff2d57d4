"""Metrics of samples against a reference, of exactly the requested samples and the same on any number of ranks.

FID by torchmetrics; inception score, KID, precision and recall by torch-fidelity, on the features of all ranks in the order
of the samples' numbers, because these metrics draw subsets by position.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from consistency.data.source import Source
from consistency.errors import UserError, require
from consistency.evaluation import extractors, reference
from consistency.evaluation.extractors import Extractor
from consistency.evaluation.reference import FrechetDistance, GatheredFeatures, Reference
from consistency.evaluation.timing import Clock
from consistency.inference.generate import Numbered
from consistency.runtime.files import cache_folder, path_of
from consistency.runtime.ranks import gathered, print_once, rank_and_size
from consistency.tensors import sent

NEIGHBOURHOOD = 3
"""k of precision and recall [Kynkäänniemi et al. 2019, arXiv:1904.06991]."""

FEWEST = 10
"""Smallest number of samples, and of features of a reference: the parts of the inception score."""

QUANTISATION = "uint8, round(127.5 x + 127.5) of x clamped to [-1, 1]"


class Measure:
    """The metrics of samples in the features of an extractor, against a reference."""

    def __init__(self, extractor: Extractor, reference: Reference) -> None:
        self.extractor, self.reference = extractor, reference
        self.clock = Clock()

    def __call__(
        self, samples: Iterable[Numbered], count: int, only: str | None = None
    ) -> dict[str, float]:
        """Return the metrics, by name, of samples number 0 ... count-1. Collective: each sample comes from one rank.

        Metrics that need features of the reference or logits are left out if these are missing. Raises `UserError` on every
        rank if the samples are not exactly those.

        only: one of frechet, class_score, kernel, precision, recall, to save the time of the others.
        """
        fewest = f"at least {FEWEST} samples to measure, and one a process"
        require(count >= max(FEWEST, rank_and_size()[1]), fewest, count, "give a larger number")
        device, summing = self.extractor.device, self.extractor.summing
        frechet = FrechetDistance(self.reference).to(summing)
        ordered = GatheredFeatures().to(summing)
        with torch.inference_mode():
            for numbers, images in samples:
                with self.clock.running("extractor", device):
                    features, logits = self.extractor(sent(images, device))
                features = features.to(summing)
                frechet.update(features.double(), real=False)
                scores = features.new_empty(len(features), 0) if logits is None else logits
                order = sent(torch.tensor(numbers), summing)
                ordered.update(order, features, scores.to(summing))
            order, features, logits = ordered.compute()
            right, each = (
                order.tolist() == list(range(count)),
                f"samples 0 to {count - 1}, each once",
            )
            got = f"{len(order)} samples with {len(order.unique())} numbers"
            require(right, each, got, "this is a mistake of the program: please report it")
            values = {"frechet": float(frechet.compute())} if only in (None, "frechet") else {}
            if only in (None, "class_score") and logits.shape[1]:
                values |= class_score(logits)
            others = self.reference.features
            if others is not None and len(others) >= FEWEST:
                if only in (None, "kernel"):
                    values |= kernel_distance(features, others.to(summing))
                if only in (None, "precision", "recall"):
                    values |= precision_recall(features, others.to(summing))
        return {self.extractor.named(name): value for name, value in values.items()}

    def count(self, num_samples: int | None) -> int:
        """Return num_samples; None stands for the number of images of the reference."""
        count = num_samples or self.reference.count
        if count is None:
            expected = "num_samples, because the reference does not record its number of images"
            raise UserError(expected, num_samples, "give a number")
        return count

    def protocol(self, count: int) -> dict[str, Any]:
        """Return all that the metrics of `count` samples depend on beside the samples."""
        features = self.reference.features
        subset = None if features is None else _subset(count, len(features))
        return {
            **self.reference.protocol,
            "quantisation": QUANTISATION,
            "samples": count,
            "inception_score_splits": DEFAULTS["isc_splits"],
            "kid_subsets": DEFAULTS["kid_subsets"],
            "kid_subset_size": subset,
            "precision_recall_k": NEIGHBOURHOOD,
        }


def class_score(logits: Tensor) -> dict[str, float]:
    """Return mean and deviation of the inception score over torch-fidelity's parts of the samples."""
    score = isc_features_to_metric(logits.cpu(), DEFAULTS["isc_splits"], True, DEFAULTS["rng_seed"])
    mean, deviation = (score[f"inception_score_{name}"] for name in ("mean", "std"))
    return {"class_score": mean, "class_score_std": deviation}


def kernel_distance(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Return mean and deviation of the kernel distance over torch-fidelity's subsets."""
    size = _subset(len(samples), len(reference))
    distance = kid_features_to_metric(samples, reference, kid_subset_size=size, verbose=False)
    mean, deviation = (distance[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    return {"kernel": mean, "kernel_std": deviation}


def _subset(samples: int, reference: int) -> int:
    return min(DEFAULTS["kid_subset_size"], samples, reference)


def precision_recall(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Return the share of samples inside the reference's neighbourhoods, and of the reference inside the samples'."""
    precision, recall = calculate_precision_recall_part(
        samples, reference, NEIGHBOURHOOD, DEFAULTS["prc_batch_size"]
    )
    return {"precision": precision, "recall": recall}


@dataclass(frozen=True)
class Settings:
    """The options of a measurement, as in conf/metrics; batch_size: images that a device measures at once."""

    extractor: str
    reference: str | None
    reference_features: int
    cache: str | None
    batch_size: int

    def prepare(
        self,
        device: torch.device | str,
        *,
        train: Callable[[], Source],
        held_out: Callable[[], Source] | None,
        num_workers: int,
    ) -> Measure:
        """Return the measure against a data set. Collective."""
        features, fewest = self.reference_features, f"evaluation.reference_features >= {FEWEST}"
        require(features >= FEWEST, fewest, features, "give a larger number")
        extractor = available(self.extractor).to(device)
        own = "held_out" if extractor.trained_on_train_set and held_out is not None else "train"
        chosen = self.reference or own
        if chosen not in ("train", "held_out"):
            return Measure(extractor, reference.read_reference(path_of(chosen), extractor))
        builder = train if chosen == "train" else held_out
        if builder is None:
            expected = "a data set with held-out images for evaluation.reference=held_out"
            raise UserError(expected, "one without", "choose evaluation.reference=train")
        computed = reference.reference_of(
            builder(),
            extractor,
            name=chosen,
            most_features=features,
            cache=path_of(self.cache) if self.cache else cache_folder() / "references",
            batch_size=self.batch_size,
            num_workers=num_workers,
        )
        return Measure(extractor, computed)


def available(name: str) -> Extractor:
    """Return the extractor of that name, the same on every rank. Collective.

    Prints one line and returns the small classifier if the weights of Inception are not available.
    """
    if name == extractors.INCEPTION and (reason := _missing_on_any_rank()):
        print_once(f"No FID: {reason}. Going on with the features of the small classifier.")
        name = extractors.CLASSIFIER
    extractor = extractors.extractor_of(name)
    first, *others = gathered(extractor.protocol)
    same, remedy = f"the same extractor {name} on all processes", "put one file on all machines"
    require(all(other == first for other in others), same, "other weights on some", remedy)
    return extractor


def _missing_on_any_rank() -> str | None:
    """Return in one line why the weights of Inception are not available to some rank, or None."""

    def missing() -> str | None:
        try:
            extractors.inception_weights()
        except UserError as error:
            return " ".join(str(error).split())
        return None

    # Rank 0 downloads the weights first, for all ranks that share its disk.
    first = gathered(missing() if rank_and_size()[0] == 0 else None)[0]
    return next(filter(None, gathered(first or missing())), None)
