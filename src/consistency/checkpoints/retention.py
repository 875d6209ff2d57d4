"""The checkpoints that a run keeps: next, last and previous. A whole one exists at whatever moment the process dies."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from consistency.checkpoints.load import LAST, NEXT, PREVIOUS
from consistency.errors import require
from consistency.runtime import files


def promote(folder: Path) -> None:
    """Rename next to last, and last to previous; a second call completes an interrupted first."""
    if (folder / NEXT).is_file():
        if (folder / LAST).is_file():
            files.move(folder / LAST, folder / PREVIOUS)
        files.move(folder / NEXT, folder / LAST)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint and its content, or None if there is no checkpoint.

    Raises `UserError` if all are damaged. Changes nothing, so every process of a run chooses the same one.
    """
    paths = [folder / name for name in (NEXT, LAST, PREVIOUS) if (folder / name).is_file()]
    for path in paths:
        with suppress(Exception):  # a damaged file can fail in any way
            files.verify_checksum(path)
            return path, torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    require(
        not paths,
        f"a checkpoint in {folder} as it was written",
        f"{' and '.join(path.name for path in paths)}, damaged",
        "begin a new run; init= may start it from a best.ckpt or another run",
    )
    return None


def settle(start: Path) -> None:
    """Make the checkpoint that `newest` returned the last of a resumed run, and remove the leftovers of a dead process."""
    folder = start.parent
    if start.name == NEXT:
        promote(folder)
    if start.name == PREVIOUS and (folder / LAST).is_file():
        # The damaged last must not become the previous of the next one, in the place of a whole checkpoint.
        (folder / LAST).replace(folder / "damaged.ckpt")
        files.checksum_path(folder / LAST).unlink(missing_ok=True)
    for file in (folder / LAST, folder / PREVIOUS):
        if file.is_file() and not files.checksum_path(file).is_file():
            files.write_checksum(file, files.fingerprint(file))
    for left in (folder / NEXT, files.checksum_path(folder / NEXT), *folder.glob("*.part")):
        left.unlink(missing_ok=True)
