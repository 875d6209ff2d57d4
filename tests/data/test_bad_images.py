"""What is no plain image is converted by a written rule or refused by name; nothing of the rest is lost."""

import io
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import originals
from conftest import Run
from consistency.data import image_files
from consistency.data.decode import ImageError, decode
from consistency.data.image_files import ImageFiles
from consistency.data.lsun import Database
from consistency.data.zip_or_folder import Archive, Folder
from consistency.errors import UserError
from originals import encoded, noise

# Pillow warns of some of the damage made here before it raises; only what comes out counts.
pytestmark = pytest.mark.filterwarnings("ignore")

Maker = Callable[[random.Random], tuple[str, bytes]]


def picture(draw: random.Random, mode: str = "RGB") -> Image.Image:
    """A random image of a random size."""
    width, height = draw.randint(8, 24), draw.randint(8, 24)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(
        noise(*shape, seed=draw.getrandbits(32)), mode if mode == "CMYK" else None
    )


def empty(draw: random.Random) -> tuple[str, bytes]:
    return draw.choice([".png", ".jpg", ".webp", ".tif"]), b""


def text(draw: random.Random) -> tuple[str, bytes]:
    return ".png", draw.randbytes(draw.randint(1, 300))


def cut(draw: random.Random) -> tuple[str, bytes]:
    suffix, kind = draw.choice(
        [(".png", "PNG"), (".jpg", "JPEG"), (".bmp", "BMP"), (".ppm", "PPM")]
    )
    whole = encoded(picture(draw), kind)
    return suffix, whole[: draw.randint(1, len(whole) - (3 if kind == "JPEG" else 1))]


def wrong_checksum(draw: random.Random) -> tuple[str, bytes]:
    """One bit of a PNG's compressed pixels or of their checksum is changed."""
    whole = bytearray(encoded(picture(draw)))
    start = whole.index(b"IDAT")
    whole[draw.randint(start + 4, len(whole) - 13)] ^= 1 << draw.randrange(8)
    return ".png", bytes(whole)


def sixteen_bits(draw: random.Random) -> tuple[str, bytes]:
    grey = noise(9, 9, seed=draw.getrandbits(32)).astype(np.uint16) * 257
    kind = draw.choice(["grey", "tiff", "colour", "ppm", "pgm"])
    if kind == "grey":
        return ".png", encoded(Image.fromarray(grey))
    if kind == "tiff":
        return ".tif", encoded(Image.fromarray(grey), "TIFF")
    if kind == "colour":
        return ".png", sixteen_bit_png(grey)
    rows = grey.astype(">u2")
    highest = draw.choice([b"65535", b"1023", b"256"])
    if kind == "pgm":
        return ".pgm", b"P5 9 9 " + highest + b"\n" + rows.tobytes()
    return ".ppm", b"P6 9 9 " + highest + b"\n" + np.repeat(rows[..., None], 3, -1).tobytes()


def sixteen_bit_png(grey: np.ndarray[Any, Any]) -> bytes:
    """A colour PNG of 16 bits a channel, which Pillow cannot write."""
    import struct
    import zlib

    def part(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = np.repeat(grey.astype(">u2")[..., None], 3, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 16, 2, 0, 0, 0)
    body = part(b"IHDR", head) + part(b"IDAT", zlib.compress(lines)) + part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def floating(draw: random.Random) -> tuple[str, bytes]:
    values = noise(9, 9, seed=draw.getrandbits(32)).astype(np.float32) / 255
    return ".tif", encoded(Image.fromarray(values), "TIFF")


def animated(draw: random.Random) -> tuple[str, bytes]:
    suffix, kind = draw.choice(
        [(".gif", "GIF"), (".png", "PNG"), (".webp", "WEBP"), (".tif", "TIFF")]
    )
    frames = [Image.fromarray(noise(12, 12, 3, seed=draw.getrandbits(32))) for _ in range(3)]
    return suffix, encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def transparent(draw: random.Random) -> tuple[str, bytes]:
    kind = draw.choice(["RGBA", "LA", "P", "key"])
    image = picture(draw, "RGBA")
    if kind == "LA":
        return ".png", encoded(image.convert("LA"))
    if kind == "P":
        return ".png", encoded(image.convert("RGB").quantize(16), transparency=0)
    if kind == "key":
        colour = image.convert("RGB").getpixel((0, 0))
        return ".png", encoded(image.convert("RGB"), transparency=colour)
    return draw.choice([(".png", encoded(image)), (".webp", encoded(image, "WEBP", lossless=True))])


def lab(draw: random.Random) -> tuple[str, bytes]:
    return ".tif", encoded(Image.new("LAB", (9, 9), (draw.randrange(256), 128, 128)), "TIFF")


BAD: dict[str, tuple[Maker, str]] = {
    "empty": (empty, "0 bytes"),
    "text": (text, "damaged"),
    "cut": (cut, "damaged"),
    "wrong_checksum": (wrong_checksum, "damaged"),
    "sixteen_bits": (sixteen_bits, "8 bits"),
    "floating": (floating, "8 bits"),
    "animated": (animated, "frames"),
    "transparent": (transparent, "transparent"),
    "lab": (lab, "mode LAB"),
}
EACH = 28
"""Bad images of each kind: 252 in all."""


def bad_files() -> dict[str, tuple[bytes, str]]:
    """File name -> content and a word of the reason."""
    found = {}
    for kind, (make, reason) in BAD.items():
        for seed in range(EACH):
            suffix, content = make(random.Random(f"{kind} {seed}"))
            found[f"{kind}_{seed:02d}{suffix}"] = (content, reason)
    return found


def good_files(count: int = 20) -> dict[str, bytes]:
    return {
        f"good_{i:02d}.png": encoded(Image.fromarray(noise(12, 12, 3, seed=i)))
        for i in range(count)
    }


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_with_its_reason(kind: str) -> None:
    make, reason = BAD[kind]
    for seed in range(EACH):
        suffix, content = make(random.Random(f"{kind} {seed}"))
        for mode in ("L", "RGB", None):
            with pytest.raises(ImageError, match=reason) as caught:
                decode(content, f"here/it{suffix}", mode)  # type: ignore[arg-type]
            assert caught.value.name == f"here/it{suffix}"
            assert len(str(caught.value).splitlines()) == 3


def source_of(kind: str, root: Path, files: dict[str, bytes], **settings: Any) -> ImageFiles:
    settings = {"channels": 3, "image_size": 8} | settings
    if kind == "folder":
        originals.write_files(root / "folder", files)
        return Folder(path=str(root / "folder"), classes=False, **settings)
    root.mkdir(parents=True, exist_ok=True)
    if kind == "zip":
        originals.write_archive(root / "set.zip", list(files.items()))
        return Archive(path=str(root / "set.zip"), classes=False, **settings)
    originals.write_lmdb(root / "lmdb", list(files.values()))
    return Database(path=str(root / "lmdb"), **settings)


@pytest.mark.parametrize("kind", ["folder", "zip", "lmdb"])
def test_skipping_leaves_out_the_bad_and_nothing_else(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = bad_files(), good_files()
    assert len(bad) >= 200
    mixed = dict(sorted({**{name: c for name, (c, _) in bad.items()}, **good}.items()))
    clean = source_of(kind, tmp_path / "clean", good)
    expected = {clean[i][0].numpy().tobytes() for i in range(len(clean))}
    source = source_of(kind, tmp_path / "mixed", mixed, on_bad="skip")
    assert len(source) == len(good) == 20
    assert {source[i][0].numpy().tobytes() for i in range(len(source))} == expected
    told = capsys.readouterr().out
    assert f"{len(bad)} of {len(mixed)} images cannot be used and are left out" in told
    assert f"and {len(bad) - image_files.MOST_LISTED} more" in told


def test_stopping_names_the_image_that_was_asked_for(tmp_path: Path) -> None:
    bad, good = bad_files(), good_files()
    files = {**{name: content for name, (content, _) in bad.items()}, **good}
    source = source_of("folder", tmp_path, files)
    for index, name in enumerate(source.names):
        if name in good:
            source[index]
            continue
        with pytest.raises(ImageError) as caught:
            source[index]
        assert f"{tmp_path}/folder/{name}" in str(caught.value)


def test_labels_stay_with_their_images_when_some_are_left_out(tmp_path: Path) -> None:
    files = {
        f"{c}/{i}.png": content for c in "ab" for i, content in enumerate(good_files(4).values())
    }
    files |= {f"{c}/{i}.png": b"" for c, i in (("a", 1), ("b", 0), ("b", 3))}
    originals.write_files(tmp_path, files)
    source = Folder(path=str(tmp_path), **{"on_bad": "skip"}, classes=True)
    assert source.names == ["a/0.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1]


def test_a_set_of_nothing_but_bad_images_is_an_error(tmp_path: Path) -> None:
    originals.write_files(tmp_path, {"a.png": b"", "b.png": b"x"})
    with pytest.raises(UserError, match="can be read"):
        Folder(path=str(tmp_path), **{"on_bad": "skip"}, classes=False)


# ------------------------------------------------------------------------------ written rules


def read(content: bytes, mode: Any = "RGB") -> np.ndarray[Any, Any]:
    return np.asarray(decode(content, "it", mode))


def test_grey_among_colour_has_three_equal_channels() -> None:
    grey = noise(9, 7)
    for mode in ("RGB", None):
        found = read(encoded(Image.fromarray(grey)), mode)
        assert np.array_equal(found, grey if mode is None else np.stack([grey] * 3, -1))


def test_colour_as_grey_is_its_luma() -> None:
    colour = noise(9, 7, 3)
    exact = colour @ np.array([0.299, 0.587, 0.114])
    assert float(np.abs(read(encoded(Image.fromarray(colour)), "L") - exact).max()) <= 0.51


def test_alpha_is_dropped_where_it_is_opaque() -> None:
    colour, grey = noise(9, 7, 3), noise(9, 7)
    opaque = np.full((9, 7, 1), 255, np.uint8)
    assert np.array_equal(
        read(encoded(Image.fromarray(np.concatenate([colour, opaque], -1)))), colour
    )
    pair = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(opaque[..., 0])))
    assert np.array_equal(read(encoded(pair), None), grey)


def test_cmyk_becomes_rgb_by_the_plain_formula() -> None:
    inks = Image.fromarray(noise(16, 16, 4), "CMYK").resize((64, 64), Image.Resampling.NEAREST)
    c, m, y, k = (np.asarray(band).astype(int) for band in Image.open(
        io.BytesIO(encoded(inks, "JPEG", quality=95))).split())  # fmt: skip
    found = read(encoded(inks, "JPEG", quality=95)).astype(int)
    exact = np.stack([(255 - ink) * (255 - k) / 255 for ink in (c, m, y)], -1)
    assert float(np.abs(found - exact).max()) <= 1


def test_palettes_and_single_bits_are_what_they_show() -> None:
    colour = Image.fromarray(noise(9, 7, 3)).quantize(16)
    assert np.array_equal(read(encoded(colour)), np.asarray(colour.convert("RGB")))
    bits = Image.fromarray(noise(9, 7)).convert("1")
    assert np.array_equal(read(encoded(bits), None), np.asarray(bits).astype(np.uint8) * 255)


@pytest.mark.parametrize(("orientation", "turned"), [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
    (5, lambda a: np.swapaxes(a, 0, 1)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(np.swapaxes(a, 0, 1), 2)), (8, np.rot90),
])  # fmt: skip
def test_exif_rotation_is_applied(orientation: int, turned: Any) -> None:
    pixels = noise(9, 7, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read(encoded(Image.fromarray(pixels), exif=exif)), turned(pixels))


def test_of_a_camera_s_multi_picture_file_the_first_is_taken() -> None:
    frames = [Image.new("RGB", (16, 16), (v, v, v)) for v in (50, 200)]
    stored = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(stored)).format == "MPO"
    assert abs(int(read(stored).mean()) - 50) <= 1


# ------------------------------------------------------------------- zips, labels, whole sets


def test_a_damaged_zip_gives_the_right_images_or_an_error_with_its_name(tmp_path: Path) -> None:
    """Cut short, or one byte changed, 120 times: an image that comes out is one that went in."""
    files = good_files(8)
    originals.write_archive(tmp_path / "whole.zip", list(files.items()))
    whole, names = (tmp_path / "whole.zip").read_bytes(), set(files)
    true = {name: read(content).tobytes() for name, content in files.items()}
    draw, target, refused = random.Random(0), tmp_path / "damaged.zip", 0
    for number in range(120):
        damaged = bytearray(whole)
        if number % 2:
            del damaged[draw.randrange(len(whole)) :]
        else:
            damaged[draw.randrange(len(whole))] ^= draw.randint(1, 255)
        target.write_bytes(damaged)
        try:
            source = Archive(path=str(target), classes=False)
        except UserError as error:
            assert "damaged.zip" in str(error)
            refused += 1
            continue
        for index, name in enumerate(source.names):
            try:
                image, _ = source[index]
            except ImageError as error:
                assert "damaged.zip" in str(error)
                refused += 1
                continue
            assert name not in names or image.permute(1, 2, 0).numpy().tobytes() == true[name]
    assert refused > 60


@pytest.mark.parametrize("content", [
    "", "[]", "{}", "null", '{"labels": 3}', '{"labels": [1, 2]}', '{"labels": [["a.png"]]}', '{"labels": ',
    '{"labels": [["a.png", 0], ["b.png", 1], ["c.png", 2]]}', '{"labels": [["a.png", 0]]}',
    '{"labels": [["a.png", 0], ["b.png", -1]]}', '{"labels": [["a.png", 0], ["b.png", 0.5]]}',
    '{"labels": [["a.png", 0], ["b.png", true]]}', '{"labels": [["a.png", 0], ["b.png", [0, 1]]]}',
    '{"labels": [["a.png", 0], ["a.png", 1]]}', '{"labels": {"a.png": 0, "b.png": 1}}', "[" * 100_000,
    '{"labels": null}', '{"labels": [["A.png", 0], ["b.png", 1]]}', '{"labels": [["a.png", 0], ["b.png", 99999999999]]}',
])  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_labels_that_do_not_match_are_refused(content: str, zipped: bool, tmp_path: Path) -> None:
    files = dict(zip(("a.png", "b.png"), good_files(2).values(), strict=True))
    path = tmp_path / ("set.zip" if zipped else "set")
    originals.write_archive(path, list(files.items()))
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name, stored in {**files, "dataset.json": content.encode()}.items():
                archive.writestr(name, stored)
    else:
        (path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json") as caught:
        Archive(path=str(path), classes=True)
    assert str(path) in str(caught.value)


def test_a_folder_without_images_says_what_would_do(tmp_path: Path) -> None:
    originals.write_files(tmp_path, {"notes.txt": b"x", "sub/film.mp4": b"x"})
    with pytest.raises(UserError, match=r"\.png"):
        Folder(path=str(tmp_path), classes=False)


# --------------------------------------------------------------------------- while training


def test_a_run_stops_at_a_bad_image_in_a_few_lines(verb: Run, tmp_path: Path) -> None:
    """From a worker process too, whose trace is not shown; with on_bad=skip the run goes through."""
    originals.write_files(tmp_path / "set", good_files(12) | {"broken.png": b"no image"})
    options = ["data=folder", f"data.path={tmp_path / 'set'}", "data.image_size=8", *TINY]
    done = verb("train", *options, "data.num_workers=1", f"output={tmp_path / 'a'}")
    assert done.status == 2
    error = done.err[done.err.index("error: ") :]
    assert "set/broken.png" in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 5
    done = verb(
        "train", *options, "data.num_workers=0", "data.on_bad=skip", f"output={tmp_path / 'b'}"
    )
    assert done.status == 0
    assert "1 of 13 images cannot be used and are left out" in done.out
    options += ["data.in_memory=true", "data.on_bad=skip", f"output={tmp_path / 'c'}"]
    done = verb("train", *options)
    assert done.status == 0
    assert "held in memory: 12 images" in done.out
    assert "Left out:   1 images" in done.out


TINY = [
    "logger=csv", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.max_steps=6", "data.batch_size=4",
    "model.network.channel_mult=[1,2]", "model.network.num_groups=4", "model.network.model_channels=8", "model.network.num_head_channels=8",
    "callbacks.samples.num_samples=4",
]  # fmt: skip
