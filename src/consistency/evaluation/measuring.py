"""Measures of samples against a reference, exact in their number and the same on any number of ranks.

FID by torchmetrics; inception score, KID, precision and recall by torch-fidelity, on the features that torchmetrics brings
together from all ranks, in the order of the samples' numbers: these measures draw subsets by position.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from consistency import caches
from consistency.data.source import Source
from consistency.errors import UserError, require
from consistency.evaluation.clock import Clock
from consistency.evaluation.extractors import (
    INCEPTION,
    Extractor,
    extractor_of,
    inception_weights,
    small_classifier,
)
from consistency.evaluation.reference import Reference, read_reference, reference_of
from consistency.generation import generate
from consistency.inference.card import ModelCard
from consistency.paths import path_of
from consistency.runtime.ranks import batches, gathered, print_once, rank_and_size
from consistency.samplers import Sampler
from consistency.tensors import Denoise, sent

NEIGHBOURHOOD = 3
"""k of precision and recall [Kynkäänniemi et al. 2019, arXiv:1904.06991]."""

FEWEST = 10
"""Samples, and references with features, that can be measured: as many as the inception score has parts."""

QUANTISATION = "uint8, round(127.5 x + 127.5) of x clamped to [-1, 1]"

Numbered: TypeAlias = tuple[Sequence[int], UInt8[Tensor, "_b _c _h _w"]]
"""Numbers of some samples, and the samples."""


class FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' FID of features, between samples and a reference whose moments are known; its sums are float64."""

    def __init__(self, reference: Reference) -> None:
        given = nn.Identity()
        given.num_features = len(reference.mu)  # type: ignore[assignment]
        super().__init__(feature=given)
        if rank_and_size()[0] == 0:  # states are summed over ranks
            # Where a file does not say how many images its moments are of, any number gives them back.
            count = reference.count or 2
            mu, sigma = reference.mu, reference.sigma
            self.real_features_sum += count * mu
            self.real_features_cov_sum += (count - 1) * sigma + count * torch.outer(mu, mu)
            self.real_features_num_samples += count


class Gathered(Metric):
    """Features, class scores and numbers of all samples of all ranks, in the order of the numbers."""

    full_state_update = False
    numbers: list[Tensor]
    features: list[Tensor]
    logits: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("numbers", "features", "logits"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, numbers: Tensor, features: Tensor, logits: Tensor) -> None:
        """Adds some samples."""
        self.numbers.append(numbers)
        self.features.append(features)
        self.logits.append(logits)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers, features and class scores."""
        numbers = dim_zero_cat(self.numbers)
        order = numbers.argsort()
        return numbers[order], dim_zero_cat(self.features)[order], dim_zero_cat(self.logits)[order]


class Measure:
    """Measures samples with an extractor against a reference. Under several ranks each gives its share, and all call."""

    def __init__(self, extractor: Extractor, reference: Reference) -> None:
        self.extractor, self.reference = extractor, reference
        self.clock = Clock()

    def __call__(
        self, samples: Iterable[Numbered], count: int, only: str | None = None
    ) -> dict[str, float]:
        """The measures, by name, of samples number 0 ... count-1, each of which one rank gives, once.

        only: one of frechet, class_score, kernel, precision, recall, where the others are not worth their time.

        What a reference without features or an extractor without classes cannot give is left out. Raises `UserError` where
        the samples are not exactly those, on every rank alike.
        """
        require(
            count >= max(FEWEST, rank_and_size()[1]),
            f"at least {FEWEST} samples to measure, and one a process",
            count,
            "ask for more",
        )
        device, summing = self.extractor.device, self.extractor.summing
        frechet, everything = FrechetDistance(self.reference).to(summing), Gathered().to(summing)
        with torch.inference_mode():
            for numbers, images in samples:
                with self.clock.running("extractor", device):
                    features, logits = self.extractor(sent(images, device))
                features = features.to(summing)
                frechet.update(features.double(), real=False)
                scores = features.new_empty(len(features), 0) if logits is None else logits
                everything.update(
                    sent(torch.tensor(numbers), summing), features, scores.to(summing)
                )
            order, features, scores = everything.compute()
            require(
                order.tolist() == list(range(count)),
                f"samples number 0 to {count - 1}, each once",
                f"{len(order)} samples with {len(order.unique())} numbers",
                "this is a mistake of the program: please report it",
            )
            found: dict[str, float] = {}
            if only in (None, "frechet"):
                found["frechet"] = float(frechet.compute())
            if only in (None, "class_score") and scores.shape[1]:
                found |= class_score(scores)
            kept = self.reference.features
            if kept is not None and len(kept) >= FEWEST:
                if only in (None, "kernel"):
                    found |= kernel_distance(features, kept.to(summing))
                if only in (None, "precision", "recall"):
                    found |= precision_recall(features, kept.to(summing))
        return {self.extractor.named(name): value for name, value in found.items()}

    def count(self, asked: int | None) -> int:
        """How many samples to measure: as many as asked for, or as the reference has images."""
        found = asked or self.reference.count
        require(
            found is not None,
            "num_samples, where the reference does not say how many images it has",
            asked,
            "give a number",
        )
        assert found is not None
        return found

    def protocol(self, count: int) -> dict[str, Any]:
        """All that the numbers of `count` samples depend on but the samples themselves."""
        kept = self.reference.features
        subset = None if kept is None else _subset(count, len(kept))
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
    """Mean of the inception score over torch-fidelity's parts of the samples, and its deviation."""
    found = isc_features_to_metric(logits.cpu(), DEFAULTS["isc_splits"], True, DEFAULTS["rng_seed"])
    return {
        "class_score": found["inception_score_mean"],
        "class_score_std": found["inception_score_std"],
    }


def kernel_distance(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Mean of the kernel distance over torch-fidelity's subsets, and its deviation."""
    found = kid_features_to_metric(
        samples, reference, kid_subset_size=_subset(len(samples), len(reference)), verbose=False
    )
    return {
        "kernel": found["kernel_inception_distance_mean"],
        "kernel_std": found["kernel_inception_distance_std"],
    }


def _subset(samples: int, reference: int) -> int:
    return min(DEFAULTS["kid_subset_size"], samples, reference)


def precision_recall(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Share of samples inside the reference's neighbourhoods, and of references inside the samples'."""
    precision, recall = calculate_precision_recall_part(
        samples, reference, NEIGHBOURHOOD, DEFAULTS["prc_batch_size"]
    )
    return {"precision": precision, "recall": recall}


def drawn(
    denoise: Denoise,
    sampler: Sampler,
    card: ModelCard,
    *,
    count: int,
    labels: object,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[Numbered]:
    """This rank's share of `count` samples, with their numbers, a batch at a time.

    labels: as `ModelCard.labels` takes them.
    """
    for numbers in batches(count, batch_size):
        (images,) = generate(
            denoise,
            sampler,
            indices=numbers,
            labels=card.labels(labels, seed, numbers),
            shape=card.shape,
            seed=seed,
            batch_size=len(numbers),
            device=device,
        )
        yield numbers, images


# ------------------------------------------------------------------------ from settings


@dataclass(frozen=True)
class Settings:
    """What a measurement is made with.

    extractor: `consistency.evaluation.extractors.extractor_of` says what may stand there. reference: the images or
    statistics that samples are compared with: train, held_out, a file of statistics, or None for the training images,
    as published; an extractor that was trained on these takes the held-out ones. reference_features: images of the
    reference whose features are kept for KID, precision and recall. cache: folder of computed references, None for one
    in the person's cache.
    """

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
        """The measure of a data set. All ranks call."""
        require(
            self.reference_features >= FEWEST,
            f"evaluation.reference_features >= {FEWEST}",
            self.reference_features,
            "give more",
        )
        extractor = available(self.extractor).to(device)
        images = {"train": train, "held_out": held_out}
        own = "held_out" if extractor.unseen and held_out is not None else "train"
        chosen = self.reference or own
        if chosen not in images:
            return Measure(extractor, read_reference(path_of(chosen), extractor))
        builder = images[chosen]
        require(
            builder is not None,
            "a data set with held-out images for evaluation.reference=held_out",
            "one without",
            "say evaluation.reference=train",
        )
        assert builder is not None
        reference = reference_of(
            builder(),
            extractor,
            described={"set": chosen},
            most_features=self.reference_features,
            cache=path_of(self.cache) if self.cache else caches.own() / "references",
            batch_size=self.batch_size,
            num_workers=num_workers,
        )
        return Measure(extractor, reference)


def available(name: str) -> Extractor:
    """The extractor of that name, the same on every rank; where Inception's weights cannot be had, the small classifier,
    and one line about it.
    """
    if name == INCEPTION and (reason := _missing_somewhere()):
        print_once(f"No FID: {reason}. Going on with the features of the small classifier.")
        extractor = small_classifier()
    else:
        extractor = extractor_of(name)
    same = gathered(extractor.protocol)
    require(
        all(other == same[0] for other in same),
        f"the same extractor {name} on all processes",
        "other weights on some",
        "put the same file on all machines",
    )
    return extractor


def _missing_somewhere() -> str | None:
    """Why Inception's weights cannot be had, in one line, None where every rank has them. The first rank fetches them for
    all that share its disk.
    """
    first = gathered(_missing() if rank_and_size()[0] == 0 else None)[0]
    return next(filter(None, gathered(first or _missing())), None)


def _missing() -> str | None:
    try:
        inception_weights()
    except UserError as error:
        return " ".join(str(error).split())
    return None
