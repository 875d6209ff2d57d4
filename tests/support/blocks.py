"""Blocks of code on the pages: README.md, docs/*.md and the notebooks."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
    *sorted(f"docs/notebooks/{page.name}" for page in (ROOT / "docs/notebooks").glob("*.ipynb")),
]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
VERB = re.compile(r"src/(\w+)\.py")


@dataclass(frozen=True)
class Block:
    """A block, the line of its page at which it begins, and the reason why a test does not run it."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, in its order."""
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"):
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return [Block(page, n, "python", "".join(c["source"]), None) for n, c in enumerate(cells)]
    return [
        Block(page, text.count("\n", 0, m.start("text")) + 1, m["language"], m["text"], m["reason"])
        for m in FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Return the verbs that a block of bash calls, each with its arguments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for number, word in enumerate(words):
            if verb := VERB.fullmatch(word):
                yield verb[1], words[number + 1 :]
