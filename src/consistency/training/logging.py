"""Loggers: a metrics.csv with one row a step, and W&B that needs no account and never stops a run."""

import csv
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from wandb.errors import UsageError

from consistency.training.faults import tell

FLUSH_SECONDS = 0.5

FINISH_SECONDS = 30.0
"""How long the end of a run waits for the rest to be uploaded; `wandb sync <folder>` uploads it later."""


class MetricsFile(Logger):
    """All metrics of a run in one CSV, one row an optimizer step, appended to as the run goes on.

    A metric that appears later gets a new column, and the earlier rows an empty field. Lightning's CSVLogger writes
    several rows a step and deletes the file of a run that is continued. Rows that cannot be written, on a full disk for
    example, wait for the next one that can; that is told when it begins.
    """

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns = ["step"]
        self.row: dict[str, float] = {}
        self.waiting: list[dict[str, float]] = []
        self.told = False

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def version(self) -> str:
        """None: a run has one file."""
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds to the row of the step; a finished row goes to the file."""
        if step != self.row.get("step"):
            self.save()
            self.row = {"step": step or 0}
        self.row.update({name: value for name, value in metrics.items() if name != "epoch"})

    @rank_zero_only
    def save(self) -> None:
        """Writes the row at hand, after those that wait."""
        if len(self.row) > 1:
            self.waiting.append(self.row)
        self.row = {}
        try:
            # One first: a disk that stays full is not asked for all of them at every step.
            for rows in (self.waiting[:1], self.waiting[1:]):
                if rows:
                    self._append(rows)
                    del self.waiting[: len(rows)]
            self.told = False
        except OSError as error:
            if not self.told:
                tell(f"{self.path} could not be written, its rows wait for the next one: {error}")
            self.told = True

    def _append(self, rows: list[dict[str, float]]) -> None:
        new = [n for n in dict.fromkeys(n for row in rows for n in row) if n not in self.columns]
        if new or not self.path.is_file():
            self._widen(new)
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerows(rows)
        except OSError:
            os.truncate(self.path, size)  # no row stays by half
            raise

    def _widen(self, new: list[str]) -> None:
        rows = []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        columns = self.columns + new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.path)
        self.columns = columns

    def finalize(self, status: str) -> None:
        """Writes what is left."""
        self.save()
        if self.waiting:
            tell(f"{self.path} lacks the last {len(self.waiting)} rows")


def key_configured() -> bool:
    """Whether a W&B API key is configured on this machine; asks nobody and contacts nobody."""
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except UsageError:
        return False


class PatientWandbLogger(WandbLogger):
    """Lightning's W&B logger, offline where no key is configured, and silent from the moment W&B fails: one line says so.

    WANDB_MODE, where set, decides instead. A later `wandb sync <folder>` uploads an offline run.
    """

    def __init__(self, *, project: str, folder: str, name: str | None) -> None:
        mode = os.environ.get("WANDB_MODE") or ("online" if key_configured() else "offline")
        super().__init__(
            project=project,
            save_dir=folder,
            name=name,
            settings=wandb.Settings(
                mode=mode,  # type: ignore[arg-type]
                silent=True,
                console="off",
                x_disable_stats=True,
                x_save_requirements=False,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )
        # WandbLogger passes an option that W&B now warns about.
        self._wandb_init.pop("anonymous", None)
        self.failed = False

    def _guard(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.failed:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:
            if not self.failed:
                reason = " ".join(str(error).split())
                tell(f"W&B failed and is off for the rest of this run: {reason}")
            self.failed = True
            return None

    @property
    def experiment(self) -> Any:
        """The W&B run, or None once W&B has failed."""
        return self._guard(lambda: WandbLogger.experiment.fget(self))  # type: ignore[attr-defined]

    @property
    def offline_folder(self) -> Path | None:
        """The folder that `wandb sync` uploads, where the run is offline."""
        run = self._experiment
        return Path(run.dir).parent if run is not None and run.settings._offline else None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Logs numbers, or nothing once W&B has failed."""
        self._guard(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        """Logs the configuration, or nothing once W&B has failed."""
        self._guard(super().log_hyperparams, params)

    def log_image(
        self, key: str, images: list[Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Logs pictures, or nothing once W&B has failed."""
        self._guard(super().log_image, key, images, step, **kwargs)

    def finalize(self, status: str) -> None:
        """Closes the run, so that the next job of a sweep begins one of its own; waits `FINISH_SECONDS` at most."""
        self._guard(super().finalize, status)
        self._guard(wandb.finish, 0 if status == "success" else 1)
        if self.failed:
            with suppress(Exception):
                wandb.teardown()  # or the end of the process tries, and says that it cannot
        self.failed = True
