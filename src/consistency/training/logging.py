"""Loggers: a metrics.csv with one row a step, W&B that needs no account, TensorBoard; none of them stops a run."""

import csv
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import wandb
import yaml
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from wandb.errors import UsageError

from consistency.errors import require
from consistency.runtime.files import write_text
from consistency.training.faults import tell

FLUSH_SECONDS = 0.5

FINISH_SECONDS = 30.0
"""How long the end of a run waits for the rest to be uploaded; `wandb sync <folder>` uploads it later."""


class MetricsFile(Logger):
    """All metrics of a run in one CSV, one row an optimizer step, appended to as the run goes on.

    A metric that appears later gets a new column, and the earlier rows an empty field. What comes for a step whose row
    has been written is added to that row. Lightning's CSVLogger writes several rows a step and deletes the file of a run
    that is continued. Rows that cannot be written, on a full disk for example, wait for the next one
    that can; that is told when it begins.
    """

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns = ["step"]
        self.row: dict[str, float] = {}
        self._place: int | None = None
        """Where the row at hand begins in the file, if it has been written."""
        self._new = False
        """Whether the row at hand has something that is not in the file."""
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

    def cut(self, step: int) -> None:
        """Takes the rows from `step` on out of the file of a run that goes on there; a torn one at the end goes too."""
        if not self.path.is_file():
            return
        whole = [line for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
        rows = list(csv.DictReader(whole))
        if whole:
            self.columns = next(csv.reader(whole))
        self._rewrite(self.columns, [row for row in rows if int(row["step"]) < step])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds to the row of the step."""
        if step != self.row.get("step"):
            self.save()
            if self._new:
                self.waiting.append(self.row)
            self.row, self._place = {"step": step or 0}, None
        self._new = True
        self.row.update({name: value for name, value in metrics.items() if name != "epoch"})

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows that wait and the row at hand, this one once more where it has been written before."""
        try:
            while self.waiting:
                self._append(self.waiting[0])
                del self.waiting[0]
            if len(self.row) > 1 and self._new:
                if self._place is not None and self.path.is_file():
                    os.truncate(self.path, self._place)
                self._place = None
                self._place = self._append(self.row)
                self._new = False
            self.told = False
        except OSError as error:
            if not self.told:
                tell(f"{self.path} could not be written, its rows wait for the next one: {error}")
            self.told = True

    def _append(self, row: dict[str, float]) -> int:
        """Where the row begins in the file, to which it is added whole or not at all."""
        new = [name for name in row if name not in self.columns]
        if new or not self.path.is_file():
            self._widen(new)
        place = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError:
            os.truncate(self.path, place)
            raise
        return place

    def _widen(self, new: list[str]) -> None:
        rows = []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        columns = self.columns + new
        self._rewrite(columns, rows)
        self.columns = columns

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
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


class Patient:
    """A logger that fails goes silent; one line says so, and the run goes on."""

    service: str
    failed = False

    def _guard(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.failed:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:
            if not self.failed:
                reason = " ".join(str(error).split())
                tell(f"{self.service} failed and is off for the rest of this run: {reason}")
            self.failed = True
            return None


class PatientWandbLogger(Patient, WandbLogger):
    """Lightning's W&B logger, offline where no key is configured, and silent from the moment W&B fails: one line says so.

    WANDB_MODE, where set, decides instead. A later `wandb sync <folder>` uploads an offline run. The id of the run stands in
    wandb_id.txt in `folder`, so that a run that goes on stays one run, offline too: every start of it then has a folder of
    its own, with the same id.
    """

    service = "W&B"

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
                x_disable_meta=True,  # the command line may hold secrets
                x_transaction_log_flush_interval=FLUSH_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )
        # WandbLogger passes an option that W&B now warns about.
        self._wandb_init.pop("anonymous", None)
        self.folder = Path(folder)

    @property
    def experiment(self) -> Any:
        """The W&B run, or None once W&B has failed."""
        return self._guard(self._begun)

    def _begun(self) -> Any:
        if self._experiment is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._id = self._wandb_init["id"] = self._remembered_id()
        return WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]

    def _remembered_id(self) -> str:
        file = self.folder / "wandb_id.txt"
        if not file.is_file():
            write_text(file, f"{secrets.token_hex(4)}\n")
        return file.read_text().strip()

    @property
    def offline_folders(self) -> list[Path]:
        """The folders that `wandb sync` uploads, one for each start of the run, where it is offline."""
        run = self._experiment
        if run is None or not run.settings._offline:
            return []
        return sorted(Path(run.dir).parents[1].glob(f"offline-run-*-{run.id}"))

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


class PatientTensorBoardLogger(Patient, TensorBoardLogger):
    """Lightning's TensorBoard logger with all starts of a run as one history in `folder`, silent once it fails."""

    service = "TensorBoard"

    def __init__(self, *, folder: str) -> None:
        require(
            find_spec("tensorboard") is not None,
            "the package tensorboard for logger=tensorboard",
            "no such package",
            "pip install tensorboard, or choose logger=csv",
        )
        super().__init__(save_dir=folder, name="", version="", default_hp_metric=False)

    @property
    def log_dir(self) -> str:
        """Where the events lie: `folder` as it is, whatever characters it has."""
        return self.save_dir

    def cut(self, step: int) -> None:
        """Has what earlier starts of the run wrote from `step` on left out: the run goes on there."""
        self._kwargs["purge_step"] = step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of events, or None once it has failed."""
        return self._guard(TensorBoardLogger.experiment.fget, self)  # type: ignore[attr-defined]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Logs numbers, or nothing once TensorBoard has failed."""
        self._guard(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Logs the configuration as text; its own config.yaml lies beside."""
        self._guard(self._add_config, params)

    @rank_zero_only
    def _add_config(self, params: Any) -> None:
        text = yaml.safe_dump(params, sort_keys=False)
        self.experiment.add_text("config", indent(text, "    "), self._kwargs.get("purge_step", 0))

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Logs pictures, or nothing once TensorBoard has failed."""
        self._guard(self._add_images, key, images, step)

    @rank_zero_only
    def _add_images(self, key: str, images: list[Any], step: int | None) -> None:
        for image in images:
            self.experiment.add_image(key, np.asarray(image), step, dataformats="HWC")

    def save(self) -> None:
        """Writes what waits."""
        self._guard(self._flush)

    @rank_zero_only
    def _flush(self) -> None:
        self.experiment.flush()

    def finalize(self, status: str) -> None:
        """Writes what waits and closes the file, so that the next job of a sweep begins one of its own."""
        self._guard(super().finalize, status)
