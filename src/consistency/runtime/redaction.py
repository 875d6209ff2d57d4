"""Passwords, keys and tokens: the options of a run use them, and they are kept out of all that is written or printed.

Secret is what stands between :// and @ in an address (s3://key:secret@bucket), and the value of an option or parameter
whose name says so (data.source.storage_options.aws_secret_access_key=..., ?token=...). The environment is never stored.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

MASK = "***"
NAMES = r"secret|password|passwd|token|credential|signature|(?:api|access|account|private)_?key"
_NAME = re.compile(NAMES, re.I)
# A secret may hold / and @ itself, as those of S3 do; a number before a / is a port; a path has lost one of its slashes.
_ADDRESS = re.compile(r"(?<=\w:/)(/?)(?:[^/\s]*|[^/\s@:]*:(?!\d+/)\S*)@")
_OPTION = re.compile(rf"""((?:{NAMES})[\w-]*['"]?\s*[=:]\s*['"]?)[^\s'"&,}}\]]+""", re.I)


def masked_text(text: str) -> str:
    """The text with *** in the place of every secret."""
    return _OPTION.sub(rf"\1{MASK}", _ADDRESS.sub(rf"\1{MASK}@", text))


def masked(value: Any, *, secret: bool = False) -> Any:
    """A plain configuration with *** in the place of every secret; all else as it is."""
    if isinstance(value, dict):
        return {k: masked(v, secret=secret or bool(_NAME.search(str(k)))) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, secret=secret) for item in value]
    if secret and isinstance(value, str | int) and not isinstance(value, bool):
        return MASK
    return masked_text(value) if isinstance(value, str) else value


class Masking:
    """A stream of text that masks whatever is written to it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes the text without its secrets."""
        self.stream.write(masked_text(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes all texts without their secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def masked_output() -> Iterator[None]:
    """Masks what this process prints."""
    out: Any = Masking(sys.stdout)
    err: Any = Masking(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        yield
