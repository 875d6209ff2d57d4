"""What samples are compared with: mean and covariance of a data set's features, and features themselves.

Computed once for a data set, resolution and extractor and kept in a file; read from files of other programs; written for
them. Each file of ours says what its numbers depend on, and is refused where that is not what is asked for.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from tqdm import tqdm

from consistency.data.module import WholeBatches
from consistency.data.source import Source
from consistency.errors import require
from consistency.evaluation.extractors import INCEPTION, Extractor
from consistency.runtime.ranks import batches, gathered, print_once, rank_and_size
from consistency.tensors import sent

PIXELS = 10_000
"""Images whose pixels enter the key of a data set; all that it knows of its files enter beside."""


@dataclass(frozen=True)
class Reference:
    """mu, sigma: mean and unbiased covariance of the features, float64; count: images they are of, None where a file does
    not say. features: of some of the images, in order, for the measures that need them; None where there are none.
    protocol: what the numbers depend on.
    """

    mu: Float[Tensor, "f"]
    sigma: Float[Tensor, "f f"]
    count: int | None
    features: Float[Tensor, "n f"] | None
    protocol: dict[str, Any]

    def write(self, path: Path) -> None:
        """As .npz: mu and sigma where NVlabs' and guided-diffusion's programs look for them, ours beside them."""
        arrays = {"mu": self.mu.numpy(), "sigma": self.sigma.numpy()}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        with unfinished.open("wb") as file:
            text = json.dumps({"count": self.count, **self.protocol})
            np.savez(file, allow_pickle=False, protocol=np.array(text), **arrays)
        unfinished.replace(path)


def read_reference(path: Path, extractor: Extractor) -> Reference:
    """Reads what `Reference.write`, NVlabs' or guided-diffusion's programs wrote.

    The latter two do not say what they measured with: they are taken to be of the published Inception, and images in the
    file (guided-diffusion's arr_0) serve the measures that need features. Raises `UserError` where the file is of another
    extractor or nothing of the kind.
    """
    require(
        path.is_file(),
        f"reference statistics at {path}, an .npz",
        "nothing there",
        "check the path, or leave evaluation.reference to the data set",
    )
    arrays, reason = {}, "arrays"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        reason = f"arrays {', '.join(arrays)}"
    except Exception as error:  # damaged and foreign files fail in any way
        reason = str(error)[:200]
    mu, sigma = arrays.get("mu"), arrays.get("sigma")
    square = (
        mu is not None
        and sigma is not None
        and mu.ndim == 1
        and sigma.shape == 2 * mu.shape
        and all(np.issubdtype(a.dtype, np.floating) and np.isfinite(a).all() for a in (mu, sigma))
    )
    require(
        bool(square),
        f"an .npz with mu (f,) and sigma (f, f), finite, at {path}",
        reason,
        "take a reference file of NVlabs, guided-diffusion or this program",
    )
    assert mu is not None and sigma is not None
    said = json.loads(str(arrays["protocol"])) if "protocol" in arrays else {}
    count, features = said.pop("count", None), arrays.get("features")
    if said:
        require_same(said, extractor.protocol, path)
    else:
        said = {**extractor.protocol, "reference": _foreign(path, arrays, extractor)}
    found = None if features is None else torch.from_numpy(features)
    if found is None and arrays.get("arr_0") is not None and arrays["arr_0"].ndim == 4:
        found = features_of(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), extractor)
    require(
        found is None or found.shape[1:] == mu.shape,
        f"features of {len(mu)} numbers, as mu has, in {path}",
        f"{tuple(() if found is None else found.shape)}",
        "choose the evaluation.extractor that the file was made with",
    )
    first, second = (torch.from_numpy(np.asarray(a, np.float64)) for a in (mu, sigma))
    return Reference(first, second, count, found, said)


def _foreign(path: Path, arrays: dict[str, Any], extractor: Extractor) -> dict[str, Any]:
    """What can be known of a file that another program wrote, and one line about it."""
    require(
        extractor.name == INCEPTION and len(arrays["mu"]) == 2048,
        f"the 2048 features of Inception for {path}, which another program wrote",
        f"evaluation.extractor={extractor.name} and {len(arrays['mu'])} features",
        "choose evaluation.extractor=inception, or another reference",
    )
    spatial = ", mu_s and sigma_s (spatial features) are not used" if "mu_s" in arrays else ""
    print_once(
        f"{path.name}: from another program, taken to be of the published Inception{spatial}"
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.name, "sha256": digest, "features": len(arrays.get("arr_0", ()))}


def require_same(said: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Refuses a reference that was measured in another way."""
    other = sorted(name for name in wanted if said.get(name) != wanted[name])
    require(
        not other,
        f"a reference with {', '.join(f'{n}={wanted[n]}' for n in other)}",
        f"{path} with {', '.join(f'{n}={said.get(n)}' for n in other)}",
        "measure with the extractor of the reference, or name another evaluation.reference",
    )


def features_of(images: UInt8[Tensor, "n c h w"], extractor: Extractor) -> Float[Tensor, "n f"]:
    """Features of images in memory."""
    with torch.inference_mode():
        parts = [extractor(part.to(extractor.device)).features.cpu() for part in images.split(64)]
    return torch.cat(parts)


# ------------------------------------------------------------------------ of a data set


class Moments(Metric):
    """Sum and sum of outer products of features, in float64, and the features of some images, over all ranks."""

    full_state_update = False
    total: Tensor
    outer: Tensor
    count: Tensor
    features: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("features", default=[], dist_reduce_fx="cat")
        self.add_state("numbers", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, numbers: Tensor, kept: Tensor) -> None:
        """Adds features of images number `numbers`; those that are `kept` stay."""
        double = features.double()
        self.total += double.sum(0)
        self.outer += double.T @ double
        self.count += len(features)
        self.features.append(features[kept])
        self.numbers.append(numbers[kept])

    def compute(self) -> tuple[Tensor, Tensor, int, Tensor]:
        """Mean, unbiased covariance, count, and the features that were kept in their order."""
        count, mu = int(self.count), self.total / self.count
        sigma = (self.outer - count * torch.outer(mu, mu)) / (count - 1)
        order = dim_zero_cat(self.numbers).argsort()
        return mu.cpu(), sigma.cpu(), count, dim_zero_cat(self.features)[order].cpu()


def reference_of(
    source: Source,
    extractor: Extractor,
    *,
    described: dict[str, Any],
    most_features: int,
    cache: Path,
    batch_size: int,
    num_workers: int,
) -> Reference:
    """The reference of a data set, from `cache` where it is there, else computed by all ranks together and left there.

    described: what its protocol says of the images; most_features: images, evenly spread, whose features are kept.
    """
    count, shape = len(source), tuple(source[0][0].shape)
    fewest = max(2, rank_and_size()[1])
    require(
        count >= fewest,
        f"a reference of at least {fewest} images, one a process",
        count,
        "add images",
    )
    kept = spread(count, most_features)
    reference = {**described, "shape": list(shape), "images": count, "features": len(kept),
                 "content": content_key(source)}  # fmt: skip
    protocol = {**extractor.protocol, "reference": reference}
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
    path = cache / f"{key[:32]}.npz"
    if all(gathered(os.path.isfile(path))):  # False also where the folder may not be read
        found = read_reference(path, extractor)
        require_same(found.protocol, protocol, path)
        return found
    device, summing = extractor.device, extractor.summing
    moments, chosen = None, set(kept)
    with torch.inference_mode():
        for numbers, images in images_of(source, batch_size, num_workers, "Reference"):
            features = extractor(sent(images, device)).features.to(summing)
            moments = moments or Moments(features.shape[1]).to(summing)
            flags = torch.tensor([number in chosen for number in numbers])
            moments.update(features, sent(torch.tensor(numbers), summing), sent(flags, summing))
        assert moments is not None
        mu, sigma, total, features = moments.compute()
    assert total == count and len(features) == len(kept)
    found = Reference(mu, sigma, count, features, protocol)
    if rank_and_size()[0] == 0:
        try:
            found.write(path)
            print_once(f"Reference of {count:,} images kept in {path}")
        except OSError as error:
            print_once(f"Reference of {count:,} images, not kept for the next time: {error}")
    return found


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    most = min(count, most)
    return [i * count // most for i in range(most)]


def images_of(
    source: Source, batch_size: int, num_workers: int, title: str
) -> Iterator[tuple[Sequence[int], UInt8[Tensor, "_b c h w"]]]:
    """This rank's share of a source: (numbers, images)."""
    parts = batches(len(source), batch_size)
    loader = DataLoader(
        WholeBatches(source),
        sampler=[list(part) for part in parts],
        batch_size=None,
        num_workers=num_workers,
    )
    images = (batch for batch, _ in loader)
    shown = tqdm(parts, desc=title, unit="batch", disable=rank_and_size()[0] > 0 or len(parts) < 2)
    yield from zip(shown, images, strict=True)


def content_key(source: Source) -> str:
    """A digest of what a data set holds: the pixels of up to 10,000 images, evenly spread, and what the source knows of
    every image's file. All ranks share the work; the result does not depend on their number.
    """
    rank, ranks = rank_and_size()
    pixels = spread(len(source), PIXELS)
    own = {i: hashlib.sha256(source[i][0].numpy().tobytes()).digest() for i in pixels[rank::ranks]}
    found: dict[int, bytes] = {}
    for part in gathered(own):
        found |= part
    whole = hashlib.sha256(str(len(source)).encode())
    for number in pixels:
        whole.update(found[number])
    for number in range(len(source)):
        if stamp := source.stamp(number):
            whole.update(hashlib.sha256(stamp).digest())
    return whole.hexdigest()
