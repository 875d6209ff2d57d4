"""Every example of docs/extending.md trains and samples."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT, SHORT, TINY

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCK = re.compile(
    r"`((?:src|conf|experiments)/[\w./]+)`[^`]*?\n```(?:python|yaml)\n(.*?)```", re.DOTALL
)
COMMAND = re.compile(r"^python src/train\.py (.*)$", re.MULTILINE)
TINY_NETWORK = TINY[len(SHORT) :]
RUN = f"""
import sys, consistency
for number, line in enumerate(sys.stdin.read().splitlines()):
    options = [*line.split(), f"output=runs/{{number}}", "logger=none"]
    options += ["evaluation@callbacks.evaluation=none", "callbacks.samples.num_samples=4"]
    options += ["data.batch_size=8", *({TINY_NETWORK} if "model=" not in line else [])]
    config = consistency.compose(options)
    consistency.train(config)
    assert consistency.load(config.output).sample(2).shape[0] == 2
    print("ran", line)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with every file of the page."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("src", "conf", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    images = folder / "flowers"
    images.mkdir()
    for number in range(64):
        Image.new("RGB", (40, 40), (4 * number, 90, 120)).save(images / f"{number}.png")
    for name, text in BLOCK.findall(PAGE):
        file = folder / name
        if file.exists():
            file.write_text(f"{file.read_text()}\n\n{text}")
        else:
            file.write_text(text)
    return folder


def test_every_block_of_the_page_has_a_file() -> None:
    blocks = re.findall(r"```(?:python|yaml)\n", PAGE)
    assert len(BLOCK.findall(PAGE)) == len(blocks) >= 10


def test_every_example_of_the_page_trains_and_samples(copy: Path) -> None:
    lines = COMMAND.findall(PAGE)
    assert len(lines) == 6
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN],
        input="\n".join(lines).replace("<folder>", str(copy / "flowers")),
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy / "src"), "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.count("ran ") == len(lines), done.stdout[-2000:] + done.stderr[-4000:]
