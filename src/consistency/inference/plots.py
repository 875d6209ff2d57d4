"""Grids of images, and the curves of a run."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

matplotlib.use("Agg")

GAP = 2
LEGIBLE_SIDE = 48
CAPTION = 18
MOST_COLUMNS = 16


def grid(images: UInt8[Tensor, "n c h w"], columns: int) -> Image.Image:
    """Put images in rows of `columns`, small ones enlarged by whole factors so that their pixels are visible."""
    factor = max(1, LEGIBLE_SIDE // images.shape[-1])
    large = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return to_pil_image(make_grid(large, nrow=columns, padding=GAP, pad_value=255))


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put pictures next to each other, each under its caption."""
    font = ImageFont.load_default(13)
    height = CAPTION + max(picture.height for _, picture in panels)
    width = sum(picture.width for _, picture in panels) + 4 * GAP * (len(panels) - 1)
    sheet = Image.new("RGB", (width, height), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for caption, picture in panels:
        draw.text((left + GAP, 1), caption, fill="black", font=font)
        sheet.paste(picture, (left, CAPTION))
        left += picture.width + 4 * GAP
    return sheet


def below_each_other(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put pictures of one width in one column, each under its caption."""
    return Image.fromarray(np.vstack([np.asarray(side_by_side([panel])) for panel in panels]))


def animation(frames: UInt8[Tensor, "n f c h w"], file: Path, milliseconds: int = 120) -> None:
    """Write an endless GIF: a grid of n sequences of f frames."""
    columns = columns_for(len(frames))
    sheets = [grid(images, columns) for images in frames.transpose(0, 1)]
    sheets[0].save(file, save_all=True, append_images=sheets[1:], duration=milliseconds, loop=0)


def columns_for(count: int, num_classes: int | None = None) -> int:
    """Return the columns of a grid: one a class if they fit on a page, else those of a square."""
    if num_classes is not None and num_classes <= MOST_COLUMNS:
        return num_classes
    return max(1, math.ceil(math.sqrt(count)))


COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d00")
DASHES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "X", "P", "*", "<")


def line_style(number: int) -> dict[str, Any]:
    """Return the style of a plot's line of that number; dashes and markers tell the first 36 apart without colours."""
    kinds = {"color": COLOURS, "linestyle": DASHES, "marker": MARKERS}
    return {name: kind[number % len(kind)] for name, kind in kinds.items()}


def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    picture: Path,
    x: str,
    y: str,
    scale: str = "log",
) -> None:
    """Draw y over x, whose axis has that scale, a line for each label."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), label=label, **line_style(number))
    axes.set(xscale=scale, xlabel=x, ylabel=y)
    axes.legend()
    figure.savefig(picture, dpi=110)


def draw_values(
    options: Mapping[str, Sequence[float | str]], values: Sequence[float], picture: Path
) -> None:
    """Draw values over each of several options, numbers or names, one panel an option; the axes of wide ranges by powers."""
    columns = min(3, len(options))
    rows = -(-len(options) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    for number, (name, given) in enumerate(options.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        numeric = all(isinstance(value, float) for value in given)
        axes.plot(given if numeric else list(map(str, given)), values, "o", markersize=4)
        axes.set_xlabel(name)
        axes.set_ylabel("value")
        if numeric and _is_wide([float(value) for value in given]):
            axes.set_xscale("log")
        if _is_wide(values):
            axes.set_yscale("log")
    figure.savefig(picture, dpi=100)


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > 20 * min(values)


FORMER_NAMES = {
    "N": "schedule/N",
    "mu": "schedule/mu",
    "train/learning_rate": "schedule/learning_rate",
    "images_per_second": "speed/images_per_second",
}
"""Metrics of older runs -> their names now."""


def read_metrics(file: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Read metrics.csv: the steps and values of every metric."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    with file.open(newline="") as rows:
        for row in csv.DictReader(rows):
            for name, value in row.items():
                if name not in ("step", "epoch") and value not in ("", None):
                    steps, values = curves.setdefault(FORMER_NAMES.get(name, name), ([], []))
                    steps.append(float(row["step"]))
                    values.append(float(value))
    return curves


def draw_curves(file: Path, picture: Path) -> None:
    """Draw loss, N(k), mu(k), learning rate and sample quality, as far as metrics.csv has them."""
    curves = read_metrics(file)
    panels = {
        "loss": ["train/loss"],
        "loss by noise quartile": [n for n in curves if "quartile" in n],
        "scales N(k)": ["schedule/N"],
        "target decay mu(k)": ["schedule/mu"],
        "learning rate": ["schedule/learning_rate"],
        "gradient norm": ["train/gradient_norm"],
        "Fréchet distance": [n for n in curves if "fid/" in n or "frechet_" in n],
    }
    shown = {title: names for title, names in panels.items() if names and names[0] in curves}
    if not shown:
        return
    rows = -(-len(shown) // 2)
    figure = Figure(
        figsize=(11, 2.8 * rows)
    )  # fixed margins, for a layout engine draws everything twice
    top, bottom = 1 - 0.3 / (2.8 * rows), 0.45 / (2.8 * rows)
    figure.subplots_adjust(left=0.09, right=0.98, top=top, bottom=bottom, wspace=0.24, hspace=0.4)
    for number, (title, names) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(rows, 2, number)
        for index, name in enumerate(names):
            style = line_style(index) | {"markersize": 2, "linewidth": 1}
            axes.plot(*curves[name], label=name, **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8)
        if title != "target decay mu(k)" and all(min(curves[n][1]) > 0 for n in names):
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(fontsize=7)
    figure.savefig(picture, dpi=100)
