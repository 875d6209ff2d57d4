"""The checkpoints that a run keeps, next, last and previous: a whole one is there at whatever moment the process dies."""

from pathlib import Path
from typing import Any

import torch

from consistency.checkpoint import LAST, NEXT, PREVIOUS
from consistency.errors import require
from consistency.runtime.files import (
    checksum_path,
    fingerprint,
    move,
    verify_checksum,
    write_checksum,
)

DAMAGED = "damaged.ckpt"


def promote(folder: Path) -> None:
    """Makes the next checkpoint the last, and the last the previous; called again, it ends what it had begun."""
    if (folder / NEXT).is_file():
        if (folder / LAST).is_file():
            move(folder / LAST, folder / PREVIOUS)
        move(folder / NEXT, folder / LAST)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its content; None where there is none at all. Changes nothing, so that
    every process of a run finds the same one.

    Raises `UserError` where all are damaged.
    """
    found = [folder / name for name in (NEXT, LAST, PREVIOUS) if (folder / name).is_file()]
    for path in found:
        try:
            verify_checksum(path)
            return path, torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception:  # a damaged file can fail in any way
            continue
    require(
        not found,
        f"a checkpoint in {folder} as it was written",
        f"{' and '.join(path.name for path in found)}, damaged",
        "begin a new run; init= may start it from a best.ckpt or another run",
    )
    return None


def settle(start: Path) -> None:
    """Puts the checkpoint that a run goes on from, which `newest` found, where its last belongs, and clears away what
    a process that died left half done.
    """
    folder = start.parent
    if start.name == NEXT:
        promote(folder)
    if start.name == PREVIOUS and (folder / LAST).is_file():
        # As the previous of the next one it would push out this one, which is whole.
        (folder / LAST).replace(folder / DAMAGED)
        checksum_path(folder / LAST).unlink(missing_ok=True)
    for file in (folder / LAST, folder / PREVIOUS):
        if file.is_file() and not checksum_path(file).is_file():
            write_checksum(file, fingerprint(file))
    for left in (folder / NEXT, checksum_path(folder / NEXT), *folder.glob("*.part")):
        left.unlink(missing_ok=True)
