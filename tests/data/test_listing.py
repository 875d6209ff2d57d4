"""Folders and zips as people have them: what is an image and a class, what is passed over, and that it is said."""

import json
import os
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import originals
from conftest import TINY, Run
from consistency.commands.prepare import detect_source
from consistency.data.image_files import ImageFiles
from consistency.data.zip_or_folder import Archive, Folder
from consistency.errors import UserError
from originals import encoded, noise

Told = pytest.CaptureFixture[str]


def png(seed: int = 0) -> bytes:
    return encoded(Image.fromarray(noise(8, 8, 3, seed=seed)))


def pets(root: Path, *names: str) -> Path:
    originals.write_files(root, {name: png(seed) for seed, name in enumerate(names)})
    return root


def folder(path: Path, classes: bool = True, **settings: Any) -> Folder:
    return Folder(path=str(path), classes=classes, **settings)


def prepared(path: Path, classes: bool = True) -> Any:
    return detect_source(str(path), split="train", classes=classes)


def per_class(source: ImageFiles) -> dict[str, int]:
    return {source.class_names[n]: count for n, count in Counter(source.labels.tolist()).items()}


CLASSES = ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")

# ------------------------------------------------------------------------------------ hidden


@pytest.mark.parametrize("name", [
    ".ipynb_checkpoints", ".git", ".thumbnails", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information",
])  # fmt: skip
@pytest.mark.parametrize("inside", ["", "cat/"])
def test_folders_of_systems_are_no_classes(
    name: str, inside: str, tmp_path: Path, capsys: Told
) -> None:
    pets(tmp_path, *CLASSES, f"{inside}{name}/0-checkpoint.png")
    for reader in (folder, prepared):
        assert per_class(reader(tmp_path)) == {"cat": 2, "dog": 2}
        line = next(line for line in capsys.readouterr().out.splitlines() if "Ignored" in line)
        assert f"1 hidden files and folders: 1 {name}" in line


def test_hidden_files_are_no_images_though_the_folder_itself_may_be_hidden(
    tmp_path: Path, capsys: Told
) -> None:
    place = pets(tmp_path / ".sets" / ".mine", "0.png", "._0.png", ".1.png")
    originals.write_files(place, {"Thumbs.db": b"x", "desktop.ini": b"x", ".DS_Store": b"x"})
    assert folder(place, classes=False).names == ["0.png"]
    assert "5 hidden files and folders" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- links


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    store, place = pets(tmp_path / "store", *CLASSES), tmp_path / "set"
    shutil.copytree(store / "dog", place / "dog")
    os.symlink(store / "cat", place / "cat")
    assert per_class(folder(place)) == {"cat": 2, "dog": 2}
    assert len(folder(place, classes=False)) == 4
    linked = tmp_path / "linked"
    linked.mkdir()
    os.symlink(place, linked / "all")
    os.symlink(store / "cat" / "0.png", linked / "one.png")
    os.symlink(store / "dog" / "0.png", linked / "without_suffix")
    assert len(folder(linked, classes=False)) == 5  # cat/0.png is there through the folder


def test_a_loop_of_links_ends_and_each_file_is_taken_once(tmp_path: Path, capsys: Told) -> None:
    pets(tmp_path, *CLASSES)
    os.symlink("..", tmp_path / "cat" / "up")
    os.symlink(".", tmp_path / "self")
    os.symlink("../dog", tmp_path / "cat" / "dog")
    os.symlink("../cat", tmp_path / "dog" / "cat")
    assert len(folder(tmp_path, classes=False)) == 4
    assert "4 links to files listed already" in capsys.readouterr().out
    assert per_class(folder(tmp_path)) == {"cat": 4, "dog": 4}


def test_a_class_that_is_a_link_to_another_is_a_class(tmp_path: Path) -> None:
    pets(tmp_path, *CLASSES)
    os.symlink("cat", tmp_path / "kitty")
    (tmp_path / "pup").mkdir()
    os.symlink("../dog/0.png", tmp_path / "pup" / "0.png")
    assert per_class(folder(tmp_path)) == {"cat": 2, "dog": 2, "kitty": 2, "pup": 1}


def test_broken_links_are_named_and_a_class_is_not_lost_by_one(
    tmp_path: Path, capsys: Told
) -> None:
    pets(tmp_path, *CLASSES)
    os.symlink("nowhere.png", tmp_path / "cat" / "2.png")
    assert len(folder(tmp_path)) == 4
    assert "1 links or folders that cannot be followed: cat/2.png" in capsys.readouterr().out
    os.symlink("nowhere", tmp_path / "bird")
    with pytest.raises(UserError, match="bird"):
        folder(tmp_path)


# --------------------------------------------------------------------------- classes without images


@pytest.mark.parametrize("read", [folder, prepared])
def test_a_class_folder_without_images_is_an_error_with_what_is_in_it(
    read: Any, tmp_path: Path
) -> None:
    pets(tmp_path, *CLASSES)
    (tmp_path / "cow").mkdir()
    with pytest.raises(UserError, match=r"cow \(empty\)"):
        read(tmp_path)
    originals.write_files(
        tmp_path, {"cow/1.heic": b"x", "cow/deep/2.heic": b"x", "cow/a.mp4": b"x"}
    )
    with pytest.raises(UserError, match=r"cow \(2 \.heic, 1 \.mp4\)"):
        read(tmp_path)


def test_fewer_classes_than_the_model_is_told_are_said(tmp_path: Path, capsys: Told) -> None:
    folder(pets(tmp_path, *CLASSES), num_classes=3)
    assert "data.num_classes=3" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- types


def test_every_suffix_of_a_format_that_is_read_is_an_image(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(8, 8, 3))
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "jif": "JPEG", "pjpeg": "JPEG", "JPG": "JPEG", "Jfif": "JPEG", "tif": "TIFF",
             "dib": "DIB", "pnm": "PPM", "apng": "PNG", "webp": "WEBP", "jp2": "JPEG2000", "avif": "AVIF"}  # fmt: skip
    for suffix, kind in kinds.items():
        (tmp_path / f"a.{suffix}").write_bytes(encoded(picture, kind))
    source = folder(tmp_path, classes=False, channels=3)
    assert len(source) == len(kinds)
    for index in range(len(source)):
        assert source[index][0].shape == (3, 8, 8)


def test_an_image_is_known_by_its_content_under_any_name(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(8, 8, 3))
    names = {"image": "PNG", "download.php": "JPEG", "photo.jpg": "WEBP", "0001.img": "GIF", "bitmap": "BMP", "t": "TIFF"}  # fmt: skip
    files = {name: encoded(picture, kind) for name, kind in names.items()}
    originals.write_files(tmp_path / "set", files)
    others = {"README": b"BM is a format", "P6": b"P6 is one too", "x.dng": files["t"], "a.png~": files["image"]}  # fmt: skip
    originals.write_files(tmp_path / "set", others)
    originals.write_archive(tmp_path / "set.zip", list({**files, **others}.items()))
    for source in (folder(tmp_path / "set", classes=False), prepared(tmp_path / "set.zip", False)):
        assert source.names == sorted(names)
        assert all(source[index][0].shape == (3, 8, 8) for index in range(len(source)))


def test_what_is_not_taken_is_said_when_a_run_starts(verb: Run, tmp_path: Path) -> None:
    place = pets(tmp_path / "set", *(f"{n}.png" for n in range(8)))
    others = {"a.heic": b"x", "b.svg": b"x", "c.txt": b"x", "d.txt": b"x", ".DS_Store": b"x"}
    originals.write_files(place, others)
    done = verb("train", "data=folder", f"data.path={place}", "data.image_size=8", "data.num_workers=0",
                "trainer.max_steps=1", *TINY, f"output={tmp_path / 'run'}")  # fmt: skip
    assert done.status == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("Ignored")]
    assert len(lines) == 1
    for part in ("2 .txt, 1 .heic, 1 .svg", ".heic, .svg are pictures that cannot be read", "1 .DS_Store"):  # fmt: skip
        assert part in lines[0]


# ---------------------------------------------------------------------------------------- zips


def write_zip(path: Path, *names: str, labels: dict[str, Any] | None = None) -> Path:
    """A zip with an image for every name that is none of a folder or a hidden file, and tables of labels."""
    with zipfile.ZipFile(path, "w") as archive:
        for seed, name in enumerate(names):
            real = not name.endswith(("/", "\\")) and "._" not in name
            archive.writestr(name, png(seed) if real else b"")
        for name, table in (labels or {}).items():
            archive.writestr(name, json.dumps({"labels": table}))
    return path


def archive(path: Path, classes: bool | None = True, **settings: Any) -> Archive:
    return Archive(path=str(path), classes=classes, **settings)


LAYOUTS = {
    "classes": ("cat/0.png", "dog/0.png"),
    "one folder above": ("pets/cat/0.png", "pets/dog/0.png"),
    "two folders above": ("my/pets/cat/0.png", "my/pets/dog/deep/0.png"),
    "with its folders": ("pets/", "pets/cat/", "pets/dog/", "pets/cat/0.png", "pets/dog/0.png"),
    "of Windows": ("pets\\cat\\0.png", "pets\\dog\\0.png"),
    "of the present folder": ("./cat/0.png", "./dog/0.png"),
    "of macOS": ("pets/cat/0.png", "__MACOSX/pets/cat/._0.png", "pets/dog/0.png", "pets/._x.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_folders_in_a_zip_are_its_classes(layout: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", *LAYOUTS[layout])
    for source in (archive(path, num_classes=2), prepared(path)):
        assert per_class(source) == {"cat": 1, "dog": 1}
        assert source[1][0].shape == (3, 8, 8)
    assert len(prepared(path, classes=False)) == 2
    if "\\" not in LAYOUTS[layout][0]:
        with zipfile.ZipFile(path) as whole:
            whole.extractall(tmp_path / "unpacked")
        for source in (folder(tmp_path / "unpacked"), archive(tmp_path / "unpacked")):
            assert per_class(source) == {"cat": 1, "dog": 1}


@pytest.mark.parametrize("above", ["", "cifar/", "a/b/"])
def test_labels_are_found_below_one_folder(above: str, tmp_path: Path) -> None:
    names = [f"00000/img{i:08d}.png" for i in range(4)]
    table = [[name.replace("/", "\\" if i == 3 else "/"), i % 2] for i, name in enumerate(names)]
    path = write_zip(tmp_path / "set.zip", *(above + n for n in names), labels={f"{above}dataset.json": table})  # fmt: skip
    with zipfile.ZipFile(path) as whole:
        whole.extractall(tmp_path / "set")
    for place in (path, tmp_path / "set"):
        for source in (archive(place), prepared(place), prepared(place, classes=False)):
            assert source.labels.tolist() == [0, 1, 0, 1]


def test_labels_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    names = ["00000/img00000000.png", "00000/img00000001.png"]
    vectors = [[name, [0.1, 0.5]] for name in names]
    path = write_zip(tmp_path / "vec.zip", *names, labels={"dataset.json": vectors})
    for classes in (True, False):
        with pytest.raises(UserError, match=r"vector of 2 numbers, \[0\.1, 0\.5\]"):
            prepared(path, classes)
    assert len(archive(path, classes=False)) == 2
    two = {f"{part}/dataset.json": [["0.png", 0]] for part in ("a", "b")}
    with pytest.raises(UserError, match=r"a/dataset\.json, b/dataset\.json"):
        archive(write_zip(tmp_path / "two.zip", "a/0.png", "b/0.png", labels=two))
    beside = {"a/dataset.json": [["0.png", 0]]}
    with pytest.raises(UserError, match=r"1 images without a label \['b/0\.png'\]"):
        archive(write_zip(tmp_path / "beside.zip", "a/0.png", "b/0.png", labels=beside))


@pytest.mark.parametrize("names", [
    ("0.png", "1.png"), ("00000/img00000000.png", "00001/img00001000.png"), ("set/00000/img00000000.png",),
])  # fmt: skip
def test_classes_where_there_are_none_are_an_error(names: tuple[str, ...], tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", *names)
    for read in (archive, prepared):
        with pytest.raises(UserError, match="classes=false"):
            read(path)
    originals.write_lmdb(tmp_path / "lmdb", [png()])
    with pytest.raises(UserError, match="classes=true"):
        prepared(tmp_path / "lmdb")


def test_what_a_zip_of_macos_brings_is_counted(tmp_path: Path, capsys: Told) -> None:
    prepared(write_zip(tmp_path / "set.zip", *LAYOUTS["of macOS"]))
    assert "2 hidden files and folders: 1 ._*, 1 __MACOSX" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- samples


def test_samples_in_subfolders_are_read(tmp_path: Path, capsys: Told) -> None:
    from consistency.commands.evaluate import given_samples

    pixels = noise(60, 8, 8)
    for number, image in enumerate(pixels):
        place = tmp_path / "s" / f"{number - number % 20:06d}" / f"{number:06d}.png"
        originals.write_files(tmp_path, {str(place.relative_to(tmp_path)): encoded(Image.fromarray(image))})  # fmt: skip
    found = given_samples(str(tmp_path / "s"), (1, 8, 8), 60)
    assert np.array_equal(found[:, 0].numpy(), pixels)
    assert not capsys.readouterr().out
    assert len(given_samples(str(tmp_path / "s"), (1, 8, 8), 50)) == 50
    assert "60 images: the first 50" in capsys.readouterr().out
    with pytest.raises(UserError, match="num_samples=60"):
        given_samples(str(tmp_path / "s"), (1, 8, 8), 61)


def test_arrays_of_samples_are_read_or_refused_in_words(tmp_path: Path) -> None:
    from consistency.commands.evaluate import given_samples

    pixels, file = noise(6, 8, 8, 3), tmp_path / "a.npz"
    for stored in (pixels, pixels.transpose(0, 3, 1, 2)):
        np.savez(file, stored)
        found = given_samples(str(file), (3, 8, 8), 6)
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), pixels)
    for arrays, said in (
        ({"arr_0": pixels / np.float32(255)}, "float32 of shape .*, from 0 to 1"),
        ({"images": pixels}, "got: images"),
        ({"arr_0": pixels[..., :2]}, "uint8 of shape"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(UserError, match=said):
            given_samples(str(file), (3, 8, 8), 6)
