"""The page for trying a checkpoint, as a person uses it: in a real browser, clicking and looking."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, Run
from consistency.checkpoint import load
from consistency.errors import UserError
from consistency.page import Actions, mask_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def stroke(size: int, box: tuple[int, int, int, int]) -> Image.Image:
    layer = Image.new("RGBA", (size, size))
    layer.paste((255, 0, 0, 255), box)
    return layer


def test_strokes_are_the_mask() -> None:
    free = mask_of([stroke(80, (0, 0, 40, 20)), stroke(80, (70, 70, 80, 80))], (8, 8))
    assert free[:2, :4].all()
    assert free[7, 7] == 1
    assert free.sum() == 9


def test_inpainting_keeps_what_no_stroke_covers(trained: dict[str, Path]) -> None:
    actions = Actions(load(trained["ect"]))
    given = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    drawing = {"background": given, "layers": [stroke(80, (0, 0, 40, 80))]}
    picture, said = actions.edit("inpaint", drawing, 2, 1, 0, "any")
    assert re.fullmatch(r"[\d.]+ ms an image, 1 images", said)
    cell = (picture.width - 2) // 8
    pixels = np.asarray(picture.convert("L"))[cell // 2 :: cell, cell // 2 :: cell][:8, :8]
    assert np.array_equal(pixels[:, 4:], np.asarray(given)[:, 4:])
    with pytest.raises(UserError, match="no stroke"):
        actions.edit("inpaint", {"background": given, "layers": []}, 2, 1, 0, "any")
    with pytest.raises(UserError, match="an image in the editor"):
        actions.edit("superres", None, 2, 1, 0, "any")


def test_classes_are_chosen_by_name(trained: dict[str, Path]) -> None:
    model = load(trained["ect"])
    actions = Actions(model)
    assert actions.labels[0] == "any"
    assert len(actions.labels) == 11
    assert actions.label_of("any") is None
    assert actions.label_of(actions.labels[4]) == 3


def test_wrong_options_are_told(process: Run, trained: dict[str, Path]) -> None:
    done = process("demo", f"checkpoint={trained['ect']}", "port=-1")
    assert done.status == 2
    assert "a port from 0" in done.err


@pytest.fixture
def address(trained: dict[str, Path]) -> Iterator[str]:
    """The page of a two-step run, served by the command."""
    pytest.importorskip("gradio")
    server = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "src" / "demo.py"), f"checkpoint={trained['ect']}", "port=0"],
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
    torch.manual_seed(0)
    given = tmp_path / "given.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64), np.uint8)).save(given)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        tab = browser.new_page(viewport={"width": 1100, "height": 1500})
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)
        shown = []
        for seed in ("1", "2", "1"):
            tab.locator("#seed input").fill(seed)
            tab.locator("#seed input").press("Tab")
            before = tab.locator("#samples img").get_attribute("src") if shown else None
            tab.locator("#draw").click()
            tab.wait_for_function(
                "old => { const i = document.querySelector('#samples img'); return i && i.src != old }",
                arg=before,
            )
            assert "ms an image, 16 images" in tab.locator("#sample_time textarea").input_value()
            shown.append(tab.request.get(tab.locator("#samples img").get_attribute("src")).body())
        assert shown[0] == shown[2] != shown[1]
        tab.get_by_role("tab", name="Edit").click()
        tab.locator("#editor input[type=file]").set_input_files(given)
        canvas = tab.locator("#editor canvas").first
        canvas.wait_for()
        tab.wait_for_timeout(2000)
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.mouse.move(x - 30, y)
        tab.mouse.down()
        tab.mouse.move(x + 30, y + 10, steps=8)
        tab.mouse.up()
        # The editor hands over its image and strokes some time after the last stroke, which nothing on the page shows.
        for _ in range(6):
            tab.wait_for_timeout(2000)
            tab.locator("#edit").click()
            try:
                tab.locator("#edited img").wait_for(timeout=10_000)
                break
            except playwright.TimeoutError:
                continue
        assert "ms an image, 4 images" in tab.locator("#edit_time textarea").input_value()
        tab.screenshot(path=os.environ.get("PAGE_PICTURE", str(tmp_path / "page.png")))
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
