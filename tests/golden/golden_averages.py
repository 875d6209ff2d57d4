"""Comparisons of power-function averages with those of EDM2."""

from collections.abc import Sequence

import torch
from torch import Tensor

from consistency.averaging import (
    posthoc_coefficients,
    power_decay,
    power_exponent,
    profile_product,
    relative_width,
)
from golden_harness import Archive, Tolerance

EXACT = Tolerance(of_norm=1e-12)
ROUNDED = Tolerance(of_norm=1e-6)
"""Of the released code's float32 runs."""


def compare_power_averages(archive: Archive) -> None:
    """Exponents, decays, inner products of profiles, coefficients, and a run with its reconstructions."""
    archive.compare("convert.exp_of_std", _exponents(archive.tensor("convert.std")), EXACT)
    widths = [relative_width(gamma) for gamma in archive.tensor("convert.exp").tolist()]
    archive.compare("convert.std_of_exp", torch.tensor(widths, dtype=torch.float64), EXACT)
    steps = archive.tensor("beta.t_next") // int(archive.number("beta.t_delta"))
    decays = [
        [power_decay(k, s) for k in steps.tolist()] for s in archive.tensor("beta.std").tolist()
    ]
    archive.compare("beta.value", torch.tensor(decays, dtype=torch.float64), EXACT)
    a, b = (
        (archive.tensor(f"correlation.{n}_ofs"), _exponents(archive.tensor(f"correlation.{n}_std")))
        for n in "ab"
    )
    archive.compare("correlation.value", profile_product(*a, *b), EXACT)
    for name in archive.matching("coefs.*.coefs"):
        case = name.removesuffix(".coefs")
        ofs, std, outs = (
            archive.tensor(f"{case}.{n}").tolist() for n in ("in_ofs", "in_std", "out_std")
        )
        ours = _coefficients(ofs, std, archive.number(f"{case}.out_ofs"), outs)
        archive.compare(name, ours, EXACT)
    compare_run(archive)


def compare_run(archive: Archive) -> None:
    """The averages of a run of weights, stored, and reconstructed from its snapshots."""
    weights = archive.tensor("run.weights").double()
    for name in archive.matching("run.track_*") + archive.matching("run.direct_*"):
        width = _width_in(name)
        averages = [weights[0]]
        for k, online in enumerate(weights[1:], start=1):
            averages.append(averages[-1].lerp(online, 1 - power_decay(k, width)))
        ours = torch.stack(averages[1:]) if "track" in name else averages[-1]
        archive.compare(name, ours, EXACT if name.endswith(".f64") else ROUNDED)
    tracks = sorted(archive.matching("run.track_*.f64"))
    at = archive.tensor("run.snapshot_step")
    stored = [(int(k), _width_in(track)) for k in at for track in tracks]
    rows = torch.stack(
        [torch.from_numpy(archive.arrays[t][int(k) - 1]) for k in at for t in tracks]
    )
    widths = sorted(map(_width_in, archive.matching("run.direct_*.f64")))
    steps, stds = zip(*stored, strict=True)
    ours = _coefficients(steps, stds, max(steps), widths)
    archive.compare("run.coefs", ours, EXACT)
    archive.compare("run.reconstructed.f64", ours.T @ rows, EXACT)
    archive.compare("run.reconstructed", ours.T @ rows, ROUNDED)


def _exponents(widths: Tensor) -> Tensor:
    return torch.tensor([power_exponent(w) for w in widths.tolist()], dtype=torch.float64)


def _width_in(name: str) -> float:
    """The relative width at the end of the name of an array."""
    return float(name.removesuffix(".f64").rpartition("_")[2])


def _coefficients(
    steps: Sequence[float], stds: Sequence[float], step: float, widths: Sequence[float]
) -> Tensor:
    """Our coefficients of stored averages, a column for each width."""
    return torch.stack([posthoc_coefficients(steps, stds, step, w) for w in widths], dim=1)
