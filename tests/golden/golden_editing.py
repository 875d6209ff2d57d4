"""Comparisons of zero-shot editing with golden data: the released functions begin with noise alone."""

import torch

from consistency.editing import ColourBasis, Pixels, Task, colorize, edit, superres
from consistency.randomness import generator
from consistency.samplers import indexed_times
from consistency.tensors import Data
from golden_formulas import GRID, T_MAX, T_MIN
from golden_harness import Archive, Tolerance
from golden_samplers import STUDENT_IMAGE, openai_denoiser, replayed, with_noise

BASIS = Tolerance(absolute=1e-12)


@torch.no_grad()
def compare_editing(archive: Archive) -> None:
    """Every task of the file: the edited images, and the reference that the released code shows."""
    for name in archive.matching("*.draws"):
        compare_task(archive, name.removesuffix(".draws"))


def compare_task(archive: Archive, case: str) -> None:
    y, shown = archive.tensor(f"{case}.images"), torch.zeros(())
    if f"{case}.mask" in archive:
        kept = archive.tensor(f"{case}.mask").to(y)
        task, shown = Task(Pixels(), 1 - kept), torch.full_like(y, -1)
    elif f"{case}.Q_float64" in archive:
        task = colorize(shape_of(y), generator(0, "edit"))
        compare_basis(archive, f"{case}.Q_float64")
    else:
        patch = patch_of(torch.from_numpy(archive.arrays[f"{case}.out_images"]))
        task = superres(shape_of(y), generator(0, "edit"), patch=patch)
    archive.compare(f"{case}.out_images", task.imposed(y, shown.expand_as(y)), STUDENT_IMAGE)
    indices = archive.input(f"{case}.ts").tolist()
    steps = int(archive.number(f"{case}.steps"))
    *times, last = GRID.at(torch.tensor(indices), steps).tolist()
    noise = replayed(archive.tensor(f"{case}.draws"))
    # The first noise has deviation t_max, whatever the first index.
    scale = iter([T_MAX / times[0]])
    x_0 = edit(
        openai_denoiser(archive, "online", boundary=True),
        lambda: next(scale, 1.0) * noise(),
        y,
        task,
        archive.tensor(f"{case}.y") if f"{case}.y" in archive else None,
        times=indexed_times(indices, steps, GRID) if finished(indices, steps) else times,
        t_min=T_MIN,
        start="noise",
        clip=True,
    )
    if not finished(indices, steps):  # a list that our commands refuse: the last noise stays in
        x_0 = x_0 + with_noise(last, GRID) * noise()
    archive.compare(f"{case}.out_x", x_0, STUDENT_IMAGE)


def finished(indices: list[int], steps: int) -> bool:
    """Whether a list of indices is one that our commands take."""
    return indices[0] == 0 and indices[-1] == steps - 1


def shape_of(y: Data) -> tuple[int, int, int]:
    _, channels, height, width = y.shape
    return channels, height, width


def patch_of(means: Data) -> int:
    """The side of the largest squares of one colour that an image of patch means consists of."""
    sides = [p for p in range(1, means.shape[-1] + 1) if means.shape[-1] % p == 0]
    blocks = {p: means.unfold(2, p, p).unfold(3, p, p).flatten(-2) for p in sides}
    return max(p for p, b in blocks.items() if float((b.amax(-1) - b.amin(-1)).max()) < 1e-5)


def compare_basis(archive: Archive, name: str) -> None:
    """The published basis; the sign of a free column means nothing."""
    theirs, ours = torch.from_numpy(archive.arrays[name]), ColourBasis().matrix
    free = (ours * theirs).sum(0)[1:].sign()
    archive.compare(name, ours * torch.cat([torch.ones(1), free]), BASIS)
