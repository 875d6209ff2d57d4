"""The reference of samples: mean and covariance of the features of a data set, and features.

It is computed once for a data set and extractor and kept in a file, or read from a file of another program. Our files record
what their numbers depend on, and are refused for anything else.
"""

import hashlib
import json
import os
from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from consistency.data.source import Source
from consistency.errors import require
from consistency.evaluation.extractors import Extractor
from consistency.evaluation.results import INCEPTION
from consistency.inference.generate import Numbered
from consistency.runtime.files import fingerprint, written_whole
from consistency.runtime.ranks import batches, gathered, print_once, rank_and_size
from consistency.tensors import sent

PIXELS = 10_000


@dataclass(frozen=True)
class Reference:
    """Statistics of the features of images.

    mu, sigma: mean and unbiased covariance, float64.
    count: number of images they were computed from; None if unknown.
    features: of some of the images, in order; None if unknown.
    protocol: what the numbers depend on.
    """

    mu: Float[Tensor, "f"]
    sigma: Float[Tensor, "f f"]
    count: int | None
    features: Float[Tensor, "n f"] | None
    protocol: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write an .npz with mu and sigma as NVlabs' and guided-diffusion's programs read them."""
        arrays = {"mu": self.mu.numpy(), "sigma": self.sigma.numpy()}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        text = json.dumps({"count": self.count, **self.protocol})
        with written_whole(path) as file:
            np.savez(file, allow_pickle=False, protocol=np.array(text), **arrays)


def read_reference(
    path: Path, extractor: Extractor, protocol: dict[str, Any] | None = None
) -> Reference:
    """Read a file of `Reference.write`, NVlabs' or guided-diffusion's programs.

    The latter two record no extractor and are taken to be of the published Inception; images in the file
    (guided-diffusion's arr_0) serve the metrics that need features. Raises `UserError` for another extractor or `protocol`.
    """
    arrays = _read_arrays(path)
    mu, sigma = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    recorded = json.loads(str(arrays["protocol"])) if "protocol" in arrays else {}
    count, wanted = recorded.pop("count", None), protocol or extractor.protocol
    if not recorded:
        recorded = {**extractor.protocol, "reference": _foreign(path, arrays, extractor)}
    other = sorted(name for name in wanted if recorded.get(name) != wanted[name])
    expected = f"a reference with {', '.join(f'{n}={wanted[n]}' for n in other)}"
    got = f"{path} with {', '.join(f'{n}={recorded.get(n)}' for n in other)}"
    remedy = "measure with the extractor of the reference, or name another evaluation.reference"
    require(not other, expected, got, remedy)
    features = None
    if "features" in arrays:
        features = torch.from_numpy(arrays["features"])
    elif "arr_0" in arrays:
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).split(64)
        with torch.inference_mode():
            parts = [extractor(part.to(extractor.device)).features.cpu() for part in images]
        features = torch.cat(parts)
    return Reference(mu, sigma, count, features, recorded)


def _read_arrays(path: Path) -> dict[str, Any]:
    """Read the arrays of an .npz with finite mu and sigma, and features and images of the right shape if it has them."""
    remedy = "check the path, or leave evaluation.reference out"
    require(path.is_file(), f"reference statistics at {path}, an .npz", "no such file", remedy)
    arrays: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        got = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    except Exception as error:  # damaged and foreign files fail in any way
        got = str(error)[:200]
    mu, sigma = (arrays.get(name, np.array(None)) for name in ("mu", "sigma"))
    finite = all(a.dtype.kind == "f" and np.isfinite(a).all() for a in (mu, sigma))
    square = mu.ndim == 1 and sigma.shape == 2 * mu.shape
    rows = arrays.get("features", mu[None]).shape[1:] == mu.shape
    expected = f"an .npz with mu (f,) and sigma (f, f), finite, features (n, f) or none, at {path}"
    remedy = "take a reference file of NVlabs, guided-diffusion or this program"
    require(finite and square and rows, expected, got, remedy)
    return arrays


def _foreign(path: Path, arrays: dict[str, Any], extractor: Extractor) -> dict[str, Any]:
    """Return the protocol of a file of another program, and print a line about it."""
    size = len(arrays["mu"])
    expected = f"the 2048 features of Inception for {path}, which another program wrote"
    got = f"evaluation.extractor={extractor.name} and {size} features"
    remedy = "choose evaluation.extractor=inception, or another reference"
    require(extractor.name == INCEPTION and size == 2048, expected, got, remedy)
    spatial = ", mu_s and sigma_s (spatial features) are not used" if "mu_s" in arrays else ""
    program = "from another program, taken to be of the published Inception"
    print_once(f"{path.name}: {program}{spatial}")
    features = len(arrays.get("arr_0", ()))
    return {"file": path.name, "sha256": fingerprint(path), "features": features}


class FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' FID between the features of samples and the moments of a reference, summed in float64."""

    def __init__(self, reference: Reference) -> None:
        features = nn.Identity()
        features.num_features = len(reference.mu)  # type: ignore[assignment]
        super().__init__(feature=features)
        if rank_and_size()[0] == 0:  # states are summed over ranks
            # With an unknown number of images, any number gives the moments back.
            count = 2 if reference.count is None else reference.count
            mu, sigma = reference.mu, reference.sigma
            self.real_features_sum += count * mu
            self.real_features_cov_sum += (count - 1) * sigma + count * torch.outer(mu, mu)
            self.real_features_num_samples += count


def in_order(rows: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Join numbers, features and others of the batches of all ranks, in the order of the numbers. Collective."""
    own = [torch.cat(column).cpu() for column in zip(*rows, strict=True)]
    columns = [torch.cat(parts) for parts in zip(*gathered(own), strict=True)]
    order = columns[0].argsort()
    return [column[order] for column in columns]


def reference_of(
    source: Source,
    extractor: Extractor,
    *,
    name: str,
    most_features: int,
    cache: Path,
    batch_size: int,
    num_workers: int,
) -> Reference:
    """Return the reference of a data set, from `cache` or computed by all ranks and written there. Collective.

    name: train or held_out, for the protocol.
    most_features: number of images, evenly spread, whose features are stored.
    """
    count, fewest = len(source), max(2, rank_and_size()[1])
    expected = f"a reference of at least {fewest} images, one a process"
    require(count >= fewest, expected, count, "add images")
    stored = set(spread(count, most_features))
    described = {"set": name, "shape": list(source.image_shape), "images": count}
    described |= {} if source.latents is None else {"decoded": source.latents.protocol}
    described |= {"features": len(stored), "content": content_key(source)}
    protocol = {**extractor.protocol, "reference": described}
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:32]
    path = cache / f"{key}.npz"
    if all(gathered(os.path.isfile(path))):  # False also for a folder that may not be read
        return read_reference(path, extractor, protocol)
    images = images_of(source, batch_size, num_workers, "Reference", extractor.device)
    reference = Reference(*_statistics(images, count, extractor, stored), protocol)
    if rank_and_size()[0] == 0:
        try:
            reference.write(path)
            outcome = f"kept in {path}"
        except OSError as error:
            outcome = f"not kept for the next time: {error}"
        print_once(f"Reference of {count:,} images, {outcome}")
    return reference


def _statistics(
    images: Iterator[Numbered], count: int, extractor: Extractor, stored: set[int]
) -> tuple[Tensor, Tensor, int, Tensor]:
    """Return the statistics of `count` images on all ranks, with the features of those in `stored`. Collective."""
    summing = extractor.summing
    total = squares = torch.zeros((), dtype=torch.float64, device=summing)
    kept: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for numbers, batch in images:
            features = extractor(sent(batch, extractor.device)).features.to(summing)
            x = features.double()
            total, squares = total + x.sum(0), squares + x.T @ x
            rows = [row for row, number in enumerate(numbers) if number in stored]
            kept.append((torch.tensor(numbers)[rows], features[rows]))
        sums = zip(*gathered((total.cpu(), squares.cpu())), strict=True)
        total, squares = (torch.stack(parts).sum(0).to(summing) for parts in sums)
        mu = total / count
        sigma = (squares - count * torch.outer(mu, mu)) / (count - 1)
        return mu.cpu(), sigma.cpu(), count, in_order(kept)[1]


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `count`, evenly spread."""
    most = min(count, most)
    return [i * count // most for i in range(most)]


def images_of(
    source: Source, batch_size: int, num_workers: int, title: str, device: torch.device
) -> Iterator[Numbered]:
    """Yield this rank's share of the images of a source, on a device; latents are decoded there."""
    every, parts = range(len(source)), batches(len(source), batch_size)
    options = {"collate_fn": source.batch, "num_workers": num_workers}
    loader: Any = DataLoader(every, batch_sampler=parts, **options)  # type: ignore[arg-type]
    shown = tqdm(parts, desc=title, unit="batch", disable=rank_and_size()[0] > 0 or len(parts) < 2)
    for numbers, (items, _) in zip(shown, loader, strict=True):
        yield numbers, source.decoded(sent(items, device))


def content_key(source: Source) -> str:
    """Return a digest of a data set, the same for any number of ranks. Collective.

    It covers the pixels of up to `PIXELS` images, evenly spread, and the source's stamp of every image's file.
    """
    (rank, ranks), numbers = rank_and_size(), spread(len(source), PIXELS)
    own = {i: hashlib.sha256(source[i][0].numpy().tobytes()).digest() for i in numbers[rank::ranks]}
    digests = ChainMap(*gathered(own))
    whole = hashlib.sha256(str(len(source)).encode())
    for number in numbers:
        whole.update(digests[number])
    for number in range(len(source)):
        whole.update(hashlib.sha256(source.stamp(number)).digest())
    return whole.hexdigest()
