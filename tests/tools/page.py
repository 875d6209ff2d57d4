"""Pictures of the page for the docs, taken in a headless Chromium: python tests/tools/page.py <folder of runs> <folder>.

It draws with the newest run, which is one of digits, and inpaints a held-out digit.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright import sync_api as playwright
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
PATIENCE = 150_000  # milliseconds, for a busy machine


@contextmanager
def served(runs: str) -> Iterator[str]:
    """Serve the page of these runs; yield its address."""
    command = [sys.executable, "-u", str(ROOT / "src" / "demo.py"), f"checkpoint={runs}", "port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = server.stdout or ()
        yield next(m[0] for line in lines if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
    finally:
        server.terminate()


def settled(tab: playwright.Page, place: str) -> None:
    """Wait until a picture is there and the page has stopped moving."""
    tab.locator(f"{place} img").wait_for()
    tab.wait_for_timeout(4000)


def take(tab: playwright.Page, address: str, digit: Path, folder: Path) -> None:
    """Write page.png and page_edit.png."""
    tab.goto(address)
    for place, value in (("#steps input[type=number]", "3"), ("#seed input", "4")):
        tab.locator(place).fill(value)
        tab.locator(place).press("Tab")
    tab.wait_for_timeout(3000)
    tab.locator("#draw").click()
    settled(tab, "#strip")
    tab.screenshot(path=folder / "page.png", full_page=True)
    tab.get_by_role("tab", name="Edit").click()
    tab.locator("#photo input[type=file]").set_input_files(digit)
    canvas = tab.locator("#painter canvas")
    canvas.wait_for()
    tab.wait_for_timeout(2000)
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + 0.35 * box["height"]
    tab.mouse.move(x - 60, y)
    tab.mouse.down()
    tab.mouse.move(x + 60, y + 20, steps=6)
    tab.mouse.up()
    tab.locator("#edit").click()
    settled(tab, "#edited")
    tab.screenshot(path=folder / "page_edit.png", full_page=True)


def main(runs: str, folder: str) -> None:
    """Serve, take and write."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with TemporaryDirectory() as room, served(runs) as address, playwright.sync_playwright() as p:
        digit = Path(room, "digit.png")
        Image.fromarray((load_digits().images[1700] * 15.9).astype("uint8")).save(digit)
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1000, "height": 760})
        tab.set_default_timeout(PATIENCE)
        take(tab, address, digit, Path(folder))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
