"""Loggers: a metrics.csv with one row a step, and W&B that needs no account and never stops a run."""

import csv
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from wandb.errors import UsageError

from consistency.checkpoint import write_text

FLUSH_SECONDS = 0.5


class MetricsFile(Logger):
    """All metrics of a run in one CSV, one row an optimizer step, appended to as the run goes on.

    A metric that appears later gets a new column, and the earlier rows an empty field. What comes for a step whose row
    has been written is added to that row. Lightning's CSVLogger writes several rows a step and deletes the file of a run
    that is continued.
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
        self._rewrite([row for row in rows if int(row["step"]) < step])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds to the row of the step."""
        if step != self.row.get("step"):
            self.save()
            self.row, self._place = {"step": step or 0}, None
        self._new = True
        self.row.update({name: value for name, value in metrics.items() if name != "epoch"})

    @rank_zero_only
    def save(self) -> None:
        """Writes the row at hand, once more where it has been written before."""
        if len(self.row) < 2 or not self._new:
            return
        if self._place is not None:
            os.truncate(self.path, self._place)
        new = [name for name in self.row if name not in self.columns]
        if new or not self.path.is_file():
            self._widen(new)
        with self.path.open("a", newline="") as file:
            self._place = file.tell()
            csv.DictWriter(file, self.columns).writerow(self.row)
        self._new = False

    def _widen(self, new: list[str]) -> None:
        rows = []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        self.columns += new
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.path)

    def finalize(self, status: str) -> None:
        """Writes what is left."""
        self.save()


def key_configured() -> bool:
    """Whether a W&B API key is configured on this machine; asks nobody and contacts nobody."""
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except UsageError:
        return False


class PatientWandbLogger(WandbLogger):
    """Lightning's W&B logger, offline where no key is configured, and silent from the moment W&B fails.

    WANDB_MODE, where set, decides instead. A later `wandb sync <folder>` uploads an offline run. The id of the run stands in
    wandb_id.txt in `folder`, so that a run that goes on stays one run, offline too: every start of it then has a folder of
    its own, with the same id.
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
                x_disable_meta=True,  # the command line may hold secrets
                x_transaction_log_flush_interval=FLUSH_SECONDS,
            ),
        )
        # WandbLogger passes an option that W&B now warns about.
        self._wandb_init.pop("anonymous", None)
        self.folder = Path(folder)
        self.failed = False

    def _guard(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.failed:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:
            self.failed = True
            rank_zero_warn(f"W&B failed and is off for the rest of this run: {error}")
            return None

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
        """Closes the run, so that the next job of a sweep begins one of its own."""
        self._guard(super().finalize, status)
        self._guard(wandb.finish, 0 if status == "success" else 1)
