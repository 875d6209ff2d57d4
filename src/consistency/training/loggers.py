"""Loggers: metrics.csv with one row a step, W&B without an account, TensorBoard. None of them stops a run."""
# mypy: disable-error-code="attr-defined"

import csv
import io
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import wandb
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from wandb.errors import UsageError

from consistency.checkpoints import ours
from consistency.errors import UserError, require
from consistency.runtime.files import write_text
from consistency.runtime.redaction import masked
from consistency.training.io_errors import warn


class MetricsFile(Logger):
    """All metrics of a run in one CSV, one row an optimizer step; later metrics of the last step are added to its row.

    Rows that cannot be written, as on a full disk, wait for the next one that can; a warning is printed once. (Lightning's
    CSVLogger writes several rows a step and deletes the file of a run that is resumed.)
    """

    name, version = "metrics.csv", ""

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns = ["step"]
        # The last row, with its position if it is in the file, else with all before it that are not.
        self.rows: list[dict[str, float]] = []
        self._start: int | None = None
        self._warned = False

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: the configuration has a file of its own."""

    def cut(self, step: int) -> None:
        """Remove the rows from `step` on, where a run resumes, and an incomplete row at the end."""
        if self.path.is_file():
            self._rewrite([row for row in self._read() if int(row["step"]) < step])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of the step."""
        step = step or 0
        if not self.rows or self.rows[-1]["step"] != step:
            waiting = self.rows if self._start is None else []
            self.rows, self._start = [*waiting, {"step": step}], None
        self.rows[-1].update({name: v for name, v in metrics.items() if name != "epoch"})
        try:
            self._write()
            self._warned = False
        except OSError as error:
            if not self._warned:
                warn(f"{self.path} could not be written, its rows wait for the next one: {error}")
            self._warned = True

    def _write(self) -> None:
        """Append the rows, all or none, in the place of the last one if it is in the file."""
        if self._start is not None and self.path.is_file():
            os.truncate(self.path, self._start)
        self._start = None
        new = dict.fromkeys(name for row in self.rows for name in row if name not in self.columns)
        if new or not self.path.is_file():
            self._rewrite(self._read(), new)
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writerows(self.rows[:-1])
                start = file.tell()
                writer.writerow(self.rows[-1])
        except OSError:
            os.truncate(self.path, size)
            raise
        self.rows, self._start = self.rows[-1:], start

    def _read(self) -> list[dict[str, str]]:
        """Read the columns, and return the complete rows, of which a missing file has none."""
        text = self.path.read_text() if self.path.is_file() else ""
        lines = [line for line in text.splitlines(True) if line.endswith("\n")]
        self.columns = next(csv.reader(lines), self.columns)
        return list(csv.DictReader(lines))

    def _rewrite(self, rows: list[dict[str, str]], new: Iterable[str] = ()) -> None:
        text, columns = io.StringIO(newline=""), [*self.columns, *new]
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self.columns = columns

    def finalize(self, status: str) -> None:
        """Write the rows that wait."""
        if self.rows and self._start is None:
            try:
                self._write()
            except OSError as error:
                warn(f"{self.path} lacks the last {len(self.rows)} rows: {error}")


def key_configured() -> bool:
    """Return whether a W&B API key is configured on this machine, without a prompt or a connection."""
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except UsageError:
        return False


def sweep_name() -> str | None:
    """Return the name of the folder of the sweep that this run is a job of, or None."""
    within = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return Path(str(HydraConfig.get().sweep.dir)).name if within else None


def patient(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of a logger: after its first failure, reported in one line, the logger is off and the run continues."""

    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return None if self.failed else method(self, *args, **kwargs)
        except Exception as error:
            if not self.failed:  # by a patient method that this one called
                reason = " ".join(str(error).split())
                warn(f"{self.service} failed and is off for the rest of this run: {reason}")
            self.failed = True

    return guarded


WANDB_OPTIONS = {*signature(wandb.init).parameters, *signature(WandbLogger).parameters} - {"kwargs"}


class PatientWandbLogger(WandbLogger):
    """Lightning's W&B logger, off once W&B fails; conf/logger/wandb.yaml explains the arguments.

    wandb_id.txt in `folder`, that of the run, holds the id, so a resumed run stays one run; offline, each start has a folder
    of its own.

    options: any arguments of `wandb.init` and of Lightning's logger.
    """

    service, failed = "W&B", False
    log_hyperparams = patient(WandbLogger.log_hyperparams)
    log_image = patient(WandbLogger.log_image)
    log_table = patient(WandbLogger.log_table)

    def __init__(
        self,
        *,
        folder: str,
        name: str | None = None,
        group: str | None = None,
        mode: str | None = None,
        offline: bool = False,
        log_model: bool | str = False,
        settings: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        unknown = [option for option in options if option not in WANDB_OPTIONS]
        expected = "arguments of wandb.init or of Lightning's WandbLogger at logger.wandb"
        require(not unknown, expected, ", ".join(unknown), "docs/wandb.md names the usual ones")
        expected, remedy = "logger.wandb.log_model=true, all or false", "true logs the best one"
        require(log_model in (True, False, "all"), expected, log_model, remedy)
        mode = mode or ("offline" if offline else os.environ.get("WANDB_MODE"))
        mode = mode or ("online" if key_configured() else "offline")
        try:
            given = wandb.Settings(**{"mode": mode, **(settings or {})})
        except ValueError as error:
            expected = "settings that wandb.Settings takes at logger.wandb.settings"
            raise UserError(expected, error, "change or remove them") from error
        name = name or os.environ.get("WANDB_NAME") or Path(folder).name
        group = sweep_name() if group == "auto" else group
        options = {
            "config": masked(config),
            "save_dir": options.pop("dir", None) or folder,
        } | options
        super().__init__(name=name, group=group, settings=given, **options)
        self.folder, self.log_model = Path(folder), log_model
        self._wandb_init.pop("anonymous", None)  # W&B warns about this option

    @property
    @patient
    def experiment(self) -> Any:
        """The W&B run, or None once W&B has failed."""
        if self._experiment is None and rank_zero_only.rank == 0:
            branch = {"fork_from", "resume_from"} & self._wandb_init.keys()
            if not (file := self.folder / "wandb_id.txt").is_file():
                write_text(file, f"{self._id or secrets.token_hex(4)}\n")
                branch = {"resume"} if branch else branch
            for option in branch:  # a run begins as a branch of another, or is resumed
                del self._wandb_init[option]
            self._id = self._wandb_init["id"] = file.read_text().strip()
        return WandbLogger.experiment.fget(self)

    @patient
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics, except the epoch: a run is one."""
        WandbLogger.log_metrics(self, {n: v for n, v in metrics.items() if n != "epoch"}, step)

    @patient
    def log_checkpoints(self) -> None:
        """Log the best checkpoint of the run, or without one the last, as an artifact; with "all" those that stay before it."""
        folder = self.folder / ours.CHECKPOINTS
        files = [file for name in ("best.ckpt", ours.LAST) if (file := folder / name).is_file()][:1]
        if self.log_model == "all":
            files = [*ours.kept(folder).values(), *files]
        for file in files:
            artifact = wandb.Artifact(self._checkpoint_name or f"model-{self._id}", type="model")
            artifact.add_file(str(file), policy=self.add_file_policy)
            self.experiment.log_artifact(artifact, aliases=["latest", file.stem])

    @property
    def offline_folders(self) -> list[Path]:
        """The folders of an offline run for `wandb sync`, one for each of its starts."""
        run = self._experiment
        if run is None or not run.settings._offline:
            return []
        return sorted(Path(run.dir).parents[1].glob(f"offline-run-*-{run.id}"))

    def finalize(self, status: str) -> None:
        """End the W&B run, so that the next job of a sweep begins its own."""
        if self.log_model and status == "success" and rank_zero_only.rank == 0:
            self.log_checkpoints()
        patient(lambda _: wandb.finish(0 if status == "success" else 1))(self)
        if self.failed:
            with suppress(Exception):
                wandb.teardown()  # or the end of the process tries, and prints that it cannot
            wandb.run = None  # or the next job of a sweep would log into it
        self.failed = True


def log_results(loggers: Iterable[Logger], rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Log an evaluation to W&B as the table quality/results; a row that lacks a column has an empty cell there."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    data = [[row.get(name) for name in columns] for row in rows]
    for logger in loggers:
        if isinstance(logger, PatientWandbLogger):
            logger.log_table("quality/results", columns, data, step=step)


class PatientTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger with all starts of a run as one history in `folder`; off once it fails."""

    service, failed = "TensorBoard", False
    log_metrics = patient(TensorBoardLogger.log_metrics)
    finalize = patient(TensorBoardLogger.finalize)
    save = patient(lambda self: self.experiment.flush())  # Lightning's also writes hparams.yaml

    def __init__(self, *, folder: str) -> None:
        package = "the package tensorboard for logger=tensorboard"
        remedy = "pip install tensorboard, or choose logger=csv"
        require(find_spec("tensorboard") is not None, package, "no such package", remedy)
        super().__init__(save_dir=folder, name="", version="", default_hp_metric=False)

    @property
    def log_dir(self) -> str:
        """The folder of the events: `folder` itself, whatever characters it has."""
        return self.save_dir

    def cut(self, step: int) -> None:
        """Ignore the events from `step` on, where the run resumes, that earlier starts wrote."""
        self._kwargs["purge_step"] = step

    @property
    @patient
    def experiment(self) -> Any:
        """The writer of events, or None once it has failed."""
        return TensorBoardLogger.experiment.fget(self)

    @patient
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Log the configuration as text."""
        text = indent(yaml.safe_dump(params, sort_keys=False), "    ")
        self.experiment.add_text("config", text, self._kwargs.get("purge_step"))

    @patient
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        for image in images:
            self.experiment.add_image(key, np.asarray(image), step, dataformats="HWC")
