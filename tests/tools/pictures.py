"""Draw the pictures of the documentation into docs/: `make pictures`.

idea.png comes from a law with an exact answer. The others need runs, which docs/first-run.md and docs/data.md train: `runs/digits`,
`runs/edm` and `runs/cd` on the digits, `runs/coloured` on coloured ones. A picture whose run is missing is left as it is, with one line.
"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import coloured_digits
import numpy as np
import torch
import workspace
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from analytic import THREE_MODES
from consistency.checkpoints.load import load
from consistency.editing import grid_times
from consistency.inference.plots import draw_curves, grid, side_by_side
from consistency.samplers import multistep

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
T_MAX = 1.6
"""The right end of the picture of the idea, at which the noise covers the data."""

PATHS, CHOSEN = 15, 11
TIMES = np.linspace(0, T_MAX, 161)
EDITS = {
    "inpaint": ["mask=center", "mask.size=4"],
    "colorize": [],
    "superres": ["task.pairing.patch=2"],
    "stroke": [],
    "denoise": ["task.times=[0.5]"],
    "interpolate": [],
}
"""Tasks of edit.py, and their options in docs/sampling.md."""


def flow(x: Tensor, t: float, r: float) -> Tensor:
    """Follow the PF-ODE of the law from time t to time r."""
    start, end = (torch.full((len(x),), time, dtype=x.dtype) for time in (t, r))
    return THREE_MODES.flow(x[:, None, None, None], start, end).flatten()


def density(x: Tensor, t: float) -> Tensor:
    """Return the density of x_t."""
    variance = THREE_MODES.stds**2 + t**2
    each = (-((x[:, None] - THREE_MODES.means) ** 2) / (2 * variance)).exp() / variance.sqrt()
    return (THREE_MODES.weights * each).sum(-1)


def draw_paths(axes: Axes) -> None:
    """Draw the law at every time, paths of its PF-ODE, and points of one path with arrows to its start."""
    x = torch.linspace(-3, 3, 400, dtype=torch.double)
    levels = torch.stack([density(x, float(t)) for t in TIMES], dim=1)
    shade = (levels / levels.amax(0)).numpy()  # each time by itself: at t = 0 the law is narrow
    place = (0, T_MAX, -3, 3)
    axes.imshow(shade, extent=place, origin="lower", aspect="auto", cmap="Greys", alpha=0.4)
    shares = (torch.arange(PATHS, dtype=torch.double) + 0.5) / PATHS
    ends = flow(80 * torch.special.ndtri(shares), 80.0, T_MAX)
    paths = torch.stack([flow(ends, T_MAX, float(t)) for t in TIMES])
    axes.plot(TIMES, paths, color="black", linewidth=0.7)
    chosen = paths[:, CHOSEN].tolist()
    axes.plot(TIMES, chosen, color="tab:red", linewidth=2.2)
    arrow = {"arrowstyle": "-|>", "color": "tab:red", "linestyle": "--", "linewidth": 1.4}
    for number in (50, 90, 130, 160):
        point = (float(TIMES[number]), chosen[number])
        bent = arrow | {"connectionstyle": "arc3,rad=0.25"}
        axes.annotate("", (0, chosen[0]), point, arrowprops=bent)
        axes.plot(*point, "o", color="tab:red")
    axes.plot(0, chosen[0], "s", color="tab:red", clip_on=False, markersize=8, zorder=9)
    axes.set(xlabel="time t, the standard deviation of the noise", ylabel="$x_t$", ylim=(-3, 3))
    axes.set_title("Paths of the PF-ODE; f sends all points of one to its start", fontsize=10)


def draw_map(axes: Axes) -> None:
    """Draw the consistency function at several times."""
    z = torch.linspace(-1.8, 1.8, 1001, dtype=torch.double)
    for t, style in ((0.002, ":"), (0.2, "-."), (0.5, "--"), (80.0, "-")):
        spread = (THREE_MODES.std**2 + t**2) ** 0.5
        axes.plot(z, flow(spread * z, t, 0.0), style, color="black", label=f"t = {t:g}")
    axes.set(xlabel="$x_t$ in its standard deviations", ylabel="f($x_t$, t), the start of the path")
    axes.set_title("f itself: the identity at t = 0.002, steps between the modes at t = 80", fontsize=10)  # fmt: skip
    axes.legend(fontsize=8)


def draw_idea(file: Path) -> None:
    """Draw paths and map side by side."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_paths(left)
    draw_map(right)
    figure.savefig(file, dpi=80)


def draw_steps(teacher: Path, student: Path, file: Path) -> None:
    """Draw images from the same noise: of the teacher, and of its student in one, two and four steps."""
    denoiser, model = load(teacher), load(student)
    points = model.card.process.grid
    ends = {"t_min": points.t_min, "t_max": points.t_max}
    four = partial(multistep, times=grid_times(points, 5), **ends, clip=True)
    classes = list(range(10))
    panels = {
        "teacher, 35 evaluations": denoiser.sample(50, steps=18, labels=classes),
        "1 step": model.sample(50, steps=1, labels=classes),
        "2 steps": model.sample(50, steps=2, labels=classes),
        "4 steps": model.sample(50, sampler=four, labels=classes),
    }
    sheets = [(name, grid(images, 5)) for name, images in panels.items()]
    side_by_side(sheets).save(file, optimize=True)


def draw_edits(run: Path, folder: Path) -> None:
    """Draw the sheet of every task: the commands of docs/sampling.md."""
    with tempfile.TemporaryDirectory() as room:
        coloured_digits.write(Path(room) / "few", 6)
        coloured_digits.write(Path(room) / "noisy", 6, 0.5)
        for task, options in EDITS.items():
            given = f"input={room}/{'noisy' if task == 'denoise' else 'few'}"
            paths = [f"checkpoint={run.resolve()}", f"output={room}/{task}"]
            paths += [given] if task != "interpolate" else []
            command = [sys.executable, str(ROOT / "src" / "edit.py"), f"task={task}", *options]
            subprocess.run([*command, *paths], check=True)
            (folder / f"edit_{task}.png").write_bytes(Path(f"{room}/{task}/grid.png").read_bytes())


def main() -> None:
    """Draw every picture whose run is there."""
    draw_idea(DOCS / "idea.png")
    names = ("digits", "edm", "cd", "coloured")
    digits, edm, cd, coloured = (Path("runs") / name for name in names)
    pictures = {
        "steps.png": ((edm, cd), lambda: draw_steps(edm, cd, DOCS / "steps.png")),
        "curves.png": ((digits,), lambda: draw_curves(digits / "metrics.csv", DOCS / "curves.png")),
        "workspace.png": (
            (digits, edm, cd),
            lambda: workspace.draw([digits, edm, cd], DOCS / "workspace.png"),
        ),
        "edit_*.png": ((coloured,), lambda: draw_edits(coloured, DOCS)),
    }
    for name, (runs, draw) in pictures.items():
        missing = [str(run) for run in runs if not (run / "metrics.csv").is_file()]
        if missing:
            print(f"{name}: not drawn, no run at {', '.join(missing)}")
        else:
            draw()
            print(f"{name}: drawn")


if __name__ == "__main__":
    main()
