"""The page for trying a checkpoint, as a person uses it: in a real browser, clicking and looking."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from conftest import REPORT, ROOT, Run
from consistency.checkpoints import ours
from consistency.checkpoints.load import load
from consistency.commands import demo, page, schema
from consistency.commands.demo import BLANK, Actions, checkpoints_at, mask_of, times_of
from consistency.errors import UserError
from consistency.inference import plots
from tiny_models import tiny_adm, tiny_card

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 120_000  # milliseconds that a page may take on a busy machine


NAME = "run"
"""A checkpoint on the page."""


def acting(checkpoint: Path, uploads: Path) -> Actions:
    return Actions({NAME: checkpoint}, load, uploads)


def painted(free: torch.Tensor) -> dict[str, str]:
    """What the painter holds after such strokes."""
    return {"image": "", "free": "".join(str(int(f)) for f in free.flatten())}


def test_what_is_painted_is_the_mask() -> None:
    free = torch.rand(8, 4) > 0.5
    assert torch.equal(mask_of(painted(free), (8, 4)), free.float())
    assert not mask_of(BLANK, (8, 4)).any()


@pytest.mark.parametrize(
    "value",
    [None, "0" * 32, {}, {"free": None}, {"free": "01"}, {"free": "2" * 32}, {"free": [1] * 32}],
    ids=str,
)
def test_a_mask_that_no_page_sends_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="a mask of 8x4"):
        mask_of(value, (8, 4))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_inpainting_keeps_what_is_not_painted(trained: dict[str, Path], photo: Path) -> None:
    actions, given = acting(trained["ect"], photo.parent), np.asarray(Image.open(photo))
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    picture, said = actions.edit(NAME, "inpaint", str(photo), painted(left), 2, 0.5, 1, 0, "any")
    assert re.fullmatch(r"[\d.]+ ms an image, 1 images", said)
    cell = (picture.width - 2) // 8
    pixels = np.asarray(picture.convert("L"))[cell // 2 :: cell, cell // 2 :: cell][:8, :8]
    assert np.array_equal(pixels[:, 4:], given[:, 4:])
    assert not np.array_equal(pixels[:, :4], given[:, :4])
    with pytest.raises(UserError, match="nothing painted"):
        actions.edit(NAME, "inpaint", str(photo), BLANK, 2, 0.5, 1, 0, "any")
    with pytest.raises(UserError, match="an image to edit"):
        actions.edit(NAME, "superres", None, BLANK, 2, 0.5, 1, 0, "any")
    with pytest.raises(UserError, match="a task among"):
        actions.edit(NAME, "sharpen", str(photo), BLANK, 2, 0.5, 1, 0, "any")


def test_strokes_and_noise_are_edited_as_by_the_command(
    trained: dict[str, Path], photo: Path
) -> None:
    """The times of a stroke are those of conf/task; without noise to remove the image hardly changes."""
    actions = acting(trained["ect"], photo.parent)
    stroke = OmegaConf.load(ROOT / "conf" / "task" / "stroke.yaml")
    assert list(stroke.times) == demo.STROKE
    assert page.LEVEL == OmegaConf.load(ROOT / "conf" / "task" / "denoise.yaml").times[0]
    given = np.asarray(Image.open(photo)).astype(int)
    for task, near in (("denoise", True), ("stroke", False)):
        picture, _ = actions.edit(NAME, task, str(photo), BLANK, 2, 0.004, 1, 0, "any")
        cell = (picture.width - 2) // 8
        found = np.asarray(picture.convert("L"))[cell // 2 :: cell, cell // 2 :: cell][:8, :8]
        assert (np.abs(found.astype(int) - given).mean() < 4) == near


def test_images_are_interpolated_as_by_the_command(
    verb: Run,
    trained: dict[str, Path],
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two images with a teacher; without images the ends are the first samples."""
    monkeypatch.setattr(demo.ARC, "steps", 4)
    ends, output = tmp_path / "ends", tmp_path / "out"
    ends.mkdir()
    files = [str(ends / name) for name in ("a.png", "b.png")]
    for file, turn in zip(files, (0, 90), strict=True):
        Image.open(photo).rotate(turn).save(file)
    actions = Actions({NAME: trained["ect"], "denoiser": trained["edm"]}, load, ends)
    given = {"checkpoint": trained["ect"], "teacher": trained["edm"], "input": ends, "labels": 3}
    line = [f"{name}={value}" for name, value in given.items()]
    assert verb("edit", "task=interpolate", "task.steps=4", *line, f"output={output}").status == 0
    with np.load(output / "edited.npz") as arrays:
        frames = torch.from_numpy(arrays["arr_0"][0]).movedim(-1, 1)
    picture, said = actions.edit(NAME, "interpolate", files[0], BLANK, 2, 0.5, 4, 0, "3", files[1], "denoiser")  # fmt: skip
    assert np.array_equal(picture, demo.enlarged(plots.grid(frames, 3)))
    assert said.endswith("9 images")
    model = actions.model(NAME)
    (drawn,) = model.interpolate(frames=3, labels=3)
    assert torch.equal(drawn[[0, 2]], model.sample(2, labels=3))
    assert actions.edit(NAME, "interpolate", None, BLANK, 2, 0.5, 4, 0, "3")[1].endswith("9 images")
    for second, teacher, hint in (
        (None, "denoiser", "an image to edit"),
        (files[1], None, "a teacher"),
        (files[1], NAME, "a teacher"),
    ):
        with pytest.raises(UserError, match=hint):
            actions.edit(NAME, "interpolate", files[0], BLANK, 2, 0.5, 4, 0, "3", second, teacher)


def test_a_folder_of_runs_offers_each(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = trained["ect"].parent
    found = checkpoints_at(str(folder))
    assert set(found) == set(trained)
    ages = [(found[name] / "checkpoints" / "last.ckpt").stat().st_mtime for name in found]
    assert ages == sorted(ages, reverse=True)
    (one,) = checkpoints_at(str(trained["ect"])).values()
    assert one == trained["ect"]
    (one,) = checkpoints_at(str(tmp_path)).values()  # refused when it is read
    assert one == tmp_path
    actions = Actions(found, load, tmp_path)
    assert "colorize" not in actions.tasks("ct")
    assert actions.model("edm").card.role == "teacher"
    with pytest.raises(UserError, match="a checkpoint of the list"):
        actions.times("/etc/passwd", 1)


def test_steps_are_shown_with_their_time_points(trained: dict[str, Path], tmp_path: Path) -> None:
    actions = acting(trained["ect"], tmp_path)
    process = actions.model(NAME).card.process
    assert actions.times(NAME, 1) == f"{process.t_max:.3g}"
    assert actions.times(NAME, 2) == ", ".join(f"{t:.3g}" for t in process.times)
    for steps in range(1, page.MOST_STEPS["consistency"] + 1):
        times = times_of(actions.model(NAME).card.sampler(steps))
        assert len(times) == steps
        assert times == sorted(times, reverse=True)
    samples, strip, said = actions.sample(NAME, 5, 3, 7, "3")
    assert re.fullmatch(r"[\d.]+ ms an image, 5 images", said)
    assert 0.9 < strip.height / strip.width < 1.2  # three rows of four samples, each below its time
    again, empty, zero = (actions.sample(NAME, 5, 3, seed, "3")[0] for seed in (7, None, 0))
    assert np.array_equal(again, samples) and np.array_equal(empty, zero)


def test_seeds_are_stepped() -> None:
    assert (page.next_seed(4), page.previous_seed(4), page.previous_seed(0)) == (5, 3, 0)
    assert (page.next_seed(None), page.previous_seed(None)) == (1, 0)  # of an empty field


@pytest.mark.slow
def test_what_a_task_does_not_know_does_not_matter(tmp_path: Path) -> None:
    """The colours when colorizing, the order of the pixels of a patch when super-resolving; a model in colour."""
    ours.write({"card": tiny_card(), "weights": tiny_adm()}, tmp_path / "model.ckpt")
    actions = acting(tmp_path / "model.ckpt", tmp_path)
    given = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    other = {
        "colorize": np.asarray(Image.fromarray(given).convert("L").convert("RGB")),
        "superres": given.reshape(4, 2, 4, 2, 3)[:, ::-1, :, ::-1].reshape(8, 8, 3),
    }

    def edited(task: str, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        picture, _ = actions.edit(
            NAME, task, str(tmp_path / "photo.png"), BLANK, 2, 0.5, 4, 0, "any"
        )
        return np.asarray(picture).astype(int)

    for task, same in other.items():
        found = edited(task, given)
        assert np.abs(found - edited(task, same)).mean() < 2
        assert np.abs(found - edited(task, given[::-1].copy())).mean() > 20


def test_the_painter_shows_what_the_model_sees(trained: dict[str, Path], photo: Path) -> None:
    actions = acting(trained["ect"], photo.parent)
    shown = actions.choose(NAME, str(photo))
    with urllib.request.urlopen(shown["image"]) as found:
        assert np.array_equal(np.asarray(Image.open(found)), np.asarray(Image.open(photo)))
    assert shown["free"] == ""
    assert actions.choose(NAME, None) == BLANK
    with pytest.raises(UserError, match="an uploaded image"):
        acting(trained["ect"], photo.parent / "uploads").choose(NAME, str(photo))


def test_classes_are_chosen_by_name(trained: dict[str, Path]) -> None:
    labels = acting(trained["ect"], Path()).labels(NAME)
    assert next(iter(labels)) == "any"
    assert len(labels) == 11
    assert labels["any"] is None
    assert list(labels.values())[4] == 3


def test_wrong_options_are_told(verb: Run, trained: dict[str, Path]) -> None:
    done = verb("demo", f"checkpoint={trained['ect']}", "port=-1")
    assert done.status == 2
    assert "a port from 0" in done.err


@pytest.mark.parametrize(
    ("host", "warned"), [(None, False), ("127.0.0.2", False), ("0.0.0.0", True)]
)
def test_the_page_listens_on_loopback_unless_told_otherwise(
    host: str | None,
    warned: bool,
    trained: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launched: dict[str, Any] = {}
    served = SimpleNamespace(launch=lambda **options: launched.update(options))
    monkeypatch.setattr(page, "library", lambda: None)
    monkeypatch.setattr(page, "blocks", lambda _: served)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    schema.register()
    given = [f"checkpoint={trained['ect']}", *([f"host={host}"] if host else [])]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("demo", given)
    demo.demo(config, Path())
    assert launched["server_name"] == (host or "127.0.0.1")
    assert launched["share"] is False
    assert ("whoever reaches" in capsys.readouterr().err) == warned
    config.host = "everywhere"
    with pytest.raises(UserError, match="an address of this machine"):
        demo.demo(config, Path())


PAINTING = """
const fs = require("fs");
const paper = { clearRect() {}, drawImage() {}, fillRect() {} };
const box = { left: 0, top: 0, width: 80, height: 80 };
const canvas = { getContext: () => paper, getBoundingClientRect: () => box, setPointerCapture() {} };
const [button, brush, hint, kept] = [{}, { value: 15 }, {}, []];
const element = { querySelector: (name) => ({ canvas, input: brush, p: hint, button }[name]) };
const props = { value: { image: "x", free: "" } };
class Image { constructor() { this.naturalWidth = this.naturalHeight = 8; } }
const code = fs.readFileSync(process.argv[1], "utf8") + "; picture.onload();";
new Function("element", "props", "watch", "Image", code)(element, props, () => {}, Image);
const press = (key) => canvas.onkeydown({ key, preventDefault: () => kept.push(key) });
const free = () => [...props.value.free].flatMap((digit, index) => (digit === "1" ? [index] : []));
const found = [];
["Tab", "ArrowLeft", "ArrowUp", " "].forEach(press);
found.push(free());
[..."x".repeat(20)].forEach(() => press("ArrowRight"));
press(" ");
found.push(free());
button.onclick();
found.push(free());
canvas.onpointerdown({ pointerId: 1, clientX: 15, clientY: 25 });
canvas.onpointerup();
found.push(free());
console.log(JSON.stringify([kept.includes("Tab"), found]));
"""
"""A page of 8x8 pixels with the painter: the arrows and the space bar, the button, then the mouse at pixel (1, 2)."""


def test_the_painter_takes_keys_and_the_mouse() -> None:
    driver = pytest.importorskip("playwright._impl._driver")
    node = driver.compute_driver_executable()[0]
    painter = Path(page.__file__).with_name("painter.js")
    done = subprocess.run(
        [node, "-e", PAINTING, str(painter)], capture_output=True, text=True, check=True
    )
    takes_tab, found = json.loads(done.stdout)
    assert not takes_tab  # it moves on to the next control
    assert found == [[3 * 8 + 3], [3 * 8 + 3, 3 * 8 + 7], [], [2 * 8 + 1]]


# ----------------------------------------------------------------------------- served


@pytest.fixture(scope="module")
def address(trained: dict[str, Path]) -> Iterator[str]:
    """The page of a two-step run, served by the command."""
    pytest.importorskip("gradio")
    server = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "src" / "demo.py"), f"checkpoint={trained['ect']}",
         f"teacher={trained['edm']}", "port=0", "upload_megabytes=1"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stdout is not None
    try:
        for line in server.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                return
        pytest.fail("the page was not served")
    finally:
        server.terminate()
        server.wait(timeout=30)
        server.stdout.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser on the PATH")
def test_a_person_draws_samples_and_inpaints(address: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    given = tmp_path / "given.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64), np.uint8)).save(given)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        tab = browser.new_page(viewport={"width": 1100, "height": 1000})
        tab.set_default_timeout(PATIENCE)
        playwright.expect.set_options(timeout=PATIENCE)
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)

        def shown(place: str, button: str) -> bytes:
            """What an image of the page shows once it is another than before the click."""
            image = tab.locator(f"{place} img")
            before = image.get_attribute("src") if image.count() else None
            tab.locator(button).click()
            tab.wait_for_function(
                "([place, old]) => { const i = document.querySelector(place + ' img'); return i && i.getAttribute('src') != old }",
                arg=[place, before],
            )
            return tab.request.get(image.get_attribute("src")).body()

        def said(place: str, count: int) -> None:
            field = playwright.expect(tab.locator(f"{place} textarea"))
            field.to_have_value(re.compile(rf"[\d.]+ ms an image, {count} images"))

        drawn = []
        for seed in ("1", "2", "1"):
            tab.locator("#seed input").fill(seed)
            tab.locator("#seed input").press("Tab")
            drawn.append(shown("#samples", "#draw"))
            said("#sample_time", 16)
        assert drawn[0] == drawn[2] != drawn[1]
        before = tab.locator("#strip img").get_attribute("src")
        assert shown("#samples", "#next_seed")
        playwright.expect(tab.locator("#seed input")).to_have_value("2")
        tab.locator("#steps input[type=number]").fill("3")
        tab.locator("#steps input[type=number]").press("Tab")
        playwright.expect(tab.locator("#times textarea")).to_have_value(re.compile(r"80, .*, .*"))
        shown("#samples", "#draw")
        assert tab.locator("#strip img").get_attribute("src") != before
        tab.screenshot(path=picture_path(tmp_path, "sample"))
        tab.set_viewport_size({"width": 360, "height": 740})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        tab.screenshot(path=picture_path(tmp_path, "narrow"))
        tab.set_viewport_size({"width": 1100, "height": 1000})
        tab.get_by_role("tab", name="Edit").click()
        tab.locator("#photo input[type=file]").set_input_files(given)
        canvas = tab.locator("#painter canvas")
        canvas.wait_for()
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.mouse.move(x - 60, y)
        tab.mouse.down()
        tab.mouse.move(x + 60, y + 20, steps=8)
        tab.mouse.up()
        edited = shown("#edited", "#edit")
        said("#edit_time", 4)
        tab.screenshot(path=picture_path(tmp_path, "edit"))
        assert kept(edited, given)
        tab.locator("#painter button").click()
        tab.locator("#edit").click()
        tab.get_by_text("nothing painted on the image").wait_for()
        canvas.focus()
        tab.keyboard.press("ArrowUp")
        tab.keyboard.press("Space")
        shown("#edited", "#edit")
        tab.get_by_label("superres", exact=True).click()
        shown("#edited", "#edit")
        tab.get_by_label("interpolate", exact=True).click()
        tab.locator("#second input[type=file]").set_input_files(given)
        tab.locator("#second img").wait_for()
        shown("#edited", "#edit")
        said("#edit_time", 9)
        tab.screenshot(path=picture_path(tmp_path, "interpolate"), full_page=True)
        tab.set_viewport_size({"width": 360, "height": 740})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        tab.locator("#checkpoint input").click()
        tab.get_by_role("option", name=re.compile("edm")).click()
        playwright.expect(tab.locator("#about")).to_contain_text("teacher")
        playwright.expect(tab.locator("#second")).to_be_hidden()
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked


def picture_path(folder: Path, name: str) -> str:
    """Where a picture of the page is kept; $PAGE_PICTURES keeps it for people."""
    return str(Path(os.environ.get("PAGE_PICTURES", folder)) / f"page_{name}.png")


def kept(edited: bytes, given: Path) -> bool:
    """Whether the upper rows of the first result, which the stroke did not touch, are as given, and its middle is not."""
    sheet = Image.open(io.BytesIO(edited)).convert("L")
    cell, gap = (
        sheet.width * 6 // 102,
        sheet.width * 2 // 102,
    )  # two columns of 48 pixels, gaps of 2
    first = np.asarray(sheet)[gap + cell // 2 :: cell, gap + cell // 2 :: cell][:8, :8].astype(int)
    expected = np.asarray(Image.open(given).reduce(8)).astype(int)
    same = np.abs(first - expected) <= 3
    return bool(same[:2].all()) and not same[3:5].all()


def answer(
    address: str, path: str, content: bytes | None = None, **headers: str
) -> tuple[int, str]:
    """Status and text of what the server says."""
    request = urllib.request.Request(f"{address}/gradio_api/{path}", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def called(address: str, name: str, *given: object) -> str:
    """The event that an action of the page ends in when it is called without the page."""
    content = json.dumps({"data": given}).encode()
    status, text = answer(address, f"call/{name}", content, **{"Content-Type": "application/json"})
    assert status == 200, text
    return answer(address, f"call/{name}/{json.loads(text)['event_id']}")[1]


def uploaded(address: str, name: str, content: bytes) -> tuple[int, str]:
    """Status of an upload and the path it got."""
    edge = "----edge"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
    status, text = answer(
        address, "upload", body, **{"Content-Type": f"multipart/form-data; boundary={edge}"}
    )
    return status, json.loads(text)[0] if status == 200 else text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_served_page_keeps_to_itself(
    address: str,
    trained: dict[str, Path],
    photo: Path,
    record_property: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """It is heard on 127.0.0.1 alone, hands out none of this machine's files and opens no other than uploaded ones."""
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5).close()
    status, path = uploaded(address, "photo.png", photo.read_bytes())
    assert status == 200
    meta = {"_type": "gradio.FileData"}
    name = "/".join(trained["ect"].parts[-3:])
    assert "data:image/png" in called(address, "choose", name, {"path": path, "meta": meta})
    assert called(address, "times", "/etc/passwd", 1).startswith("event: error")
    tried = 0
    for secret in (str(photo), "/etc/passwd", f"{tmp_path}/../photo.png", str(ROOT / "README.md")):
        assert answer(address, f"file={secret}")[0] in (403, 404)
        for given in ({"path": secret, "meta": meta}, {"path": secret}, secret):
            text = called(address, "choose", name, given)
            assert text.startswith("event: error"), text
            assert "data:image" not in text
            tried += 1
        tried += 1
    assert uploaded(address, "large.png", bytes(2 << 20))[0] == 413
    for name, content in {
        "text.png": b"no image",
        "drawing.svg": b"<svg/>",
        "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0",
    }.items():
        _, path = uploaded(address, name, content)
        text = called(address, "choose", name, {"path": path, "meta": meta})
        assert text.startswith("event: error")
        tried += 1
    record_property(
        REPORT, f"page: {tried + 1} requests for what it must not give or take, none granted"
    )
