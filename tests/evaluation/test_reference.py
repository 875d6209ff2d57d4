"""What samples are compared with: computed once, known again by its content, exchanged with other programs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from consistency.data.memory import InMemory
from consistency.errors import UserError
from consistency.evaluation.extractors import Extracted, Extractor
from consistency.evaluation.reference import read_reference, reference_of
from consistency.evaluation.results import INCEPTION

FEATURES = 2048


class Counting(nn.Module):
    """Features that are random sums of pixels; counts the images it saw."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(FEATURES, 3 * 4 * 4, generator=draw))
        self.seen = 0

    def forward(self, images: torch.Tensor) -> Extracted:
        self.seen += len(images)
        return Extracted(images.float().flatten(1) @ self.weight.T / 255, None)


def extractor_of(seed: int = 0, name: str = "counting") -> Extractor:
    def see(network: nn.Module, images: torch.Tensor) -> Extracted:
        seen: Extracted = network(images)
        return seen

    return Extractor(Counting(seed), see, name=name, resize="none")


def images(count: int = 30, seed: int = 1) -> InMemory:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 4, 4), generator=draw, dtype=torch.uint8)
    return InMemory(pixels, torch.zeros(count, dtype=torch.long))


def made(source: InMemory, extractor: Extractor, cache: Path, **given: Any) -> Any:
    settings = {"most_features": 12, "batch_size": 7, "num_workers": 0, "name": "train"}  # fmt: skip
    return reference_of(source, extractor, cache=cache, **(settings | given))


def test_it_is_mean_covariance_and_evenly_spread_features(tmp_path: Path) -> None:
    extractor, source = extractor_of(), images()
    found = made(source, extractor, tmp_path)
    x = extractor(source.images).features.double().numpy()
    np.testing.assert_allclose(found.mu.numpy(), x.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.sigma.numpy(), np.cov(x, rowvar=False), atol=1e-6)
    assert (found.count, len(found.features)) == (30, 12)
    kept = [i * 30 // 12 for i in range(12)]
    np.testing.assert_allclose(found.features.numpy(), x[kept], rtol=1e-5, atol=1e-5)


def test_it_is_computed_once_and_anew_where_anything_differs(tmp_path: Path) -> None:
    extractor, source = extractor_of(), images()
    first = made(source, extractor, tmp_path)
    assert extractor.network.seen == 30
    again = made(images(), extractor, tmp_path)
    assert extractor.network.seen == 30
    assert torch.equal(first.sigma, again.sigma)
    assert first.protocol == again.protocol
    one_pixel = images()
    one_pixel.images[17, 0, 0, 0] ^= 1
    for other in (one_pixel, images(29)):
        before = extractor.network.seen
        made(other, extractor, tmp_path)
        assert extractor.network.seen == before + len(other)
    other_weights = extractor_of(seed=1)
    made(source, other_weights, tmp_path)
    assert other_weights.network.seen == 30
    before = extractor.network.seen
    made(source, extractor, tmp_path, name="held_out")
    assert extractor.network.seen == before + 30


def test_what_is_written_is_read_back_and_is_what_nvlabs_programs_read(tmp_path: Path) -> None:
    extractor = extractor_of()
    found = made(images(), extractor, tmp_path)
    found.write(tmp_path / "out" / "ref.npz")
    again = read_reference(tmp_path / "out" / "ref.npz", extractor)
    assert torch.equal(found.mu, again.mu)
    assert torch.equal(found.features, again.features)
    assert (found.count, found.protocol) == (again.count, again.protocol)
    with np.load(tmp_path / "out" / "ref.npz") as file:
        assert file["mu"].shape == (FEATURES,)
        assert file["sigma"].shape == (FEATURES, FEATURES)
        assert file["mu"].dtype == file["sigma"].dtype == np.float64


def test_a_reference_of_another_extractor_is_an_error_that_names_the_difference(
    tmp_path: Path,
) -> None:
    made(images(), extractor_of(), tmp_path).write(tmp_path / "ref.npz")
    with pytest.raises(UserError, match="weights_sha256"):
        read_reference(tmp_path / "ref.npz", extractor_of(seed=1))
    with pytest.raises(UserError, match="extractor=other"):
        read_reference(tmp_path / "ref.npz", extractor_of(name="other"))


def test_a_cached_reference_that_says_something_else_is_an_error(tmp_path: Path) -> None:
    extractor = extractor_of()
    found = made(images(), extractor, tmp_path)
    (file,) = tmp_path.glob("*.npz")
    found.protocol["reference"]["images"] = 31
    found.write(file)
    with pytest.raises(UserError, match="reference="):
        made(images(), extractor, tmp_path)


def test_files_of_nvlabs_and_guided_diffusion_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extractor = extractor_of(name=INCEPTION)
    draw = np.random.RandomState(0)
    mu, sigma = draw.randn(FEATURES), np.eye(FEATURES)
    np.savez(tmp_path / "nvlabs.npz", mu=mu, sigma=sigma)
    found = read_reference(tmp_path / "nvlabs.npz", extractor)
    np.testing.assert_array_equal(found.mu.numpy(), mu)
    assert (found.count, found.features) == (None, None)
    assert "mu_s" not in capsys.readouterr().out
    pixels = images(15).images.permute(0, 2, 3, 1).numpy()
    np.savez(
        tmp_path / "guided.npz",
        mu=mu.astype(np.float32),
        sigma=sigma.astype(np.float32),
        mu_s=np.zeros(3),
        sigma_s=np.eye(3),
        arr_0=pixels,
    )
    found = read_reference(tmp_path / "guided.npz", extractor)
    assert "mu_s and sigma_s (spatial features) are not used" in capsys.readouterr().out
    torch.testing.assert_close(found.features, extractor(images(15).images).features)
    assert found.mu.dtype == torch.float64


BAD = {
    "no npz": b"mu and sigma",
    "empty": b"",
    "no sigma": {"mu": np.zeros(FEATURES)},
    "other sizes": {"mu": np.zeros(FEATURES), "sigma": np.eye(4)},
    "not finite": {"mu": np.full(FEATURES, np.nan), "sigma": np.eye(FEATURES)},
    "objects": {"mu": np.array([None]), "sigma": np.array([[None]])},
    "texts": {"mu": np.array(["a"]), "sigma": np.array([["a"]])},
    "other features": {"mu": np.zeros(64), "sigma": np.eye(64)},
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_of_something_else_is_one_message(name: str, tmp_path: Path) -> None:
    content, path = BAD[name], tmp_path / "ref.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(UserError, match="expected"):
        read_reference(path, extractor_of(name=INCEPTION))


def test_a_foreign_file_is_refused_for_other_features(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(FEATURES), sigma=np.eye(FEATURES))
    with pytest.raises(UserError, match="another program"):
        read_reference(tmp_path / "ref.npz", extractor_of())


def test_the_protocol_stands_in_the_file(tmp_path: Path) -> None:
    made(images(), extractor_of(), tmp_path)
    (file,) = tmp_path.glob("*.npz")
    with np.load(file) as arrays:
        said = json.loads(str(arrays["protocol"]))
    assert said["count"] == 30
    assert said["reference"]["shape"] == [3, 4, 4]
    assert {"extractor", "weights_sha256", "resize"} <= set(said)
