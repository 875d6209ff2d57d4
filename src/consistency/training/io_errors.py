"""Errors of disks, folders and connections around a run: one line each, and training continues if it can."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from consistency.errors import UserError


@rank_zero_only
def warn(text: str) -> None:
    """Print a warning on rank 0, clear of the progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


@contextmanager
def tolerate_write_errors(name: str) -> Iterator[None]:
    """Warn if the body cannot write the file `name`, and continue."""
    try:
        yield
    except OSError as error:
        warn(f"{name} could not be written, the run goes on: {error}")


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn an uncaught OSError in the body, of a logger or of the data, into a `UserError`."""
    try:
        yield
    except OSError as error:
        reason = str(error).strip().rpartition("\n")[2]  # below the traceback of a loader's worker
        got = f"{type(error).__name__}: {reason}"
        remedy = "mend that; resume= continues the last checkpoint"
        raise UserError("disks, folders and connections that work", got, remedy) from error
