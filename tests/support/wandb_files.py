"""Readers of the offline files of W&B."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as protocol

ROOT = Path(__file__).parents[2]
BLOCK, HEADER = 32768, 7


def records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: a LevelDB log of protocol buffers."""
    data, position, parts = file.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):
            record = protocol.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def documented() -> set[str]:
    """Return the names that docs/wandb.md explains."""
    page = (ROOT / "docs" / "wandb.md").read_text().partition("## Names")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall("`([^`]+)`", row)}


def as_documented(logged: set[str]) -> set[str]:
    """Return the most specific documented name of each logged one, or itself if there is none."""
    patterns = sorted(documented(), key=len, reverse=True)

    def place(name: str) -> str:
        fits = (p for p in patterns if re.fullmatch(re.sub("<.+?>", r"[\\w.:]+", p), name))
        return next(fits, name)

    return {place(name) for name in logged}


def names(file: Path) -> set[str]:
    """Return the names that a run logged in a .wandb file, without W&B's own."""
    history = [r.history for r in records(file) if r.WhichOneof("record_type") == "history"]
    found = {i.nested_key[0] if i.nested_key else i.key for row in history for i in row.item}
    return {name for name in found if not name.startswith("_")}


def contents(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the logged rows and the config of a .wandb file."""
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        for update in (*record.run.config.update, *record.config.update):
            config["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
    return rows, config
