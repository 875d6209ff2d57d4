"""The results of an evaluation: the names of metrics, and evaluation.json of a run and of the command `evaluate`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consistency.errors import UserError

INCEPTION = "inception"
PUBLISHED = {"frechet": "fid", "kernel": "kid", "class_score": "inception_score"}
SIGNS = {"frechet": 1, "kernel": 1, "class_score": -1, "precision": -1, "recall": -1}
"""The metrics, each with the sign under which the smallest value is the best."""

FILE = "evaluation.json"
NAMES = ("sampler", "weights", "nfe", "step", "seconds", "samples")
"""Keys of a result that are no metrics."""


def named(metric: str, extractor: str) -> str:
    """Return the full name of a metric: `fid` for Inception, `frechet_<extractor>` for others."""
    if extractor != INCEPTION:
        return f"{metric}_{extractor}"
    for ours, published in PUBLISHED.items():
        metric = metric.replace(ours, published)
    return metric


def sign_of(name: str) -> int:
    """Return the sign under which the smallest value of what a run logs by that name is the best."""
    metric = name.removeprefix("quality/")
    signs = (s for m, s in SIGNS.items() if metric.startswith((m, named(m, INCEPTION))))
    return next(signs, 1)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The metrics of one sampler and set of weights, the Fréchet distance first.

    nfe: network evaluations of a sample; step: optimizer steps of the weights; None if the file does not hold them.
    """

    sampler: str
    weights: str
    metrics: Mapping[str, float]
    nfe: float | None
    step: int | None


@dataclass(frozen=True, kw_only=True)
class Results:
    """All results in a file, and how they were measured.

    sha256: of the measured checkpoint; None if the file does not hold it, as that of a run.
    checkpoints: paths of the measured checkpoints; none in the file of a run.
    """

    rows: tuple[Result, ...]
    protocol: Mapping[str, Any]
    sha256: str | None
    checkpoints: tuple[str, ...]


def read_results(file: Path) -> Results:
    """Read evaluation.json. Raise `UserError` if it is none."""
    try:
        content = json.loads(file.read_text())
        results, nfe, k = content["results"], content.get("nfe", {}), content.get("k")
        if isinstance(results, dict):  # of a run, with the bounds beside the samplers
            titles = [title.partition("/") for title in results if "/" in title]
            rows = [
                {"sampler": s, "weights": w, "nfe": nfe.get(s), "step": k, **results[f"{s}/{w}"]}
                for s, _, w in titles
            ]
        else:
            rows = [row for row in results if "sampler" in row]
        place = content.get("checkpoint")
        return Results(
            rows=tuple(map(_result, rows)),
            protocol=dict(content["protocol"]),
            sha256=content.get("sha256"),
            checkpoints=tuple(content.get("snapshots", [place] if place else [])),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "give a folder that src/evaluate.py or src/train.py wrote"
        raise UserError(f"results of an evaluation at {file}", str(error)[:200], remedy) from error


def _result(row: Mapping[str, Any]) -> Result:
    return Result(
        sampler=str(row["sampler"]),
        weights=str(row["weights"]),
        metrics={name: float(value) for name, value in row.items() if name not in NAMES},
        nfe=row.get("nfe"),
        step=row.get("step"),
    )
