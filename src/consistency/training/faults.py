"""What fails around a run, a disk, a folder or a connection: told in one line, and where it can be, tried again later."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from consistency.errors import UserError


def tell(text: str) -> None:
    """One line to the person who watches, clear of the progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


@contextmanager
def spared(what: str) -> Iterator[None]:
    """A write of `what` that fails in the body is told, and the run goes on."""
    try:
        yield
    except OSError as error:
        tell(f"{what} could not be written, the run goes on: {error}")


@contextmanager
def explained() -> Iterator[None]:
    """An error of the system in the body that nothing has spared, a logger's or the data's, ends in one message."""
    try:
        yield
    except OSError as error:
        # One from a process that loads data comes with that process's trace in front.
        reason = str(error).strip().splitlines()[-1:]
        raise UserError(
            f"expected disks, folders and connections that work\n  got: {type(error).__name__}: {''.join(reason)}\n"
            "  do: mend that; resume= continues the last checkpoint"
        ) from error
