"""The shape of all commands: Hydra in front, one clear error message behind."""

import multiprocessing
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from itertools import count
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

fresh_folders: set[Path] = set()
"""The folders made for the default of `output`; the same command again gets another one."""

_output: Path | None = None
_dated: set[str] = set()
_made: list[Path] = []


def run(verb: str, main: Main) -> None:
    """Call `main` with the configuration of conf/<verb>.yaml and the options of the command line.

    Errors of the user end in one message and exit status 2; HYDRA_FULL_ERROR=1 restores the traceback.
    """

    def job(config: DictConfig) -> Any:
        try:
            return perform(verb, main, config)
        except Exception as error:
            hydra_config = HydraConfig.get()
            if hydra_config.mode == RunMode.MULTIRUN:
                _print_failure(hydra_config, error)
            raise

    trace = os.environ.get("HYDRA_FULL_ERROR") == "1" and INSIDE not in os.environ
    os.environ.update({"HYDRA_FULL_ERROR": "1", INSIDE: "1"})
    try:
        schema.register_experiments()
        sys.argv[1:] = for_hydra(sys.argv[1:])
        _require_one_sweep()
        with masked_output(), signals.stoppable(remove_unused):
            hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=verb)(job)()
    except signals.Interrupted:
        signals.print_line(_stopped(verb))
        raise
    except Exception as error:
        known = isinstance(error, ERRORS)
        if trace and known:
            raise
        text = masked_text(message(error) if known else f"{type(error).__name__}: {error}")
        if known and not is_started_here():
            print(f"error: {text}", file=sys.stderr, flush=True)
        if verb in COLLECTIVE:
            rendezvous.report_early(error, text)
        if not known:
            raise
        sys.exit(getattr(error, "status", 2))


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
    fresh = _output in fresh_folders
    if verb not in CONTINUED or _output is None or (fresh and not _output.exists()):
        return "stopped by Ctrl-C"
    how = f"with {shlex.quote(f'output={_output}')}" if fresh else "again"
    return f"stopped by Ctrl-C; the same command {how} goes on"


def _print_failure(hydra_config: Any, error: Exception) -> None:
    """Print the error of a job at once: a sweeper raises one of several, without its cause."""
    known = isinstance(error, ERRORS)
    text = f" {message(error)}" if known else "\n" + "".join(traceback.format_exception(error))
    job = f"error: job {hydra_config.job.num} of the sweep ({hydra_config.job.override_dirname}):"
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
    """Check the configuration and call the command's function with the path that it writes.

    The first process of the job decides the path for all. A folder made for it is removed if it is empty at the end.
    """
    _allow_processes()
    require_complete(config)
    try:
        if verb not in COLLECTIVE:
            require_alone(verb)
            return main(config, _settled(config, output_path(config)))
        option = COLLECTIVE[verb]
        with rendezvous.joined(*_processes(config.trainer if option else config), option):
            rendezvous.current.cleanup = remove_unused
            require_agreement(config)
            output = rendezvous.current.decided(lambda: str(output_path(config)))
            return main(config, _settled(config, Path(output)))
    finally:
        remove_unused()


def _allow_processes() -> None:
    """Let a job in a process of joblib start processes: the start method of joblib starts none."""
    methods = (None, *multiprocessing.get_all_start_methods())
    if multiprocessing.get_start_method(allow_none=True) not in methods:
        multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]


def require_complete(config: DictConfig) -> None:
    """Refuse a configuration with a missing value, a count below one, or arguments that its parts do not take."""
    missing = sorted(OmegaConf.missing_keys(config))
    remedy = f"add {' '.join(f'{key}=...' for key in missing)} to the command"
    require(not missing, f"a value for {', '.join(missing)}", "none", remedy)
    for name in schema.POSITIVE:
        value = config.get(name)
        require(value is None or value >= 1, f"{name} >= 1", value, "give a positive number")
    schema.require_bound(config)


def require_agreement(config: DictConfig) -> None:
    """Refuse options of this process that differ from those of the first, before that one decides anything else.

    A rank that was started from inside the job has the options of the first, resolved. Secrets are not compared.
    """
    settings = masked(OmegaConf.to_container(config, resolve=False))
    first = rendezvous.current.decided(lambda: settings)
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
        devices = list(filter(None, devices.split(",")))
    number = len(devices) if isinstance(devices, list | ListConfig) else devices
    timeout = OmegaConf.select(node, "strategy.timeout") if "strategy" in node else None
    seconds = instantiate(timeout).total_seconds() if timeout else PATIENCE
    return (int(number) if str(number).isdigit() else 0) or None, node.num_nodes, seconds


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
    path = cwd / path_of(config.output)
    return _fresh(path) if config.output in _dated else path


def dated(folder: str, suffix: str = "", *, _root_: DictConfig) -> str:
    """Resolve `${dated:<folder>}`, the default of `output`, to a path with the date; `output_path` makes the folder.

    It is the same everywhere in a configuration. The folder of a sweep is made here, before Hydra makes it.
    """
    paths: dict[Any, str] = OmegaConf.get_cache(_root_)["dated"]
    if (folder, suffix) not in paths:
        path = f"{folder}/{datetime.now():%Y-%m-%d_%H-%M-%S}{suffix}"
        if OmegaConf.select(_root_, "hydra.mode") == RunMode.MULTIRUN:
            path = str(_fresh(Path(path)))
        else:
            _dated.add(path)
        paths[folder, suffix] = path
    return paths[folder, suffix]


def _fresh(path: Path) -> Path:
    """Make a folder that no other process has made, with a number behind its name if need be."""
    above = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = path.with_name(f"{path.name}_{number}") if number > 1 else path
        with suppress(FileExistsError):
            folder.mkdir()
            _made.extend([*above[::-1], folder])
            fresh_folders.add(folder)
            return folder
    raise AssertionError


def remove_unused() -> None:
    """Remove the folders made here that are still empty."""
    while _made:
        with suppress(OSError):
            _made.pop().rmdir()


def run_folder(resume: str | None, fresh: str) -> str:
    """Return the default folder of a run: the one that it resumes, or a fresh one.

    A missing folder becomes ".", so that Hydra does not create it and the command reports it.
    """
    if resume is None or resume == AUTO:
        return fresh
    return str(path_of(resume)) if path_of(resume).is_dir() else "."


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
OmegaConf.register_new_resolver("dated", dated, replace=True)
OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
