"""Metrics of samples against a reference, of exactly the requested samples and the same on any number of ranks.

FID by torchmetrics; inception score, KID, precision and recall by torch-fidelity, on the features of all ranks in the order
of the samples' numbers, because these metrics draw subsets by position.
"""

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from consistency.data.source import Source
from consistency.errors import UserError, require
from consistency.evaluation import extractors
from consistency.evaluation import reference as references
from consistency.evaluation.extractors import Extractor, SmallClassifier
from consistency.evaluation.reference import FrechetDistance, Reference, in_order
from consistency.inference.autoencoder import hashed
from consistency.inference.card import ModelCard
from consistency.inference.generate import Numbered
from consistency.runtime.files import cache_folder, path_of, written_whole
from consistency.runtime.ranks import gathered, print_once, rank_and_size
from consistency.tensors import sent

NEIGHBOURHOOD = 3  # k of precision and recall [Kynkäänniemi et al. 2019, arXiv:1904.06991]
FEWEST = 10  # smallest number of samples, and of features of a reference: the parts of the inception score
OWN_IMAGES = 64_000  # at most, of the training images for a classifier of their own
OWN_STEPS = 1_000  # about, of its training
QUANTISATION = "uint8, round(127.5 x + 127.5) of x clamped to [-1, 1]"


class Clock:
    """Sums of seconds by name. On a GPU it records events in the stream and waits for nothing."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._spans: dict[str, list[Callable[[], float]]] = defaultdict(list)

    @contextmanager
    def running(self, name: str, device: torch.device) -> Iterator[None]:
        """Count the body under `name`."""
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._spans[name].append(lambda: first.elapsed_time(last) / 1000)
            return
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._spans[name].append(lambda: seconds)

    def read(self) -> dict[str, float]:
        """Return the seconds since the start or the last reading, by name and in `total`."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds = {name: sum(span() for span in spans) for name, spans in self._spans.items()}
        seconds["total"] = now - self._start
        self._spans.clear()
        self._start = now
        return seconds


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
        frechet, rows = FrechetDistance(self.reference).to(summing), list[tuple[Tensor, ...]]()
        with torch.inference_mode():
            for numbers, images in samples:
                with self.clock.running("extractor", device):
                    features, logits = self.extractor(sent(images, device))
                features = features.to(summing)
                frechet.update(features.double(), real=False)
                scores = features[:, :0] if logits is None else logits
                rows.append((torch.tensor(numbers), features, scores))
            order, features, logits = in_order(rows)
            right, each = order.tolist() == [*range(count)], f"samples 0 to {count - 1}, each once"
            got = f"{len(order)} samples with {len(order.unique())} numbers"
            require(right, each, got, "this is a mistake of the program: please report it")
            values = {"frechet": float(frechet.compute())} if only in (None, "frechet") else {}
            values |= self._of_features(features.to(summing), logits, only)
        return {self.extractor.named(name): value for name, value in values.items()}

    def _of_features(self, features: Tensor, logits: Tensor, only: str | None) -> dict[str, float]:
        """Return means and deviations of torch-fidelity's inception score and kernel distance, precision and recall."""
        values: dict[str, float] = {}
        if only in (None, "class_score") and logits.shape[1]:
            shuffled = True, DEFAULTS["rng_seed"]
            score = isc_features_to_metric(logits, DEFAULTS["isc_splits"], *shuffled)
            values |= zip(("class_score", "class_score_std"), score.values(), strict=True)
        if self.reference.features is None or len(self.reference.features) < FEWEST:
            return values
        others = self.reference.features.to(features.device)
        if only in (None, "kernel"):
            size = self._subset(len(features))
            kernel = kid_features_to_metric(features, others, kid_subset_size=size, verbose=False)
            values |= zip(("kernel", "kernel_std"), kernel.values(), strict=True)
        if only in (None, "precision", "recall"):
            batch = DEFAULTS["prc_batch_size"]
            shares = calculate_precision_recall_part(features, others, NEIGHBOURHOOD, batch)
            values |= zip(("precision", "recall"), shares, strict=True)
        return values

    def _subset(self, count: int) -> int | None:
        """Return the number of samples in a subset for the kernel distance."""
        features = self.reference.features
        return None if features is None else min(DEFAULTS["kid_subset_size"], count, len(features))

    def count(self, num_samples: int | None) -> int:
        """Return num_samples; None stands for the number of images of the reference."""
        count = num_samples or self.reference.count or 0
        expected = "num_samples, because the reference does not record its number of images"
        require(count > 0, expected, num_samples, "give a number")
        return count

    def protocol(self, count: int, card: ModelCard | None = None) -> dict[str, Any]:
        """Return all that the metrics of `count` samples depend on beside them; card: of the model that draws them."""
        decoding = {} if card is None or card.latents is None else hashed(card.latents).protocol
        return {
            **self.reference.protocol,
            "quantisation": QUANTISATION,
            "samples": count,
            "inception_score_splits": DEFAULTS["isc_splits"],
            "kid_subsets": DEFAULTS["kid_subsets"],
            "kid_subset_size": self._subset(count),
            "precision_recall_k": NEIGHBOURHOOD,
            **decoding,
        }


def measure_against(
    train: Callable[[], Source],
    held_out: Callable[[], Source] | None,
    device: torch.device | str,
    *,
    extractor: str,
    reference: str | None,
    reference_features: int,
    cache: str | None,
    batch_size: int,
    num_workers: int,
) -> Measure:
    """Return the measure against a data set. Collective.

    extractor, reference, reference_features, cache: the options of conf/metrics.
    batch_size: images that a device measures at once.
    """
    fewest = f"evaluation.reference_features >= {FEWEST}"
    require(reference_features >= FEWEST, fewest, reference_features, "give a larger number")
    folder = path_of(cache) if cache else cache_folder()
    if extractor == extractors.OWN_CLASSIFIER:
        network = own_classifier(train(), folder / "classifiers").to(device)
    else:
        network = available(extractor).to(device)
    own = "held_out" if network.trained_on_train_set and held_out is not None else "train"
    name = reference or own
    if name not in ("train", "held_out"):
        return Measure(network, references.read_reference(path_of(name), network))
    source = train if name == "train" else held_out
    if source is None:
        expected = "a data set with held-out images for evaluation.reference=held_out"
        raise UserError(expected, "one without", "choose evaluation.reference=train")
    folder = folder if cache else folder / "references"
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    computed = references.reference_of(
        source(), network, name=name, cache=folder, most_features=reference_features, **loading
    )
    return Measure(network, computed)


def available(name: str) -> Extractor:
    """Return the extractor of that name, the same on every rank. Collective.

    Prints one line and returns the small classifier if the weights of Inception are not available.
    """
    if name == extractors.INCEPTION:
        # Rank 0 downloads the weights first, for all ranks that share its disk.
        reason = gathered(_missing() if rank_and_size()[0] == 0 else "")[0]
        if reason := next(filter(None, gathered(reason or _missing())), ""):
            print_once(f"No FID: {reason}. Going on with the features of the small classifier.")
            name = extractors.CLASSIFIER
    extractor = extractors.extractor_of(name)
    first, *others = gathered(extractor.protocol)
    same, remedy = f"the same extractor {name} on all processes", "put one file on all machines"
    require(all(other == first for other in others), same, "other weights on some", remedy)
    return extractor


def own_classifier(train: Source, cache: Path) -> Extractor:
    """Return the small classifier trained on the training images, from `cache` or by rank 0. Collective.

    Of more than `OWN_IMAGES` images it sees so many, evenly spread, as often as makes about a thousand steps.
    """
    expected = f"images with classes for evaluation.extractor={extractors.OWN_CLASSIFIER}"
    require(bool(classes := len(train.class_names)), expected, "none", "choose another extractor")
    channels, size = train.image_shape[:2]
    described = repr((references.content_key(train), classes, OWN_IMAGES, OWN_STEPS))
    file = cache / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.safetensors"
    state: dict[str, Tensor] = {}
    if rank_and_size()[0] == 0:
        with suppress(OSError, SafetensorError):  # missing, or damaged
            state = load_file(file)
        if not state:
            print(
                "Training a classifier, whose features measure the samples, on the training images",
                flush=True,
            )
            items, labels = train.batch(references.spread(len(train), OWN_IMAGES))
            images = train.decoded(items)
            epochs = max(1, round(OWN_STEPS * 64 / len(images)))
            trained = extractors.train_classifier(
                images, labels, num_classes=classes, epochs=epochs
            )
            state = trained.state_dict()
            with suppress(OSError), written_whole(file) as stream:
                stream.write(save(state))
    network = SmallClassifier(channels=channels, size=size, num_classes=classes)
    network.load_state_dict(gathered(state)[0])
    return extractors.extractor_with(network, extractors.OWN_CLASSIFIER)


def _missing() -> str:
    """Return in one line why this rank lacks the weights of Inception; empty if it has them."""
    try:
        extractors.inception_weights()
    except UserError as error:
        return " ".join(str(error).split())
    return ""
