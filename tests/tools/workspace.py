"""Draw the W&B workspace of offline runs: `python tests/tools/workspace.py runs/digits runs/edm runs/cd docs/workspace.png`.

Sections, panels, axis and columns are those that `make dashboard` gives to W&B; curves, images and the values of the columns are
read from the records that the runs would upload. W&B draws them with its own menus and colours.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from consistency.commands.dashboard import AXES, COLUMNS, CURVES, GRIDS
from consistency.inference.plots import DASHES
from wandb_files import contents

INKS = ("#000000", "#0072b2", "#e69f00", "#999999")
"""Colours of the runs, of different brightness, so that they differ in grey too."""

AXIS = AXES["steps"]
PANELS = max(map(len, CURVES.values()))
"""Panels in a row."""


@dataclass(frozen=True)
class Run:
    """The offline records of a run."""

    folder: Path
    ink: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]

    def curves(self, pattern: str) -> Iterator[tuple[str, list[float], list[float]]]:
        """Yield name, x and y of the metrics whose names fit a pattern."""
        for name in sorted({name for row in self.rows for name in row if re.search(pattern, name)}):
            points = [(row[AXIS], row[name]) for row in self.rows if name in row]
            yield name, [x for x, _ in points], [float(y) for _, y in points]

    def image(self, key: str) -> Path | None:
        """Return the file of the last image of a key, or None."""
        named = [row[f"{key}/filenames"][-1] for row in self.rows if f"{key}/filenames" in row]
        files = [file for name in named[-1:] for file in self.folder.glob(f"wandb/*/files/{name}")]
        return files[0] if files else None


def read(folder: Path, ink: str) -> Run:
    """Read the offline records of a run, which has one folder for each of its starts."""
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    if not files:
        raise SystemExit(
            f"{folder} has no offline records of W&B: train it with WANDB_MODE=offline"
        )
    starts = [contents(file) for file in files]
    return Run(folder, ink, [row for rows, _ in starts for row in rows], starts[-1][1])


def draw_curves(axes: Axes, title: str, pattern: str, runs: Sequence[Run]) -> None:
    """Draw the metrics that fit a pattern: a colour for each run, dashes for each metric."""
    axes.set_title(title, fontsize=8)
    curves = [(run, *curve) for run in runs for curve in run.curves(pattern)]
    names = list(dict.fromkeys(name for _, name, *_ in curves))
    styles = {name: DASHES[number % len(DASHES)] for number, name in enumerate(names)}
    for run, name, x, y in curves:
        dots = "." if len(x) < 12 else ""
        axes.plot(x, y, styles[name], marker=dots, color=run.ink, linewidth=1)
    for name in names:
        axes.plot([], [], styles[name], color="#555555", linewidth=1, label=name)
    axes.spines[:].set_color("#bbbbbb")
    if not names:
        axes.text(0.5, 0.5, "no data in these runs", ha="center", fontsize=7)
        axes.set(xticks=[], yticks=[])
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * len(names) * (high - low))  # room for the legend
    axes.legend(fontsize=5, frameon=False, loc="upper right", borderpad=0, labelspacing=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(AXIS, fontsize=6, labelpad=1)
    axes.tick_params(labelsize=6, length=2)


def draw_image(axes: Axes, run: Run, key: str) -> None:
    """Draw the last image of a key."""
    axes.set_title(f"{run.folder.name}  {key}", fontsize=7, color=run.ink)
    axes.set_axis_off()
    if file := run.image(key):
        with Image.open(file) as image:
            axes.imshow(image)


def draw_runs(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the list of runs, with the pinned columns below each name."""
    axes.set_axis_off()
    lines = [(f"Runs ({len(runs)})", "black", "bold")]
    for run in runs:
        lines.append((f"\u25cf {run.folder.name}", run.ink, "bold"))
        lines += [
            (f"    {name}: {run.config[name] or '-'}", "#444444", "normal") for name in COLUMNS
        ]
    for number, (text, ink, weight) in enumerate(lines):
        style = {"color": ink, "weight": weight, "fontsize": 7}
        axes.annotate(text, (0, 1), (0, -14 * number), "axes fraction", "offset points", **style)


def draw(folders: Sequence[Path], picture: Path) -> None:
    """Draw the list of runs on the left and the sections below each other."""
    runs = [read(*each) for each in zip(folders, INKS, strict=False)]
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 6))
    draw_runs(left.subplots(), runs)
    first, *others = right.subfigures(1 + len(CURVES), 1)
    shown = [(run, key) for run in runs for key in GRIDS if run.image(key)]
    sections = zip(others, CURVES.items(), strict=True)
    heading = {"x": 0.005, "ha": "left", "fontsize": 9, "weight": "bold"}
    first.suptitle("samples", **heading)
    for axes, (run, key) in zip(first.subplots(1, len(shown)), shown, strict=True):
        draw_image(axes, run, key)
    for section, (name, panels) in sections:
        section.suptitle(name, **heading)
        row = section.subplots(1, PANELS)
        for axes, (title, pattern) in zip(row, panels.items(), strict=False):
            draw_curves(axes, title, pattern, runs)
        for axes in row[len(panels) :]:
            axes.set_axis_off()
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    *folders, picture = map(Path, sys.argv[1:])
    draw(folders, picture)
