"""Redaction: passwords, keys and tokens in the options of a run are neither written nor printed.

A secret is the text between :// and @ in an address (s3://key:secret@bucket), or the value of an option or parameter with
a name like `NAMES` (data.source.storage_options.aws_secret_access_key=..., ?token=...). The environment is never stored.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

MASK = "***"
NAMES = r"secret|password|passwd|token|credential|signature|(?:api|access|account|private)_?key"
_NAME = re.compile(NAMES, re.I)
# A secret may contain / and @, as those of S3 do; a number before a / is a port; a path has lost one of its slashes.
_ADDRESS = re.compile(r"(?<=\w:/)(/?)(?:[^/\s]*|[^/\s@:]*:(?!\d+/)\S*)@")
_OPTION = re.compile(rf"""((?:{NAMES})[\w-]*['"]?\s*[=:]\s*['"]?)[^\s'"&,}}\]]+""", re.I)


def masked_text(text: str) -> str:
    """Replace every secret in a text by ***."""
    return _OPTION.sub(rf"\1{MASK}", _ADDRESS.sub(rf"\1{MASK}@", text))


def masked(value: Any, *, secret: bool = False) -> Any:
    """Replace every secret in a plain configuration by ***."""
    if isinstance(value, dict):
        return {k: masked(v, secret=secret or bool(_NAME.search(str(k)))) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, secret=secret) for item in value]
    if secret and isinstance(value, str | int) and not isinstance(value, bool):
        return MASK
    return masked_text(value) if isinstance(value, str) else value


class MaskedStream:
    """A text stream that masks secrets."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(masked_text(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def masked_output() -> Iterator[None]:
    """Mask the secrets that the body prints."""
    with redirect_stdout(MaskedStream(sys.stdout)), redirect_stderr(MaskedStream(sys.stderr)):
        yield
