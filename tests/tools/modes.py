"""Fill in the tables of modes in README.md, docs/choose.md and docs/methods.md: `python tests/tools/modes.py`.

They are made of conf/mode/*.yaml, in the order of the papers: the first two list the modes, docs/methods.md the parts that each
names. A part stands under the name that `mode.<kind>=<name>` takes; step and velocity have their class.
"""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "conf" / "mode"
PAGES = ("README.md", "docs/choose.md", "docs/methods.md")
BLOCK = re.compile(r"(<!-- (modes|methods) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADER = re.compile(r"(?P<name>.+?) \[(?P<authors>[^\],]+), arXiv:(?P<number>[\d.]+)")
"""A mode's first comment: `<method> [<authors and year>, arXiv:<number> ...`."""

COLUMNS = {
    "pairs or times": ("pairs", "times", "grid"),
    "step or velocity": ("step", "velocity"),
    "distance": ("distance",),
    "weighting": ("weighting", "head"),
    "derivative": ("derivative", "tangent", "normalisation"),
    "target": ("target",),
    "schedule": ("scales", "warmup", "alpha"),
}
"""Columns of docs/methods.md -> kinds of parts."""

Mode = dict[str, Any]


def modes() -> dict[str, Mode]:
    """Return the content of every mode, in the order of the papers."""
    contents = {file.stem: yaml.safe_load(file.read_text()) for file in FOLDER.glob("*.yaml")}
    return dict(sorted(contents.items(), key=lambda item: (source(item[0])["number"], item[0])))


def source(mode: str) -> dict[str, str]:
    """Return `name`, `authors` and `number` of a mode's first comment."""
    comment = re.findall(r"^# ?(.*)$", (FOLDER / f"{mode}.yaml").read_text(), re.MULTILINE)
    found = HEADER.match(" ".join(comment))
    assert found, f"{mode}.yaml: expected a first comment `# <method> [<authors>, arXiv:<number>]`"
    return found.groupdict()


def nodes(content: Any) -> list[Mode]:
    """Return all mappings below a node, itself included."""
    inner = content.values() if isinstance(content, dict) else []
    own = [content] if isinstance(content, dict) else []
    return own + [node for value in inner for node in nodes(value)]


def beginning(content: Mode) -> str:
    """Return the model that a mode needs or may begin with."""
    loaders = {str(node.get("_target_")).rpartition(".")[2] for node in nodes(content)}
    if "load_teacher" in loaders:
        return "`teacher=` a denoiser"
    if "load_first_stage" in loaders:
        return "`teacher=` a consistency model"
    return "`teacher=`, if any" if content["init"] else ""


def part(content: Mode, kind: str) -> str:
    """Return the name of a mode's part, or its class; empty for none."""
    objective = content["objective"]
    if kind in ("step", "velocity"):
        node = objective.get(kind, {})
        solver = f", `{content['solver']}`" if "solver" in node else ""
        return f"`{node['_target_'].rpartition('.')[2]}`{solver}" if node else ""
    if kind == "grid":
        return "`grid`" if "grid" in objective else ""
    named = any(f"${{mode.{kind}}}" in str(v) for node in nodes(content) for v in node.values())
    return f"`{content[kind]}`" if named and content[kind] != "none" else ""


def rows(cells: list[list[str]]) -> str:
    """Return the lines of a table; an empty cell is a dash."""
    return "".join(f"| {' | '.join(cell or '–' for cell in row)} |\n" for row in cells)


def table_of_modes() -> str:
    """Return mode, method with its paper, and what it begins with."""
    lines = [["`mode=`", "method", "source", "begins with"], ["---"] * 4]
    for mode, content in modes().items():
        paper = source(mode)
        link = f"[{paper['authors']}](https://arxiv.org/abs/{paper['number']})"
        lines.append([f"`{mode}`", paper["name"], link, beginning(content) or "random weights"])
    return rows(lines)


def table_of_methods() -> str:
    """Return the parts of every mode."""
    lines = [["`mode=`", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for mode, content in modes().items():
        cells = [
            ", ".join(filter(None, (part(content, kind) for kind in kinds)))
            for kinds in COLUMNS.values()
        ]
        lines.append([f"`{mode}`", *cells])
    return rows(lines)


def pages() -> dict[Path, str]:
    """Return the pages with their tables written anew."""
    tables = {"modes": table_of_modes, "methods": table_of_methods}
    return {
        page: BLOCK.sub(lambda m: m[1] + tables[m[2]]() + m[3], page.read_text())
        for page in (ROOT / name for name in PAGES)
    }


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
