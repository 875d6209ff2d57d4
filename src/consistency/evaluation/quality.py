"""Sample quality in the features of the small classifier: not FID, and never called so.

The names say what they are: `frechet_classifier`, `precision_classifier`, `recall_classifier`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from consistency.data.source import Source
from consistency.evaluation.classifier import SmallClassifier

NEIGHBOURHOOD = 3
CHUNK = 10_000


class Quality(NamedTuple):
    """Fréchet distance (0 is best), precision and recall (1 is best), in the small classifier's features."""

    frechet: float
    precision: float
    recall: float


class PrecisionRecall(Metric):
    """Share of samples inside the reference's k = 3 neighbourhoods, and of references inside the samples'.

    [Kynkäänniemi et al. 2019, arXiv:1904.06991], computed by torch-fidelity; features are gathered from all ranks.
    """

    full_state_update = False
    features: list[Tensor]

    def __init__(self, reference: Tensor) -> None:
        super().__init__()
        self.reference = reference
        self.add_state("features", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor) -> None:
        self.features.append(features)

    def compute(self) -> tuple[float, float]:
        gathered = dim_zero_cat(self.features)
        return calculate_precision_recall_full(
            gathered, self.reference.to(gathered.device), NEIGHBOURHOOD, CHUNK
        )


def stacked(source: Source) -> UInt8[Tensor, "n c h w"]:
    """All images of a small source."""
    return torch.stack([source[i][0] for i in range(len(source))])


class ClassifierQuality:
    """Measures images against the held-out ones. Under several ranks each gives its share and all call `measure`."""

    def __init__(self, classifier: SmallClassifier, held_out: Source) -> None:
        self.classifier = classifier
        self.reference = stacked(held_out)

    def measure(
        self, shares: Iterable[UInt8[Tensor, "b c h w"]], device: torch.device | str = "cpu"
    ) -> Quality:
        """Quality of all images of all ranks together, computed on `device`."""
        classifier, reference = self.classifier.to(device), self.reference.to(device)
        frechet = FrechetInceptionDistance(feature=classifier).to(device)
        with torch.inference_mode():
            coverage = PrecisionRecall(classifier(reference)).to(device)
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                frechet.update(reference, real=True)
            for images in shares:
                frechet.update(images.to(device), real=False)
                coverage.update(classifier(images.to(device)))
            precision, recall = coverage.compute()
            return Quality(float(frechet.compute()), precision, recall)
