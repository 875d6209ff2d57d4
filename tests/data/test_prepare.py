"""prepare.py: any source becomes one zip, the same bytes however often it is stopped, and nothing is mixed silently."""

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import originals
from conftest import ROOT, Run
from consistency.commands import prepare
from consistency.data import chunks
from consistency.data.crop import box
from consistency.data.shards import Stream
from consistency.data.zip_or_folder import Archive, Folder
from consistency.runtime.files import part_path
from originals import encoded, noise

FASHION = Path("/usr/share/datasets/fashion-mnist")
real = pytest.mark.skipif(
    not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 4)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content(file: Path) -> tuple[list[np.ndarray[Any, Any]], Any]:
    """The images in order and the labels of a zip, read with the standard library and Pillow alone."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name != "dataset.json"]
        assert all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
        labels = json.loads(archive.read("dataset.json"))["labels"]
    assert names == [f"00000/img{i:08d}.png" for i in range(len(names))]
    assert labels is None or [name for name, _ in labels] == names
    return images, labels and [label for _, label in labels]


def colours(count: int, size: int = 8) -> dict[str, bytes]:
    return {
        f"{i:03d}.png": encoded(Image.fromarray(noise(size, size, 3, seed=i))) for i in range(count)
    }


# ------------------------------------------------------------------------------- every source


def test_idx_files(verb: Run, tmp_path: Path) -> None:
    images, labels = originals.write_idx(tmp_path / "raw")
    done = verb(
        "prepare", f"source={tmp_path / 'raw'}", "split=all", f"output={tmp_path / 'a.zip'}"
    )
    assert done.status == 0, done.err
    found, classes = content(tmp_path / "a.zip")
    assert np.array_equal(np.stack(found), images)
    assert classes == labels.tolist()
    for line in ("40, left out 0", "28x28, grey", "10, of 4 to 4 images", f"{images.mean():.2f}"):
        assert line in done.out
    assert "data.num_classes=10" in done.out


def test_cifar_batches(verb: Run, tmp_path: Path) -> None:
    images, labels = originals.write_cifar(tmp_path, per_batch=3)
    done = verb("prepare", f"source={tmp_path}", f"output={tmp_path / 'a.zip'}")
    assert done.status == 0, done.err
    found, classes = content(tmp_path / "a.zip")
    assert np.array_equal(np.stack(found), images[:15].transpose(0, 2, 3, 1))
    assert classes == labels[:15]
    means = " ".join(f"{mean:.2f}" for mean in images[:15].mean((0, 2, 3)))
    assert means in done.out


def test_lsun_as_published(verb: Run, tmp_path: Path) -> None:
    pictures = [Image.fromarray(noise(32, 40, 3, seed=i)) for i in range(6)]
    originals.write_lmdb(
        tmp_path / "cat_train_lmdb", [encoded(p, "JPEG", quality=95) for p in pictures]
    )
    source = f"source={tmp_path / 'cat_train_lmdb'}"
    done = verb("prepare", source, "crop=box", "resolution=16", f"output={tmp_path / 'a.zip'}")
    assert done.status == 0, done.err
    found, classes = content(tmp_path / "a.zip")
    decoded = [Image.open(io.BytesIO(encoded(p, "JPEG", quality=95))) for p in pictures]
    assert np.array_equal(np.stack(found), np.stack([np.asarray(box(d, 16)) for d in decoded]))
    assert classes is None


def test_class_folders_and_back_from_the_zip_and_the_unpacked_folder(
    verb: Run, tmp_path: Path
) -> None:
    files = list(colours(10).values())
    originals.write_files(
        tmp_path / "set", {f"{'ab'[i % 2]}/{i}.png": f for i, f in enumerate(files)}
    )
    options = ["classes=true", "resolution=4"]
    first, again, third = (tmp_path / name for name in ("1.zip", "2.zip", "3.zip"))
    assert verb("prepare", f"source={tmp_path / 'set'}", *options, f"output={first}").status == 0
    images, classes = content(first)
    assert classes == [0] * 5 + [1] * 5
    with zipfile.ZipFile(first) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert verb("prepare", f"source={first}", f"output={again}").status == 0
    assert verb("prepare", f"source={tmp_path / 'unpacked'}", f"output={third}").status == 0
    for other in (again, third):
        assert np.array_equal(np.stack(content(other)[0]), np.stack(images))
        assert content(other)[1] == classes


def test_what_was_prepared_trains(verb: Run, tmp_path: Path) -> None:
    originals.write_idx(tmp_path / "raw")
    made = verb(
        "prepare", f"source={tmp_path / 'raw'}", "resolution=8", f"output={tmp_path / 'a.zip'}"
    )
    told = next(line for line in made.out.splitlines() if line.startswith("train on it"))
    options = told.split("src/train.py ")[1].split()
    tiny = ["logger=csv", "trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.log_every_n_steps=1",
            "data.batch_size=4", "data.num_workers=0", "callbacks.samples.num_samples=4",
            "model.network.channel_mult=[1,2]", "model.network.num_groups=4",
            "model.network.model_channels=8", "model.network.num_head_channels=8"]  # fmt: skip
    done = verb("train", *options, *tiny, f"output={tmp_path / 'run'}")
    assert done.status == 0, done.err


# ------------------------------------------------------------------- stopped, repeated, changed


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals.write_files(tmp_path / "set", colours(30))
    source = f"source={tmp_path / 'set'}"
    whole, stopped = tmp_path / "whole.zip", tmp_path / "stopped.zip"
    assert verb("prepare", source, f"output={whole}").status == 0
    write, made = prepare.ZipWriter.write, []

    def break_off(self: prepare.ZipWriter, span: range, file: Path) -> None:
        if len(made) == 3:
            part_path(file).write_bytes(b"half a chunk")
            raise KeyboardInterrupt
        made.append(file)
        write(self, span, file)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.ZipWriter, "write", break_off)
        with pytest.raises(KeyboardInterrupt):
            verb("prepare", source, "num_workers=1", f"output={stopped}")
    assert not stopped.exists()
    done = verb("prepare", source, "num_workers=1", f"output={stopped}")
    assert done.status == 0, done.err
    assert "12 images are done already" in done.out
    assert digest(stopped) == digest(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "set", "stopped.zip", "whole.zip"]


@pytest.mark.slow
def test_shards_of_a_folder_of_classes(process: Run, tmp_path: Path) -> None:
    """Every image and class once, in the mixed order of shards; what is printed trains; run again, nothing is done."""
    pytest.importorskip("litdata")
    originals.write_files(
        tmp_path / "set",
        {f"{'ab'[n % 2]}/{name}": data for n, (name, data) in enumerate(colours(14).items())},
    )
    options = [
        f"source={tmp_path / 'set'}",
        "classes=true",
        "to=shards",
        f"output={tmp_path / 'shards'}",
    ]
    done = process("prepare", *options)
    assert done.status == 0, done.err
    assert not list(tmp_path.glob(".shards.parts"))
    source = Folder(path=str(tmp_path / "set"), classes=True)
    found = Stream(path=str(tmp_path / "shards"), mixing=2, cache=None, cache_gigabytes=1.0)
    expected = sorted(
        (image.numpy().tobytes(), label) for image, label in map(source.__getitem__, range(14))
    )
    assert (
        sorted((i.numpy().tobytes(), label) for i, label in map(found.__getitem__, range(14)))
        == expected
    )
    assert "data=stream" in done.out
    assert "data.num_classes=2" in done.out
    again = process("prepare", *options)
    assert again.status == 0, again.err
    assert "nothing to do" in again.out


@pytest.mark.slow
def test_processes_do_not_change_the_bytes(verb: Run, tmp_path: Path) -> None:
    originals.write_files(tmp_path / "set", colours(10) | {"bad.png": b"bad"})
    for workers in (1, 2):
        output = tmp_path / f"{workers}.zip"
        done = verb("prepare", f"source={tmp_path / 'set'}", "on_bad=skip", f"num_workers={workers}",
                    f"output={output}")  # fmt: skip
        assert done.status == 0, done.err
    assert digest(tmp_path / "1.zip") == digest(tmp_path / "2.zip")


def test_done_is_done_and_something_else_is_not_overwritten(verb: Run, tmp_path: Path) -> None:
    originals.write_files(tmp_path / "set", colours(6))
    source, target = f"source={tmp_path / 'set'}", tmp_path / "deep" / "a.zip"
    first = verb("prepare", source, f"output={target}")
    before = target.stat()
    second = verb("prepare", source, f"output={target}")
    assert (first.status, second.status) == (0, 0)
    assert "nothing to do" in second.out
    assert first.out.splitlines()[1:] == second.out.splitlines()[2:]
    assert target.stat().st_mtime_ns == before.st_mtime_ns
    for change in ("resolution=4", "channels=1", "crop=box"):
        done = verb("prepare", source, change, f"output={target}")
        assert done.status == 2
        assert "choose another output=" in done.err
    time.sleep(0.01)
    originals.write_files(tmp_path / "set", {"001.png": colours(9)["008.png"]})
    assert verb("prepare", source, f"output={target}").status == 2
    target.write_bytes(b"a file of someone")
    assert verb("prepare", source, f"output={target}").status == 2
    assert target.read_bytes() == b"a file of someone"


# ------------------------------------------------------------------------- mixtures and the bad


@pytest.mark.slow
def test_sizes_and_modes_are_not_mixed_silently(verb: Run, tmp_path: Path) -> None:
    grey = encoded(Image.fromarray(noise(8, 8)))
    cases = {
        "size": (colours(5) | {"x.png": encoded(Image.fromarray(noise(9, 9, 3)))}, "9x9 RGB"),
        "mode": (colours(5) | {"x.png": grey}, "8x8 grey"),
        "shape": (colours(5) | {"x.png": encoded(Image.fromarray(noise(8, 9, 3)))}, "9x8 RGB"),
    }
    for name, (files, got) in cases.items():
        originals.write_files(tmp_path / name, files)
        options = [f"source={tmp_path / name}", f"output={tmp_path / f'{name}.zip'}"]
        done = verb("prepare", *options)
        assert done.status == 2
        assert f"{name}/x.png" in done.err
        assert got in done.err
        assert not (tmp_path / f"{name}.zip").exists()
        assert verb("prepare", *options, "resolution=8", "channels=3").status == 0
        assert len(content(tmp_path / f"{name}.zip")[0]) == 6


def test_all_bad_images_are_listed_before_it_stops(verb: Run, tmp_path: Path) -> None:
    bad = {"004.png": b"", "011.png": b"text", "notes.txt": b"x"}
    originals.write_files(tmp_path / "set", colours(14) | bad)
    options = [f"source={tmp_path / 'set'}", f"output={tmp_path / 'a.zip'}"]
    done = verb("prepare", *options)
    assert done.status == 2
    assert "2 of 14 images cannot be used" in done.out
    for name, reason in (("004.png", "0 bytes"), ("011.png", "damaged")):
        assert any(name in line and reason in line for line in done.out.splitlines())
    assert "files of other types: 1 .txt" in done.out
    assert not (tmp_path / "a.zip").exists()
    done = verb("prepare", *options, "on_bad=skip")
    assert done.status == 0
    assert "12, left out 2" in done.out
    assert len(content(tmp_path / "a.zip")[0]) == 12


def test_a_mended_image_is_taken_up_when_it_goes_on(verb: Run, tmp_path: Path) -> None:
    originals.write_files(tmp_path / "set", colours(14) | {"004.png": b""})
    options = [f"source={tmp_path / 'set'}", f"output={tmp_path / 'a.zip'}"]
    assert verb("prepare", *options).status == 2
    originals.write_files(tmp_path / "set", {"004.png": colours(14)["004.png"]})
    done = verb("prepare", *options)
    assert "10 images are done already" in done.out
    assert len(content(tmp_path / "a.zip")[0]) == 14


@pytest.mark.parametrize(("change", "said"), [
    ("source=/nowhere", "missing"), ("to=tar", "to= among"), ("to=shards", "a folder at output="), ("output=a", r"a file \*\.zip"),
    ("resolution=0", "at least 1 pixel"), ("channels=2", "channels=1, 3 or null"), ("on_bad=drop", "on_bad=stop or skip"),
    ("num_workers=0", "num_workers"), ("split=dev", "split"), ("resolutoin=3", "resolutoin"),
])  # fmt: skip
def test_wrong_options_are_told(change: str, said: str, verb: Run, tmp_path: Path) -> None:
    originals.write_idx(tmp_path / "raw")
    options = {"source": str(tmp_path / "raw"), "output": str(tmp_path / "a.zip")}
    options |= dict([change.split("=")])
    done = verb("prepare", *(f"{key}={value}" for key, value in options.items()))
    assert done.status == 2
    assert "Traceback" not in done.err
    assert said.replace("\\", "") in done.err


# ------------------------------------------------------------------ Fashion-MNIST, 70,000 images


@real
@pytest.mark.slow
def test_fashion_mnist_from_its_files(process: Run, tmp_path: Path) -> None:
    """Count, histogram and mean of the zip, against the IDX files read here byte by byte."""
    done = process("prepare", f"source={FASHION}", "split=all", f"output={tmp_path / 'f.zip'}")
    assert done.status == 0, done.err
    images, labels = content_of_many(tmp_path / "f.zip")
    raw = {name: gzip.decompress((FASHION / f"{name}-ubyte.gz").read_bytes()) for name in (
        "train-images-idx3", "t10k-images-idx3", "train-labels-idx1", "t10k-labels-idx1")}  # fmt: skip
    pixels = b"".join(raw[f"{part}-images-idx3"][16:] for part in ("train", "t10k"))
    classes = b"".join(raw[f"{part}-labels-idx1"][8:] for part in ("train", "t10k"))
    assert images.shape == (70_000, 28, 28)
    assert images.tobytes() == pixels
    assert labels == list(classes)
    assert np.bincount(labels).tolist() == [7_000] * 10
    assert abs(float(images[:60_000].mean()) / 255 - 0.2860) < 5e-5
    assert "70,000, left out 0" in done.out
    assert f"{images.mean():.2f}" in done.out
    source = Archive(
        path=str(tmp_path / "f.zip"), image_size=28, channels=1, classes=True, num_classes=10
    )
    assert len(source) == 70_000
    assert source[69_999][0].numpy().tobytes() == images[-1].tobytes()


def content_of_many(file: Path) -> tuple[np.ndarray[Any, Any], list[int]]:
    with zipfile.ZipFile(file) as archive:
        labels = json.loads(archive.read("dataset.json"))["labels"]
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name, _ in labels]
    return np.stack(images), [label for _, label in labels]


@real
@pytest.mark.slow
def test_fashion_mnist_killed_half_way_and_run_again(process: Run, tmp_path: Path) -> None:
    options = [f"source={FASHION}", "resolution=32", "num_workers=2"]
    killed, whole = tmp_path / "killed.zip", tmp_path / "whole.zip"
    command = [sys.executable, str(ROOT / "src" / "prepare.py"), *options, f"output={killed}"]
    running = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    parts = tmp_path / ".killed.zip.parts"
    until = time.monotonic() + 400  # on a busy machine the beginning alone takes minutes
    while len(list(parts.glob("*.zip"))) < 20 and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    there = len(list(parts.glob("*.zip")))
    assert 20 <= there < 120
    assert not killed.exists()
    done = process("prepare", *options, f"output={killed}")
    assert done.status == 0, done.err
    assert f"{there * 500:,} images are done already" in done.out
    assert process("prepare", *options, f"output={whole}").status == 0
    assert digest(killed) == digest(whole)
    assert not parts.exists()
    assert "nothing to do" in process("prepare", *options, f"output={killed}").out


@real
@pytest.mark.slow
def test_fashion_mnist_trains(process: Run, tmp_path: Path) -> None:
    options = ["data=fashion_mnist", f"data.path={FASHION}", "mode=ect", "logger=csv", "trainer.max_steps=30",
               "data.batch_size=64", "trainer.accelerator=cpu", "callbacks.samples.num_samples=10"]  # fmt: skip
    done = process("train", *options, f"output={tmp_path / 'run'}")
    assert done.status == 0, done.err
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
