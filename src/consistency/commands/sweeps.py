"""Sweeps: which options vary, the names of the jobs' folders, and a table and a plot of the values that the jobs return.

Every job adds its row when it ends, in whatever process a launcher started it: to sweep.csv, sweep.md (best first) and
sweep.png in the folder of the sweep.
"""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from consistency.commands import schema
from consistency.errors import require
from consistency.evaluation.results import INCEPTION, SIGNS, named, sign_of
from consistency.runtime.files import locked, path_of, write_text
from consistency.runtime.redaction import masked_text

LONGEST = 120
"""Characters of a folder's name."""

RESULT = ("value", "seconds", "failure")
"""The last columns of the table."""

Row = dict[str, str]


def fixed(arguments: Sequence[str]) -> list[str]:
    """Return the options of a sweep's command line that it does not vary."""
    return [option for option, parsed in _parsed(arguments) if not parsed.is_sweep_override()]


def first(arguments: Sequence[str]) -> list[str]:
    """Return the options that a sweep varies, with the values of its first job; none of an interval, whose value is drawn."""
    varied = [parsed for _, parsed in _parsed(arguments) if parsed.is_discrete_sweep()]
    return [f"{o.get_key_element()}={next(o.sweep_string_iterator())}" for o in varied]


def _parsed(arguments: Sequence[str]) -> Iterator[tuple[str, Override]]:
    options = [a for a in arguments if a.startswith("~") or ("=" in a and not a.startswith("-"))]
    yield from zip(options, OverridesParser.create().parse_overrides(options), strict=True)


def excluding(options: Sequence[str]) -> str:
    """Return the option that leaves these options out of Hydra's name of a job."""
    keys = [o.key_or_group for o in OverridesParser.create().parse_overrides(list(options))]
    listed = ",".join(f"'{key}'" for key in keys)
    return f"hydra.job.config.override_dirname.exclude_keys=[{listed}]"


def varied(hydra: Any) -> dict[str, Any]:
    """Return the options that a sweep varies, with their values in this job."""
    left_out = hydra.job.config.override_dirname.exclude_keys
    options = OverridesParser.create().parse_overrides(list(map(str, hydra.overrides.task)))
    return {o.key_or_group: o.value() for o in options if o.key_or_group not in left_out}


def shown(key: str, value: Any) -> str:
    """Return the value of an option as a text, a secret masked."""
    return masked_text(f"{key}={value}").partition("=")[2]


def folder_name() -> str:
    """Resolve `${job_folder:}`: the number of the job and the options that vary, as 3_lr-0.001_mode-ct."""
    hydra = HydraConfig.get()
    parts = [str(hydra.job.num)]
    for key, value in varied(hydra).items():
        text = f"{value:.4g}" if isinstance(value, float) else shown(key, value).strip("[]{}")
        name = Path(text).name if schema.is_path(key) else text
        parts.append(f"{key.rpartition('.')[2]}-{name}")
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts))[:LONGEST].rstrip("-_.")


def require_monitor(config: DictConfig) -> None:
    """Refuse a monitored metric that the run does not log, and a search for its worst value.

    A metric of a person's own callback may be any.
    """
    monitor = OmegaConf.select(config, "callbacks.checkpoint.monitor")
    nodes = [*config.mode.callbacks.values(), *config.callbacks.values()]
    targets = [str(node.get("_target_")) for node in nodes if node]
    own = any(not target.startswith("consistency.") for target in targets)
    if monitor not in (None, "auto"):
        names, remedy = (
            logged(config),
            "choose one; evaluation@callbacks.evaluation=<name> adds the quality of samples",
        )
        expected = f"callbacks.checkpoint.monitor among {', '.join(names)}, or auto"
        require(own or monitor in names, expected, monitor, remedy)
    better, other = ("minimize", "maximize")[:: sign_of(str(monitor))]
    given = str(OmegaConf.select(config, "hydra.sweeper.direction")).rpartition(".")[2]
    expected = f"hydra.sweeper.direction={better} for callbacks.checkpoint.monitor={monitor}"
    require(own or given != other, expected, given, "change one of the two")


def logged(config: DictConfig) -> list[str]:
    """Return the names that `callbacks.checkpoint.monitor` may have."""
    names = ["train/loss", "train/gradient_norm"]
    names += [f"train/loss_noise_quartile_{number}" for number in (1, 2, 3, 4)]
    if evaluation := config.callbacks.get("evaluation"):
        extractor = str(evaluation.extractor)
        features = INCEPTION if path_of(extractor).is_file() else extractor  # a file of its weights
        measured = product(SIGNS, evaluation.samplers, evaluation.weights)
        names += [f"quality/{named(m, features)}/{s}/{weights}" for m, s, weights in measured]
    return names


def worst(hydra: Any) -> float | None:
    """Return the worst value for a sweeper that looks for the best one, or None for another sweeper."""
    direction = hydra.sweeper.get("direction")
    if direction is None:
        return None
    return -math.inf if "max" in str(direction).lower() else math.inf


def record(hydra: Any, value: Any, seconds: float, failure: str) -> None:
    """Write the row of this job into the table of its sweep, and draw the plot anew."""
    folder = Path(str(hydra.sweep.dir))
    row = {"job": str(hydra.job.num), "folder": Path(str(hydra.runtime.output_dir)).name}
    row |= {key: shown(key, option) for key, option in varied(hydra).items()}
    row["value"] = f"{value:.9g}" if isinstance(value, int | float) else ""
    row |= {"seconds": f"{seconds:.1f}", "failure": " ".join(masked_text(failure).split())}
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".sweep.lock"):
        others = [other for other in read(folder) if other["job"] != row["job"]]
        rows = sorted([*others, row], key=lambda row: int(row["job"]))
        _write(folder, rows, ascending=worst(hydra) != -math.inf)


def read(folder: Path) -> list[Row]:
    """Return the rows of a sweep."""
    file = folder / "sweep.csv"
    return list(csv.DictReader(io.StringIO(file.read_text(), newline=""))) if file.is_file() else []


def _write(folder: Path, rows: Sequence[Row], *, ascending: bool) -> None:
    columns = [*dict.fromkeys(name for row in rows for name in row if name not in RESULT), *RESULT]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "sweep.csv", text.getvalue())

    def place(row: Row) -> float:
        value = float(row["value"] or "nan")
        return math.inf if math.isnan(value) else value if ascending else -value

    cells = ([_cell(row.get(name)) for name in columns] for row in sorted(rows, key=place))
    table = [columns, ["---"] * len(columns), *cells]
    write_text(folder / "sweep.md", "".join(f"| {' | '.join(line)} |\n" for line in table))
    finite = [row for row in rows if math.isfinite(float(row["value"] or "nan"))]
    keys = [name for name in columns if name not in ("job", "folder", *RESULT)]
    if finite and keys:
        from consistency.inference.plots import draw_values  # with matplotlib, which starts slowly

        options = {key: [_number(row.get(key) or "") for row in finite] for key in keys}
        draw_values(options, [float(row["value"]) for row in finite], folder / "sweep.png")


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "/")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
