"""Power-function averages on disk, and averages of any width from them [Karras et al. 2024, arXiv:2312.02696, Algorithm 3].

A run writes snapshots/<k>.safetensors, whose tensors are named power:<width>/<parameter>. Together with the averages in a
checkpoint of step k, they reconstruct the average of any width at that step: `weights=posthoc:<width>`.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from consistency.averaging import WIDEST, posthoc_coefficients
from consistency.checkpoints.contents import StateDict
from consistency.errors import UserError, require
from consistency.runtime.files import written_whole

POSTHOC, POWER = "posthoc:", "power:"


def reconstruct(
    sets: Mapping[str, StateDict], checkpoint: Path, k: int, name: str
) -> dict[str, Tensor]:
    """Return the weights of `name`, posthoc:<width>, at step k.

    sets: those in the checkpoint of step k. The snapshots lie beside its folder.
    """
    own = {float(n.removeprefix(POWER)): s for n, s in sets.items() if n.startswith(POWER)}
    expected = f"power-function averages in {checkpoint}, for weights={name}"
    remedy = "train with mode.average=power"
    require(bool(own), expected, f"the sets {', '.join(sets)}", remedy)
    width, folder = width_of(name), checkpoint.parent.parent / "snapshots"
    steps = {int(f.stem): f for f in folder.glob("*.safetensors") if f.stem.isdigit()}
    files = {step: steps[step] for step in sorted(steps) if step < k}
    require(
        bool(files) or width in own,
        f"snapshots of the run in {folder}, for weights={name}",
        "none before the step of the checkpoint",
        "train with callbacks.snapshots.every_n_train_steps below the length of the run",
    )
    stored = [(step, w) for step in (*files, k) for w in own]
    of_steps, widths = zip(*stored, strict=True)
    coefficients = posthoc_coefficients(of_steps, widths, k, width)
    total: dict[str, Any] = {}
    for (step, w), coefficient in zip(stored, coefficients.tolist(), strict=True):
        average = own[w] if step == k else _read(files[step], w)
        for parameter, tensor in average.items():
            total[parameter] = total.get(parameter, 0) + coefficient * tensor.double()
    return {parameter: tensor.float() for parameter, tensor in total.items()}


def write_snapshot(file: Path, averages: Mapping[str, StateDict]) -> None:
    """Write averages by name, whole or not at all."""
    tensors = {
        f"{average}/{name}": tensor.detach().cpu().contiguous()
        for average, weights in averages.items()
        for name, tensor in weights.items()
    }
    with written_whole(file) as part:
        part.write(save(tensors))


def width_of(name: str) -> float:
    """Return the width of posthoc:<width>."""
    width = 0.0
    with suppress(ValueError):
        width = float(name.removeprefix(POSTHOC))
    expected = f"weights={POSTHOC}<relative width above 0, at most {WIDEST:.3f}>"
    require(0 < width <= WIDEST, expected, name, f"for example weights={POSTHOC}0.1")
    return width


def _read(file: Path, width: float) -> dict[str, Tensor]:
    prefix = f"{POWER}{width:g}/"
    try:
        with safe_open(file, framework="pt") as content:
            names = [n for n in content.keys() if n.startswith(prefix)]
            return {n.removeprefix(prefix): content.get_tensor(n) for n in names}
    except Exception as error:  # a damaged file can fail in any way
        remedy = "remove it: the other snapshots may be enough"
        raise UserError(f"a snapshot of averages in {file}", str(error)[:200], remedy) from error
