"""Detection of a checkpoint's format, by the content and never by the name."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from consistency.checkpoints import diffusers, jcm, nvlabs, openai, ours, wrapped
from consistency.checkpoints.contents import Checkpoint, ContentError, Hints, unreadable
from consistency.checkpoints.msgpack_reader import read_messagepack
from consistency.checkpoints.pickle_reader import read_pickle, read_zip
from consistency.checkpoints.safetensors import SEALED, read_sealed
from consistency.errors import UserError
from consistency.runtime.files import verify_checksum

CONTAINERS: dict[bytes, Callable[[Path], Any]] = {
    rb"PK\x03\x04": read_zip,
    rb".{4}\0{4}\{": read_sealed,
    rb"\x80[\x02-\x05]": read_pickle,
    rb"\{": diffusers.read_shards,
    rb"[\x81-\x8f\xde\xdf]": read_messagepack,
}
"""First bytes of a file -> the reader of its container. A safetensors file begins with a length and a brace."""

STATE_DICTS = (nvlabs, openai, diffusers)
"""Formats of state dicts, in the order in which a content is offered to them."""


def read_checkpoint(path: Path, hints: Hints) -> Checkpoint:
    """Read a file or folder of any format, print its notes, and turn every failure into a `UserError`."""
    file = path / SEALED if (path / SEALED).is_file() else path
    beside_settings = (file.parent / "config.json").is_file()
    try:
        verify_checksum(path)
        if file.is_dir() or (beside_settings and file.name.startswith(diffusers.WEIGHTS)):
            checkpoint = diffusers.open_path(file, hints)
        else:
            with file.open("rb") as stream:
                first = stream.read(16)
            readers = (r for mark, r in CONTAINERS.items() if re.match(mark, first, re.DOTALL))
            read = next(readers, None)
            if read is None:
                start = f"a file that begins with {first!r}" if first else "an empty file"
                raise ContentError(start)
            content = read(file)
            whole = (form.open_content(content, path, hints) for form in (ours, jcm, nvlabs))
            states = (wrapped.open_sets(content, path, hints, form) for form in STATE_DICTS)
            opened = next(filter(None, chain(whole, states)), None)
            if opened is None:
                anchors = " or ".join(form.ANCHORS[0] for form in STATE_DICTS)
                raise ContentError(
                    "a file whose content is no model of these formats: "
                    f"{wrapped.first_names(content)}, where a state dict of ours would have {anchors}"
                )
            checkpoint = opened
        if hints.role is not None and checkpoint.card.role is None:
            card = checkpoint.card.with_role(hints.role, path)
            checkpoint = replace(checkpoint, card=card)
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise unreadable(path, error) from error
    for note in checkpoint.notes:
        print(f"{path.name}: {note}", file=sys.stderr)
    return checkpoint
