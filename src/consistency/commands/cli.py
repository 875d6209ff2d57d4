"""The shape of all commands: Hydra in front, one clear error message behind."""

import multiprocessing
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from consistency.commands import schema
from consistency.commands.binding import require_bound
from consistency.commands.output import claimed, is_claimed, register_dated, remove_unused
from consistency.commands.overrides import changes, for_hydra, is_sweep
from consistency.errors import UserError, require
from consistency.runtime import rendezvous, signals
from consistency.runtime.files import ROOT, path_of
from consistency.runtime.ranks import is_started_here, require_alone, this_launch
from consistency.runtime.redaction import masked, masked_output, masked_text

INSIDE = "_CONSISTENCY_COMMAND"
"""A variable that is set inside a command."""

AUTO = "auto"
"""resume=auto: continue the run at output=, or begin one there."""

ERRORS = (UserError, HydraException, OmegaConfBaseException)
"""Errors that a person can act on: printed without a traceback, with exit status 2."""

COLLECTIVE = {"train": "trainer.", "evaluate": ""}
"""The commands that run on several ranks, and the prefix of their options `devices` and `num_nodes`."""

CONTINUED = ("sample", "search", "prepare")
"""The commands that continue their unfinished output when they are run again."""

PATIENCE = 300.0
"""Seconds that the processes of a job wait for each other at its start, without trainer.strategy.timeout."""

Main: TypeAlias = Callable[[DictConfig, Path], Any]
"""The function of a command, of configuration and output folder; a sweeper minimises the number that it returns."""

_output: Path | None = None


def command(name: str) -> Callable[[Main], Callable[[], None]]:
    """Turn `main(config, output)` into a command configured by conf/<name>.yaml.

    Errors of the user end in one message and exit status 2; HYDRA_FULL_ERROR=1 restores the traceback.
    """

    def decorate(main: Main) -> Callable[[], None]:
        def job(config: DictConfig) -> Any:
            run = HydraConfig.get()
            try:
                return perform(name, main, config)
            except Exception as error:
                if run.mode == RunMode.MULTIRUN:
                    _print_failure(run, error)
                raise

        entry = hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)

        def guarded() -> None:
            trace = os.environ.get("HYDRA_FULL_ERROR") == "1" and INSIDE not in os.environ
            os.environ.update({"HYDRA_FULL_ERROR": "1", INSIDE: "1"})
            try:
                schema.register_experiments()
                sys.argv[1:] = for_hydra(sys.argv[1:])
                _require_one_sweep()
                with masked_output(), signals.stoppable(remove_unused):
                    entry(job)()
            except signals.Interrupted:
                signals.print_line(_stopped(name))
                raise
            except Exception as error:
                known = isinstance(error, ERRORS)
                if trace and known:
                    raise
                text = masked_text(message(error) if known else f"{type(error).__name__}: {error}")
                if known and not is_started_here():
                    print(f"error: {text}", file=sys.stderr, flush=True)
                if name in COLLECTIVE:
                    rendezvous.report_early(error, text)
                if not known:
                    raise
                sys.exit(getattr(error, "status", 2))

        return guarded

    return decorate


def _require_one_sweep() -> None:
    launch = this_launch()
    require(
        not is_sweep(sys.argv[1:]) or launch.rank is None or launch.processes in (None, 1),
        "one process that runs a sweep, and starts the processes of each job itself",
        launch.started,
        f"leave {launch.launcher} out, or leave -m out and start every job by itself",
    )


def _stopped(verb: str) -> str:
    """Return the line about a command that Ctrl-C has ended."""
    again = ""
    if verb in CONTINUED and _output is not None and not is_claimed(_output):
        again = "; the same command again goes on"
    elif verb in CONTINUED and _output is not None and _output.exists():
        again = f"; the same command with {shlex.quote(f'output={_output}')} goes on"
    return f"stopped by Ctrl-C{again}"


def _print_failure(run: Any, error: Exception) -> None:
    """Print the error of a job at once: a sweeper raises one of several, without its cause."""
    known = isinstance(error, ERRORS)
    text = f" {message(error)}" if known else "\n" + "".join(traceback.format_exception(error))
    job = f"error: job {run.job.num} of the sweep ({run.job.override_dirname}):"
    print(masked_text(f"{job}{text}"), file=sys.stderr, flush=True)


def message(error: BaseException) -> str:
    """Return an error in a few lines: the innermost cause that a person can act on."""
    if isinstance(error, UserError):
        return str(error)
    cause = error.__cause__
    if isinstance(error, InstantiationException) and cause is not None:
        if isinstance(cause, UserError | InstantiationException):
            return message(cause)
        line = next((line for line in str(error).splitlines() if "full_key" in line), "")
        return f"{cause}\n  while building {line.strip() or 'the configuration'}"
    text = f"{error}\n{cause}" if isinstance(cause, OmegaConfBaseException) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Hydra proposes to add the key with a plus sign; here every key is known, so it is a misspelt one.
    lines = [line for line in lines if not line.startswith("To append to your config use")]
    if len(lines) == 1:
        lines.append("do: see all options and their values by adding `--cfg job` to the command")
    return "\n  ".join(dict.fromkeys(lines[:8]))


def perform(verb: str, main: Main, config: DictConfig) -> Any:
    """Check the configuration and call the command's function."""
    _allow_processes()
    require_complete(config)
    with _joined(verb, config) as output:
        return main(config, output)


def _allow_processes() -> None:
    """Let a job in a process of joblib start processes: the start method of joblib starts none."""
    methods = (None, *multiprocessing.get_all_start_methods())
    if multiprocessing.get_start_method(allow_none=True) not in methods:
        multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]


def require_complete(config: DictConfig) -> None:
    """Refuse a configuration with a missing value, a count below one, or arguments that its parts do not take."""
    missing = sorted(OmegaConf.missing_keys(config))
    require(
        not missing,
        f"a value for {', '.join(missing)}",
        "none",
        f"add {' '.join(f'{key}=...' for key in missing)} to the command",
    )
    for name in schema.POSITIVE:
        count = config[name] if name in config else None
        require(count is None or count >= 1, f"{name} >= 1", count, "give a positive number")
    require_bound(config)


@contextmanager
def _joined(verb: str, config: DictConfig) -> Iterator[Path]:
    """Yield the folder or file that the command writes; the first process of the job decides it for all.

    It is in `config.output` too. A folder made for the command is removed if it is empty at the end.
    """
    try:
        if verb not in COLLECTIVE:
            require_alone(verb)
            yield _settled(config, output_path(config))
            return
        option = COLLECTIVE[verb]
        processes = _processes(config.trainer if option else config)
        with rendezvous.joined(*processes, option):
            rendezvous.current.cleanup = remove_unused
            require_agreement(config)
            yield _settled(config, Path(rendezvous.decided(lambda: str(output_path(config)))))
    finally:
        remove_unused()


def require_agreement(config: DictConfig) -> None:
    """Refuse options of this process that differ from those of the first, before that one decides anything else.

    A rank that was started from inside the job has the options of the first, resolved. Secrets are not compared.
    """
    settings = masked(OmegaConf.to_container(config, resolve=False))
    first = rendezvous.decided(lambda: settings)
    different = [] if is_started_here() else list(changes(first, settings))
    shown = ", ".join(option.lstrip("+") for option in different[:4])
    require(
        not different,
        "the same settings on every process of the job",
        f"{shown} on {rendezvous.current.name}, and something else on rank 0",
        "give every process the same command",
    )
    rendezvous.current.confirm()


def _processes(node: DictConfig) -> tuple[int | None, int, float]:
    """Return devices a machine (None if the machine decides), machines, and seconds that they wait for each other."""
    devices: Any = node.devices
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part]
    if isinstance(devices, list | ListConfig):
        devices = len(devices)
    devices = int(devices) if str(devices).isdigit() else 0
    timeout = OmegaConf.select(node, "strategy.timeout") if "strategy" in node else None
    seconds = instantiate(timeout).total_seconds() if timeout else PATIENCE
    return devices or None, node.num_nodes, seconds


def _settled(config: DictConfig, output: Path) -> Path:
    global _output
    config.output, _output = str(output), output
    whole: Any = HydraConfig.instance().cfg
    with read_write(whole.hydra.runtime), open_dict(whole.hydra.runtime):
        whole.hydra.runtime.output_dir = str(output)
    return output


def output_path(config: DictConfig) -> Path:
    """Return the path `output=`; its default is made here as a fresh folder. In a sweep it is the folder of the job."""
    hydra = HydraConfig.get()
    cwd, folder = Path(hydra.runtime.cwd), Path(hydra.runtime.output_dir)
    if hydra.mode == RunMode.MULTIRUN or folder != cwd:
        return folder
    return claimed(config.output, cwd)


def run_folder(resume: str | None, fresh: str) -> str:
    """Return the default folder of a run: the one that it resumes, or a fresh one.

    A missing folder becomes ".", so that Hydra does not create it and the command reports it.
    """
    if resume in (None, AUTO):
        return fresh
    folder = path_of(str(resume))
    return str(folder) if folder.is_dir() else "."


def require_fresh(
    folder: Path, remedy: str = "choose another output=, or move the old one away"
) -> None:
    """Refuse to write into a folder with content."""
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"a new or empty folder to write to at output={folder}",
        "a folder with content" if folder.is_dir() else "a file",
        remedy,
    )


# On import, because the processes of a launcher import nothing else, and Hydra's own `compose` needs them as well.
schema.register()
schema.register_samplers()
register_dated()
OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
