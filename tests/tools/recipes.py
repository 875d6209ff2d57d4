"""Write docs/recipes.md from the table of published runs: `python tests/tools/recipes.py`."""

import csv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE, TABLE = ROOT / "docs" / "recipes.md", ROOT / "tests" / "commands" / "published_runs.csv"
HEAD = """# Published runs

Each row is one command. Its settings are those of the released script, else of the paper; a test compares every column of
`tests/commands/published_runs.csv`, which names the source of each value, with what the command composes to. None of them was run here.
`mode=<mode> data=<data>` is a recipe, `conf/recipe/<data>_<mode>.yaml`; the others are `experiments/<run>.yaml`. FID is that of 50,000
samples in one and in two steps, of denoisers with Heun's method.

- `teacher=` and the initial weights are the published files; [checkpoints.md](checkpoints.md) says how they are fetched.
- `16-mixed` needs a GPU; on a CPU say `trainer.precision=32-true`.
- Paper and released script differ in batch, rate, mu(k) and initial weights of CT: `..._paper` is the paper.
- The data are prepared as `conf/data/<data>.yaml` says. Measure with `python src/evaluate.py checkpoint=<run> data=<data>`
  ([evaluation.md](evaluation.md)).

| run | command: `python src/train.py` and | network | batch | steps | FID, one step | two steps |
|---|---|---|--:|--:|---|---|
"""


def command(run: str, data: str, mode: str) -> str:
    """Return the options of a run: those of its recipe, or its experiment."""
    is_experiment = (ROOT / "experiments" / f"{run}.yaml").is_file()
    return f"experiment={run}" if is_experiment else f"mode={mode} data={data}"


def page() -> str:
    """Return the page."""
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    lines = []
    for row in rows:
        run = row["run_id"]
        given = f"`{command(run, row['data'], row['mode'])}`"
        steps = row["steps"].partition(" (")[0]
        cells = (run, given, row["network"], row["batch"], steps, row["fid1"], row["fid2"])
        lines.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
