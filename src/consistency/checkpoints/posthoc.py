"""Power-function averages on disk, and averages of any width from them [Karras et al. 2024, arXiv:2312.02696, Algorithm 3].

A run writes snapshots/<k>.safetensors, whose tensors are named power:<width>/<parameter>. Together with the averages in a
checkpoint of step k, they reconstruct the average of any width at that step: `weights=posthoc:<width>`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from consistency.averaging import WIDEST, posthoc_coefficients
from consistency.checkpoints.contents import StateDict
from consistency.errors import UserError, require
from consistency.runtime.files import written_whole

POSTHOC, POWER = "posthoc:", "power:"
SNAPSHOTS = "snapshots"


def power_name(width: float) -> str:
    """Return the name of a stored power-function average."""
    return f"{POWER}{width:g}"


def set_name(average: str) -> str:
    """Return the name of the set of weights of an average: power:<width>, or ema:<decay>."""
    return average if average.startswith(POWER) else f"ema:{average}"


class Sets(dict[str, StateDict]):
    """The sets of weights of a run by name; those of posthoc:<width> are reconstructed when they are looked up."""

    def __init__(
        self, sets: Mapping[str, StateDict], reconstruct: Callable[[str], StateDict]
    ) -> None:
        super().__init__(sets)
        self.reconstruct = reconstruct

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).startswith(POSTHOC)

    def __missing__(self, name: str) -> StateDict:
        if not name.startswith(POSTHOC):
            raise KeyError(name)
        return self.reconstruct(name)


def write_snapshot(folder: Path, k: int, averages: Mapping[float, StateDict]) -> None:
    """Write the averages of step k, by width, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{power_name(width)}/{name}": tensor.detach().cpu().contiguous()
        for width, average in averages.items()
        for name, tensor in average.items()
    }
    with written_whole(folder / f"{k:08d}.safetensors") as file:
        save_file(tensors, file.name)


def reconstruct(
    checkpoint: Path, k: int, averages: Mapping[str, StateDict], name: str
) -> dict[str, Tensor]:
    """Return the weights of `name`, posthoc:<width>, at step k.

    averages: those in the checkpoint of step k, by name. The snapshots lie beside the folder of the checkpoint.
    """
    own = {float(n.removeprefix(POWER)): a for n, a in averages.items() if n.startswith(POWER)}
    require(
        bool(own),
        f"power-function averages in {checkpoint}, for weights={name}",
        f"the averages {', '.join(averages) or 'none'}",
        "train with callbacks.evaluation_ema.widths=[0.05,0.1]",
    )
    width = width_of(name)
    folder = checkpoint.parent.parent / SNAPSHOTS
    files = {int(file.stem): file for file in folder.glob("*.safetensors") if file.stem.isdigit()}
    files = {step: file for step, file in sorted(files.items()) if step < k}
    require(
        bool(files) or width in own,
        f"snapshots of the run in {folder}, for weights={name}",
        "none before the step of the checkpoint",
        "train with callbacks.snapshots.every_n_train_steps below the length of the run",
    )
    stored = [(step, w) for step in (*files, k) for w in own]
    steps, widths = zip(*stored, strict=True)
    coefficients = posthoc_coefficients(steps, widths, k, width)
    total = {
        n: torch.zeros_like(tensor, dtype=torch.float64)
        for n, tensor in next(iter(own.values())).items()
    }
    for (step, w), coefficient in zip(stored, coefficients.tolist(), strict=True):
        average = own[w] if step == k else _read(files[step], w)
        for parameter, tensor in average.items():
            total[parameter] += coefficient * tensor.double()
    return {n: tensor.float() for n, tensor in total.items()}


def width_of(name: str) -> float:
    """Return the width of posthoc:<width>."""
    text = name.removeprefix(POSTHOC)
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    expected = f"weights={POSTHOC}<relative width above 0, at most {WIDEST:.3f}>"
    require(0 < width <= WIDEST, expected, name, f"for example weights={POSTHOC}0.1")
    return width


def _read(file: Path, width: float) -> dict[str, Tensor]:
    prefix = f"{power_name(width)}/"
    try:
        with safe_open(file, framework="pt") as content:
            names = [n for n in content.keys() if n.startswith(prefix)]
            return {n.removeprefix(prefix): content.get_tensor(n) for n in names}
    except Exception as error:  # a damaged file can fail in any way
        remedy = "remove it: the other snapshots may be enough"
        raise UserError(f"a snapshot of averages in {file}", str(error)[:200], remedy) from error
