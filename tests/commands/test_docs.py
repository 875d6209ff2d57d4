"""README.md, the pages of docs/ and the notebooks: their links lead somewhere, their commands exist, and their blocks run."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from blocks import PAGES, Block, blocks, commands
from conftest import ROOT
from consistency.commands.cli import compose

RUN_BY_ANOTHER = "docs/extending.md"
"""The page whose blocks are files and their commands: test_extending.py."""

FIRST = ["docs/first-run.md", "docs/data.md"]
"""Pages that train what the others use."""

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block, *c) for block in BLOCKS if block.language == "bash" for c in commands(block)]
GROUPS = {folder.name: folder for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
GROUPS["experiment"] = ROOT / "experiments"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page: str) -> str:
    """The prose of a page."""
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"):
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        return "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, or the names in a module."""
    text = page.read_text()
    if page.suffix == ".py":
        return set(re.findall(r"^(?:class|def) (\w+)", text, re.MULTILINE))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    links = [link for link in LINK.findall(text_of(page)) if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_every_block_is_run_or_has_a_reason() -> None:
    for block in BLOCKS:
        assert block.language in ("bash", "python", "yaml"), f"{block}: say its language"
        assert block.reason is None or len(block.reason) > 8, str(block)
    fences = sum((ROOT / p).read_text().count("\n```") for p in PAGES if p.endswith(".md"))
    assert fences == 2 * sum(not block.page.endswith(".ipynb") for block in BLOCKS)


def test_every_block_is_code() -> None:
    for block in BLOCKS:
        if block.language == "python":
            ast.parse(block.text)
    shell = "".join(f"({block.text}\n)\n" for block in BLOCKS if block.language == "bash")
    done = subprocess.run(["bash", "-n"], input=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", sorted({str(block.page) for block, *_ in COMMANDS}))
def test_every_option_is_one(page: str) -> None:
    """By its first name; `test_every_command_composes` takes the rest."""
    for block, verb, arguments in COMMANDS:
        if block.page != page or page == RUN_BY_ANOTHER:
            continue
        names = set(re.findall(r"\w+", (ROOT / "conf" / f"{verb}.yaml").read_text()))
        for argument in arguments:
            name, is_option, value = argument.lstrip("+~").partition("=")
            assert "<" not in argument, f"{block}: {argument} cannot be pasted"
            if is_option:
                head = re.split(r"[.@/]", name)[0]
                assert head in {*names, "hydra"}, f"{block}: {argument}"
            choice = GROUPS.get(name)
            if choice is not None and value.isidentifier() and name not in ("mask",):
                assert value == "null" or (choice / f"{value}.yaml").is_file(), f"{block}: {argument}"  # fmt: skip


def test_every_target_of_make_is_one() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make ([\w-]+)", "\n".join(block.text for block in BLOCKS), re.MULTILINE)
    assert named
    assert set(named) <= set(targets)


def first_of_sweep(argument: str) -> str:
    """An argument of `-m`, with the first of its values."""
    override = OverridesParser.create().parse_override(argument)
    if not override.is_sweep_override():
        return argument
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({str(block.page) for block, *_ in COMMANDS}))
def test_every_command_composes(page: str) -> None:
    for block, verb, arguments in COMMANDS:
        if block.page != page or page == RUN_BY_ANOTHER:
            continue
        options = [each for each in arguments if "=" in each and not each.startswith("-")]
        if "-m" in arguments:
            options = [first_of_sweep(option) for option in options if "interval(" not in option]
        try:
            compose(options, verb)
        except Exception as error:
            raise AssertionError(f"{block}: {verb} {' '.join(options)}: {error}") from error


def run(page: str, folder: Path) -> None:
    """Run the blocks of a page in a folder, which looks like a clone."""
    tool = str(ROOT / "tests" / "tools" / "blocks_of_pages.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", tool, page],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count(f"ran {page}") == len(runnable(page))


def runnable(page: str) -> list[Block]:
    return [b for b in blocks(page) if b.reason is None and b.language in ("bash", "python")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the project, and the runs that the first pages train."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("src", "conf", "experiments", "tests", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for page in FIRST:
        run(page, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if p not in FIRST and runnable(p)])
def test_the_blocks_of_a_page_run(page: str, clone: Path) -> None:
    if page != RUN_BY_ANOTHER:
        run(page, clone)


@pytest.mark.slow
def test_the_site_builds_strictly_and_needs_no_network_to_be_read(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    fetched = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?https?:|<link[^>]*rel=["']?stylesheet[^>]*href=["']?https?:""")  # fmt: skip
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 100
    for page in pages:
        assert not fetched.search(page.read_text()), page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:", style.read_text()), style


def test_the_pages_of_the_site_are_those_of_the_folder() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    navigation = yaml.safe_load(text[text.index("\nnav:") :])["nav"]
    named = set(re.findall(r"[\w/-]+\.md", str(navigation)))
    written = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert named == {page.replace(".ipynb", ".md") for page in written} | {
        "changelog.md",
        "contributing.md",
    }
