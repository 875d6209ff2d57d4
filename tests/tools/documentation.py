"""Pages of the documentation site that are made of other files: hooks of mkdocs.yml, whose pages stand in docs/.

- Every module of src/consistency becomes a page of its docstrings and code, in the section API.
- CHANGELOG.md and CONTRIBUTING.md become pages, and so does every notebook of docs/notebooks.
- Links to files outside docs/ are right in the repository. On the site, one to a module leads to its page, one with a name
  (`../src/consistency/grids.py#KarrasGrid`) to the entry of that name, one to README.md to the first page, one to CHANGELOG.md or
  CONTRIBUTING.md to its page; others become text.
"""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "consistency"
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}  # fmt: skip
"""Files in the root that are pages of the site."""

LATER_FOUND = "---\nsearch:\n  boost: 0.1\n---\n\n"
"""The head of a page that the search lists after the others."""

LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+)([^)#\s]+)(?:#([^)\s]+))?\)")


def modules(folder: Path) -> list[Path]:
    """Return the modules of a folder in the order of their names; an empty `__init__` is left out."""
    return sorted(file for file in folder.glob("*.py") if file.read_text().strip())


def dotted(module: Path) -> str:
    """Return the name that an import takes."""
    return ".".join(module.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def api_page(module: Path) -> str:
    """Return the path of a module's page on the site."""
    return f"api/{dotted(module)}.md"


def api_section(folder: Path) -> list[dict[str, Any]]:
    """Return the navigation of a folder's modules and of the folders below it."""
    entries: list[dict[str, Any]] = [
        {dotted(m).rpartition(".")[2]: api_page(m)} for m in modules(folder)
    ]
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and list(p.glob("*.py")))
    return entries + [{room.name: api_section(room)} for room in inner]


def notebook_page(file: Path) -> str:
    """Return a notebook as Markdown: its texts, and its cells as blocks of Python."""
    cells = json.loads(file.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    pages = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join([*pages, f"[This page as a notebook]({file.name})", ""])


def root_page(file: Path) -> str:
    """Return the text of a file in the root, with its links as they are in docs/."""
    text = file.read_text().replace("](docs/", "](")
    for name, page in OUTSIDE.items():
        text = text.replace(f"]({name})", f"]({page})")
    return text


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the section API to the navigation."""
    config.nav = [*(config.nav or []), {"API": api_section(PACKAGE)}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of other files."""
    made = {OUTSIDE[name]: root_page(ROOT / name) for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
    for module in PACKAGE.rglob("*.py"):
        if module.read_text().strip():
            made[api_page(module)] = f"{LATER_FOUND}::: {dotted(module)}\n"
    for notebook in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        made[f"notebooks/{notebook.stem}.md"] = notebook_page(notebook)
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files outside docs/ to their pages."""
    depth = page.file.src_uri.count("/")

    def led(match: re.Match[str]) -> str:
        text, up, path, name = match.groups()
        module = ROOT / path
        if up.count("../") != depth + 1:
            return match[0]
        if path in OUTSIDE:
            return f"[{text}]({'../' * depth}{OUTSIDE[path]})"
        if module.suffix == ".py" and PACKAGE in module.parents:
            return f"[{text}][{dotted(module)}{f'.{name}' if name else ''}]"
        return text

    return LINK.sub(led, markdown)
