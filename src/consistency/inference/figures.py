"""Figures of several panels for a page, as PNG and SVG; lines differ in dashes and markers, so that grey is enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from consistency.inference.plots import line_style

Points: TypeAlias = Sequence[tuple[float, float]]

MOST_POINTS = 200
"""Of a line: more are averaged in as many groups."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines by label over one axis.

    published: points by label beside the lines, which are drawn hollow.
    x_log: a logarithmic axis with a tick at every point, for few points.
    """

    title: str
    x: str
    lines: Mapping[str, Points]
    published: Mapping[str, Points] = field(default_factory=dict)
    x_log: bool = False


def draw(panels: Sequence[Panel], stem: Path, columns: int) -> list[Path]:
    """Draw panels in rows of `columns` with one legend; return the files <stem>.png and <stem>.svg."""
    rows = -(-len(panels) // columns)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    published = list(dict.fromkeys(label for panel in panels for label in panel.published))
    height = 2.9 * rows + 0.22 * len([*labels, *published]) + 0.2
    figure = Figure(figsize=(3.8 * columns + 0.4, height), layout="constrained")
    handles = {}
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for label, points in panel.lines.items():
            style = line_style(labels.index(label))
            xs, ys = zip(*thinned(points), strict=True)
            every = max(1, len(xs) // 6)
            handles[label] = axes.plot(
                xs, ys, label=label, markersize=5, linewidth=1.3, markevery=every, **style
            )[0]
        for label, points in panel.published.items():
            marker = "*" if published.index(label) % 2 else "d"
            look: dict[str, Any] = {
                "linestyle": "none",
                "markerfacecolor": "none",
                "markersize": 10,
            }
            xs, ys = zip(*points, strict=True)
            handles[label] = axes.plot(xs, ys, marker=marker, color="#606060", **look)[0]
        _scale(axes, panel)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=8)
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    with matplotlib.rc_context({"svg.hashsalt": "consistency", "svg.fonttype": "none"}):
        for file in files:
            figure.savefig(
                file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None
            )
            figure.set_layout_engine("none")  # it has placed everything
    return files


def _scale(axes: Axes, panel: Panel) -> None:
    """Set title and axes of a panel; the y axis is logarithmic if its values span more than a factor of ten."""
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x, fontsize=9)
    axes.grid(alpha=0.3)
    points = [p for line in (*panel.lines.values(), *panel.published.values()) for p in line]
    xs, ys = zip(*points, strict=True)
    if panel.x_log:
        ticks = sorted(set(xs))
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    else:
        axes.locator_params(axis="x", nbins=5)
    if min(ys) > 0 and max(ys) > 10 * min(ys):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))


def thinned(points: Points) -> Points:
    """Return the points in order of x, if they are many the means of neighbours."""
    ordered = sorted(points)
    if len(ordered) <= MOST_POINTS:
        return ordered
    groups = np.array_split(np.array(ordered), MOST_POINTS)
    return [(float(x), float(y)) for x, y in (group.mean(0) for group in groups)]
