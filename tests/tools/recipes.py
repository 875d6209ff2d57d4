"""Fill in the tables of docs/recipes.md: `python tests/tools/recipes.py`.

The text of the page is written by hand. Between `<!-- runs: <data> -->` or `<!-- recipes: <data> -->` and `<!-- end -->` stands
a table, of the published runs on a data set from published_runs.csv, or of the recipes of a small set from their files.
"""

import csv
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PAGE, TABLE = ROOT / "docs" / "recipes.md", ROOT / "tests" / "commands" / "published_runs.csv"
RECIPES = ROOT / "conf" / "recipe"
BLOCK = re.compile(r"(<!-- (runs|recipes): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
RUNS_HEAD = (
    "| run | data | method | command: `python src/train.py` and | network | batch | steps | FID, one step | two steps | GPU-days | source |\n"
    "|---|---|---|---|---|--:|--:|---|---|---|--:|\n"
)
RECIPES_HEAD = (
    "| command: `python src/train.py` and | batch | steps | recipe |\n|---|--:|--:|---|\n"
)
SETTINGS = ("data", "trainer")
"""Groups with the settings that the table of small recipes shows."""


def command(run: str, data: str, mode: str) -> str:
    """Return the options of a run: those of its recipe, or its experiment."""
    is_experiment = (ROOT / "experiments" / f"{run}.yaml").is_file()
    return f"experiment={run}" if is_experiment else f"mode={mode} data={data}"


def runs_on(data: str) -> str:
    """Return the table of the published runs on a data set, and its sources by number."""
    with TABLE.open() as file:
        rows = [row for row in csv.DictReader(file) if row["data"] == data]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    lines = []
    for row in rows:
        given = f"`{command(row['run_id'], data, row['mode'])}`"
        steps = row["steps"].partition(" (")[0]
        shown = [row[name] for name in ("fid1", "fid2", "gpu_days")]
        number = str(sources.index(row["source"]) + 1)
        cells = [row["run_id"], data, row["mode"], given, row["network"], row["batch"], steps]
        lines.append(f"| {' | '.join([*cells, *shown, number])} |\n")
    numbered = [f"{number}. {source}\n" for number, source in enumerate(sources, 1)]
    return RUNS_HEAD + "".join(lines) + "\nSources:\n\n" + "".join(numbered)


def settings_of(recipe: str) -> dict[str, dict[str, object]]:
    """Return `SETTINGS` of a recipe, with those of the recipes that its defaults name."""
    content = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()) or {}
    merged: dict[str, dict[str, object]] = {key: {} for key in SETTINGS}
    named = [name for name in content.get("defaults", []) if name != "_self_"]
    for part in (*map(settings_of, named), content):
        for key in SETTINGS:
            merged[key] |= part.get(key, {})
    return merged


def recipes_of(data: str) -> str:
    """Return the table of the recipes of a data set that has no published runs; each row ends with the file's comment."""
    lines = []
    for file in sorted(RECIPES.glob(f"{data}_*.yaml")):
        settings, mode = settings_of(file.stem), file.stem.removeprefix(f"{data}_")
        batch, steps = settings["data"]["batch_size"], settings["trainer"]["max_steps"]
        comment = " ".join(re.findall(r"^# (?!@)(.*)$", file.read_text(), re.MULTILINE))
        said = comment.replace("<", "&lt;")
        lines.append(f"| `mode={mode} data={data}` | {batch} | {steps} | {said} |\n")
    return RECIPES_HEAD + "".join(lines)


def page() -> str:
    """Return the page with its tables written anew."""
    tables = {"runs": runs_on, "recipes": recipes_of}
    return BLOCK.sub(lambda m: m[1] + tables[m[2]](m[3]) + m[4], PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
