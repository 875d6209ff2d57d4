"""Every source reads the original file format, gives what is in the files, and says what is missing."""

import gzip
import hashlib
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

import originals
from analytic import Mixture as Law
from consistency.data.cifar10 import CIFAR10, read_batch
from consistency.data.crop import box, halving, lanczos
from consistency.data.digits import Digits
from consistency.data.huggingface import HuggingFace
from consistency.data.image_files import ImageFiles
from consistency.data.lsun import LSUN
from consistency.data.memory import load_into_memory
from consistency.data.mixture import Mixture
from consistency.data.mnist import MNIST, FashionMNIST
from consistency.data.source import Source
from consistency.data.zip_or_folder import Archive, Folder
from consistency.errors import UserError
from originals import encoded, noise


def all_of(source: Source) -> tuple[torch.Tensor, list[int]]:
    pairs = [source[i] for i in range(len(source))]
    return torch.stack([image for image, _ in pairs]), [label for _, label in pairs]


# ----------------------------------------------------------------------------------- CIFAR-10


def test_cifar_reads_the_original_batches_as_torchvision_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = originals.write_cifar(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    meta = pickle.dumps({"label_names": datasets.CIFAR10.meta and ["x"] * 10}, protocol=2)
    (folder / "batches.meta").write_bytes(meta)

    def listed(names: list[str]) -> list[list[str]]:
        return [[n, hashlib.md5((folder / n).read_bytes()).hexdigest()] for n in names]

    monkeypatch.setattr(
        datasets.CIFAR10, "train_list", listed([f"data_batch_{i}" for i in range(1, 6)])
    )
    monkeypatch.setattr(datasets.CIFAR10, "test_list", listed(["test_batch"]))
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", hashlib.md5(meta).hexdigest())
    for split, part in (("train", slice(0, 100)), ("test", slice(100, 120))):
        ours = CIFAR10(path=str(tmp_path), split=split)  # type: ignore[arg-type]
        theirs = datasets.CIFAR10(tmp_path, train=split == "train")
        assert np.array_equal(ours.images.permute(0, 2, 3, 1).numpy(), theirs.data)
        assert np.array_equal(ours.images.numpy(), images[part])
        assert ours.labels.tolist() == theirs.targets == labels[part]
    assert len(CIFAR10(path=str(folder), split="all")) == 120


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("key", [b"data", "data"])
def test_cifar_reads_batches_pickled_anew(protocol: int, key: Any, tmp_path: Path) -> None:
    rows = noise(7, 3072)
    batch = {key: rows, "labels": [1] * 7}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=protocol))
    images, labels = read_batch(tmp_path / "data_batch_1")
    assert np.array_equal(images.reshape(7, 3072).numpy(), rows)
    assert labels.tolist() == [1] * 7


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_a_batch_is_read_and_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    for protocol in (0, 2, 4):
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Trap(trap)}, protocol))
        with pytest.raises(UserError, match="data_batch_1"):
            CIFAR10(path=str(tmp_path), split="train")
    assert not trap.exists()


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_batch_is_named(seed: int, tmp_path: Path) -> None:
    whole = originals.cifar_batch(noise(3, 3072), [1, 2, 3])
    cut = int(np.random.default_rng(seed).integers(0, len(whole)))
    (tmp_path / "data_batch_1").write_bytes(whole[:cut])
    with pytest.raises(UserError, match="data_batch_1"):
        read_batch(tmp_path / "data_batch_1")


def test_labels_that_do_not_fit_the_images_of_a_batch_are_refused(tmp_path: Path) -> None:
    for labels in ([1, 2], [1, 2, 10], [1, 2, 3, 4]):
        (tmp_path / "b").write_bytes(originals.cifar_batch(noise(3, 3072), labels))
        with pytest.raises(UserError, match="batch of CIFAR-10"):
            read_batch(tmp_path / "b")


# -------------------------------------------------------------------------------------- MNIST


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_reads_idx_files_as_torchvision_does(packed: bool, tmp_path: Path) -> None:
    images, labels = originals.write_idx(tmp_path / "MNIST" / "raw", packed=packed)
    for split, part in (("train", slice(0, 30)), ("test", slice(30, 40)), ("all", slice(0, 40))):
        ours = MNIST(path=str(tmp_path), split=split)  # type: ignore[arg-type]
        assert np.array_equal(ours.images[:, 0].numpy(), images[part])
        assert ours.labels.tolist() == labels[part].tolist()
    if not packed:
        theirs = datasets.MNIST(tmp_path, train=True)
        assert torch.equal(MNIST(path=str(tmp_path), split="train").images[:, 0], theirs.data)


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    originals.write_idx(tmp_path)
    name = "train-labels-idx1-ubyte.gz"
    for content, reason in (
        (gzip.compress(originals.idx(np.zeros(29, np.uint8))), "30 images and 29 labels"),
        (gzip.compress(originals.idx(np.zeros(30, np.uint8))[:-1]), "29 bytes for shape"),
        (gzip.compress(originals.idx(np.zeros((30, 1), np.uint8))), "starts with 00000802"),
        (gzip.compress(originals.idx(np.zeros(30, np.uint8)))[:-9], "cannot be read"),
        (b"", "starts with nothing|cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=reason) as caught:
            MNIST(path=str(tmp_path), split="train")
        assert "train-" in str(caught.value)


@pytest.mark.parametrize("download", [True, False])
def test_what_is_not_there_is_named_with_its_place(
    download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:9/"
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [nowhere])
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{nowhere}cifar-10-python.tar.gz")
    root = tmp_path / "sets"
    for build, file in (
        (FashionMNIST, "FashionMNIST/raw/train-images-idx3-ubyte"),
        (CIFAR10, "cifar-10-batches-py/data_batch_1"),
    ):
        with pytest.raises(UserError) as caught:
            build(path=str(root), split="train", download=download)
        told = str(caught.value)
        assert f"{root}/{file}" in told
        assert nowhere in told
        assert ("download failed" in told) == download
        assert ("data.download=true" in told) or download
        assert len(told.splitlines()) == 3


# ------------------------------------------------------------------- NVlabs' form, LSUN, folders


def coloured(count: int, size: int = 8) -> tuple[np.ndarray[Any, Any], list[bytes]]:
    pixels = noise(count, size, size, 3)
    return pixels, [encoded(Image.fromarray(p)) for p in pixels]


@pytest.mark.parametrize("target", ["set.zip", "set"])
def test_dataset_tool_s_form_gives_images_by_name_and_labels_by_image(
    target: str, tmp_path: Path
) -> None:
    pixels, files = coloured(6)
    names = [f"0000{i % 2}/img{i:08d}.png" for i in range(6)]
    labels = [[name, i % 3] for i, name in enumerate(names)]
    originals.write_archive(
        tmp_path / target, list(zip(names, files, strict=True))[::-1], labels[::-1]
    )
    source = Archive(
        path=str(tmp_path / target), image_size=8, channels=3, classes=True, num_classes=3
    )
    order = sorted(range(6), key=lambda i: names[i])
    images, found = all_of(source)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels[order])
    assert found == [i % 3 for i in order]
    plain = Archive(path=str(tmp_path / target), image_size=8, channels=3, classes=False)
    assert all_of(plain)[1] == [0] * 6


def test_labels_null_is_a_set_without_classes(tmp_path: Path) -> None:
    _, files = coloured(2)
    originals.write_archive(tmp_path / "a.zip", [("x.png", files[0]), ("y.png", files[1])])
    assert len(Archive(path=str(tmp_path / "a.zip"), image_size=8, channels=3, classes=False)) == 2
    with pytest.raises(UserError, match=r"data\.source\.classes=false"):
        Archive(path=str(tmp_path / "a.zip"), image_size=8, channels=3, classes=True)


def three_sources(root: Path) -> list[ImageFiles]:
    """The same five images as folder, zip and LMDB."""
    _, files = coloured(5, 16)
    named = {f"{i}.png": file for i, file in enumerate(files)}
    originals.write_files(root / "folder", named)
    originals.write_archive(root / "set.zip", list(named.items()))
    originals.write_lmdb(root / "cat_train_lmdb", files)
    return [
        Folder(path=str(root / "folder"), image_size=8, channels=3, classes=False, crop=box),
        Archive(path=str(root / "set.zip"), image_size=8, channels=3, classes=False, crop=box),
        LSUN(path=str(root), category="cat", split="train", image_size=8),
    ]


def test_folder_zip_and_lmdb_agree_here_in_workers_and_in_memory(tmp_path: Path) -> None:
    """Handles opened here are not used by worker processes, and not sent to them."""
    first, _ = all_of(three_sources(tmp_path)[0])
    for source in three_sources(tmp_path):
        here, _ = all_of(source)
        assert torch.equal(here, first)
        copy = pickle.loads(pickle.dumps(source)) if not isinstance(source, LSUN) else source
        assert torch.equal(all_of(copy)[0], first)
        loader = DataLoader(source, batch_size=2, num_workers=2)  # type: ignore[arg-type]
        assert torch.equal(torch.cat([images for images, _ in loader]), first)
        held = load_into_memory(source)
        assert torch.equal(held.images, first)
        assert held.batch([3, 1])[0].equal(first[[3, 1]])


def test_what_is_held_already_is_not_copied() -> None:
    digits = Digits(split="train")
    assert load_into_memory(digits) is digits
    images, labels = digits.batch([5, 0])
    assert torch.equal(images, digits.images[[5, 0]])
    assert labels.tolist() == [digits[5][1], digits[0][1]]


def test_classes_and_their_number_must_agree(tmp_path: Path) -> None:
    _, files = coloured(3)
    originals.write_files(tmp_path, {"a/1.png": files[0], "b/1.png": files[1], "c/1.png": files[2]})
    settings: dict[str, Any] = {"path": str(tmp_path)}
    assert Folder(**{**settings, "num_classes": 3}, classes=True).labels.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"below data\.num_classes=2"):
        Folder(**{**settings, "num_classes": 2}, classes=True)
    with pytest.raises(UserError, match=r"data\.source\.classes=true"):
        Folder(**{**settings, "num_classes": 3}, classes=False)
    (tmp_path / "beside.png").write_bytes(files[0])
    with pytest.raises(UserError, match=r"beside\.png"):
        Folder(**settings, classes=True)


def test_each_published_crop_is_a_different_one_and_leaves_the_right_size_alone() -> None:
    picture = Image.fromarray(noise(40, 64, 3))
    results = {encoded(crop(picture, 16)) for crop in (halving, box, lanczos)}
    assert len(results) == 3
    square = Image.fromarray(noise(16, 16, 3))
    for crop in (halving, box, lanczos):
        assert crop(square, 16).tobytes() == square.tobytes()
        assert crop(picture, 16).size == (16, 16)


def test_the_box_crop_of_a_whole_factor_is_the_mean_of_the_centre() -> None:
    pixels = noise(32, 40)
    found = np.asarray(box(Image.fromarray(pixels), 16)).astype(float)
    exact = pixels[:, 4:36].reshape(16, 2, 16, 2).mean((1, 3))
    # it works on rows and columns in turn, and rounds after each
    assert float(np.abs(found - exact).max()) <= 1


def test_the_halving_crop_is_the_published_function() -> None:
    """guided-diffusion's steps, written as arrays: whole box means while twice too large, bicubic, centre."""
    pixels = noise(70, 97, 3)
    found = np.asarray(halving(Image.fromarray(pixels), 16)).astype(int)
    halves = Image.fromarray(pixels)
    for size in ((48, 35), (24, 17)):
        halves = halves.resize(size, Image.Resampling.BOX)
    scaled = halves.resize((round(24 * 16 / 17), 16), Image.Resampling.BICUBIC)
    left = (scaled.width - 16) // 2
    assert np.array_equal(found, np.asarray(scaled).astype(int)[:, left : left + 16])


# ----------------------------------------------------------------------------- toys and the hub


def test_the_mixture_follows_its_law() -> None:
    weights, means, stds = [0.5, 0.3, 0.2], [-0.6, 0.2, 0.7], [0.10, 0.15, 0.08]
    source = Mixture(size=4000, image_size=4, weights=weights, means=means, stds=stds, seed=0)
    law = Law(*(torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds)))
    x_0 = source.images.double() / 127.5 - 1
    for point in (-0.7, -0.5, 0.0, 0.2, 0.5, 0.7):
        exact = float(law.cdf(torch.tensor([point], dtype=torch.float64), torch.zeros(1)))
        assert abs(float((x_0 <= point).double().mean()) - exact) < 0.01
    assert abs(float(x_0.std()) - law.std) < 0.01
    again = Mixture(size=4000, image_size=4, weights=weights, means=means, stds=stds, seed=0)
    assert torch.equal(source.images, again.images)
    with pytest.raises(UserError, match="within"):
        Mixture(size=4, image_size=4, weights=[1.0], means=[0.9], stds=[0.2], seed=0)


def test_a_set_of_the_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="huggingface"):
        HuggingFace(name="x", split="train", classes=False)


class Table:
    """The part of a `datasets.Dataset` that is used."""

    _fingerprint = "f"

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: Any) -> Any:
        return (
            self.columns[key]
            if isinstance(key, str)
            else {n: c[key] for n, c in self.columns.items()}
        )

    def select_columns(self, names: list[str]) -> "Table":
        return Table({n: self.columns[n] for n in names}, self.features)

    def cast_column(self, name: str, feature: Any) -> "Table":
        assert feature.decode is False
        return self


class Picture:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class Names:
    names = ("cat", "dog")


def test_a_set_of_the_hub_is_read_by_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, files = coloured(3)
    (tmp_path / "2.png").write_bytes(files[2])
    stored = [{"bytes": file, "path": None} for file in files[:2]]
    stored += [{"bytes": None, "path": str(tmp_path / "2.png")}]
    table = Table({"img": stored, "label": [1, 0, 1]}, {"img": Picture(), "label": Names()})
    asked: list[Any] = []

    def load(*arguments: Any, **named: Any) -> Table:
        asked.append((arguments, named))
        if arguments[0] == "absent":
            raise ConnectionError("no route to the hub")
        return table

    stub: Any = ModuleType("datasets")
    stub.load_dataset, stub.Image, stub.ClassLabel = load, Picture, Names
    monkeypatch.setitem(sys.modules, "datasets", stub)
    settings: dict[str, Any] = {"num_classes": 2}
    source = HuggingFace(name="pets", split="train", subset="small", **settings, classes=True)
    assert asked == [(("pets", "small"), {"split": "train", "cache_dir": None})]
    images, labels = all_of(source)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    assert labels == [1, 0, 1]
    assert source.class_names == ["cat", "dog"]
    with pytest.raises(UserError, match="no route to the hub"):
        HuggingFace(name="absent", split="train", classes=False)
    with pytest.raises(UserError, match=r"data\.source\.images"):
        HuggingFace(name="pets", split="train", images="photo", classes=False)
