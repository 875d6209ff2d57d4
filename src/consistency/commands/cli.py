"""The start of a command, from the command line or in Python: Hydra in front, one clear error message behind."""

import math
import multiprocessing
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from datetime import datetime
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from consistency.commands import schema, sweeps
from consistency.commands.overrides import changes, for_hydra, given_options, is_sweep, named
from consistency.errors import DivergenceError, UserError, require
from consistency.runtime import rendezvous, signals
from consistency.runtime.files import ROOT, path_of
from consistency.runtime.ranks import is_started_here, require_alone, this_launch
from consistency.runtime.redaction import masked, masked_output, masked_text

INSIDE = "_CONSISTENCY_COMMAND"  # a variable that is set inside a command
RECORD = "_composed"  # the attribute of a configuration with what Hydra composed; a copy loses it
AUTO = "auto"  # resume=auto: continue the run at output=, or begin one there
PATIENCE = 300.0  # seconds that processes wait at the start, without trainer.strategy.timeout

# Errors that a person can act on: printed without a traceback, with exit status 2.
ERRORS = (UserError, HydraException, OmegaConfBaseException)
# The commands that run on several ranks, and the prefix of their options `devices` and `num_nodes`.
COLLECTIVE = {"train": "trainer.", "evaluate": ""}
CONTINUED = ("sample", "search", "prepare")  # commands that continue their unfinished output

# The function of a command, of configuration and output folder; a sweeper minimises the number that it returns.
Main: TypeAlias = Callable[[DictConfig, Path], Any]

# The output of every command here; for a fresh folder its `output=` with ${dated:}, and "" for one that was named.
outputs: dict[str, str] = {}
_made: list[Path] = []  # folders, for `remove_unused`


def run(verb: str, main: Main) -> None:
    """Call `main` with the configuration of conf/<verb>.yaml and the options of the command line.

    Errors of the user end in one message and exit status 2; HYDRA_FULL_ERROR=1 restores the traceback.
    """
    trace = os.environ.get("HYDRA_FULL_ERROR") == "1" and INSIDE not in os.environ
    os.environ.update({"HYDRA_FULL_ERROR": "1", INSIDE: "1"})
    try:
        schema.register_experiments(sys.argv[1:])
        sys.argv[1:] = for_hydra(named(verb, sys.argv[1:]))
        if is_sweep(sys.argv[1:]):
            options = sweeps.fixed(sys.argv[1:])
            if verb == "train":  # before the first run, not at its end
                first = [*options, *sweeps.first(sys.argv[1:])]
                sweeps.require_monitor(_compose(first, verb))
            if options:  # which stand together for argparse
                sys.argv.insert(sys.argv.index(options[0]), sweeps.excluding(options))
        launch = this_launch()
        require(
            not is_sweep(sys.argv[1:]) or launch.rank is None or launch.processes in (None, 1),
            "one process that runs a sweep, and starts the processes of each job itself",
            launch.started,
            f"leave {launch.launcher} out, or leave -m out and start every job by itself",
        )
        start = hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=verb)
        with masked_output(), signals.stoppable(remove_unused):
            start(lambda config: perform_job(verb, main, config))()
    except signals.Interrupted:
        signals.print_line(f"stopped by Ctrl-C{_way_on(verb)}")
        raise
    except Exception as error:
        known = isinstance(error, ERRORS)
        if trace and known:
            raise
        if of_optuna(error):
            remedy = "correct the options of the sweep; failed trials have their errors above"
            error, known = UserError("a search that optuna can finish", error, remedy), True
        text = masked_text(message(error) if known else f"{type(error).__name__}: {error}")
        if known and not is_started_here():
            print(f"error: {text}", file=sys.stderr, flush=True)
        if verb in COLLECTIVE:
            rendezvous.report_early(error, text)
        if not known:
            raise
        sys.exit(getattr(error, "status", 2))


def of_optuna(error: Exception) -> bool:
    """Return whether optuna itself raised an error, as without one trial that has a value; no error of a job passes it."""
    frames = traceback.walk_tb(error.__traceback__)
    names = (str(frame.f_globals.get("__name__")) for frame, _ in frames)
    return any(name.partition(".")[0] == "optuna" for name in names)


def _way_on(verb: str) -> str:
    """Return how a command that Ctrl-C has ended goes on, if it can."""
    output, default = next(reversed(outputs.items()), ("", ""))
    if verb not in CONTINUED or not output or (default and not Path(output).exists()):
        return ""
    how = f"with {shlex.quote(f'output={output}')}" if default else "again"
    return f"; the same command {how} goes on"


def _print_failure(job: Any, error: Exception) -> None:
    """Print the error of a sweep's job at once: a sweeper raises one of several, without its cause."""
    known = isinstance(error, ERRORS)
    text = f" {message(error)}" if known else "\n" + "".join(traceback.format_exception(error))
    line = f"error: job {job.num} of the sweep ({job.override_dirname}):{text}"
    print(masked_text(line), file=sys.stderr, flush=True)


def message(error: BaseException) -> str:
    """Return an error in a few lines: the innermost cause that a person can act on."""
    cause = error.__cause__
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, InstantiationException) and cause is not None:
        if isinstance(cause, UserError | InstantiationException):
            return message(cause)
        key = str(error).partition("full_key: ")[2].strip()
        return f"{cause}\n  while building {key or 'the configuration'}"
    text = f"{error}\n{cause}" if isinstance(cause, OmegaConfBaseException) else str(error)
    # Hydra proposes to add the key with a plus sign; here every key is known, so it is a misspelt one.
    plus, lines = "To append to your config use", map(str.strip, text.splitlines())
    shown = [line for line in lines if line and not line.startswith(plus)]
    if len(shown) == 1:
        shown.append("do: see all options and their values by adding `--cfg job` to the command")
    return "\n  ".join(dict.fromkeys(shown[:8]))


def perform_job(verb: str, main: Main, config: DictConfig) -> Any:
    """Perform a command; if it is a job of a sweep, add it to the sweep's table.

    A sweeper that looks for the best value gets the worst one for a run that diverges and for a value that is no number.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return perform(verb, main, config)
    value, failure, began, worst = None, "", perf_counter(), sweeps.worst(hydra)
    try:
        value = perform(verb, main, config)
    except Exception as error:
        _print_failure(hydra.job, error)
        failure = (
            message(error) if isinstance(error, ERRORS) else f"{type(error).__name__}: {error}"
        )
        if worst is None or not isinstance(error, DivergenceError):
            raise
        value = math.nan
    finally:
        try:
            sweeps.record(hydra, value, perf_counter() - began, failure)
        except OSError as error:
            print(f"warning: the table of the sweep lacks a job: {error}", file=sys.stderr)
    return worst if worst is not None and isinstance(value, float) and math.isnan(value) else value


def perform(verb: str, main: Main, config: DictConfig) -> Any:
    """Check the configuration and call the command's function with the path that it writes.

    The first process of the job decides the path for all. A folder made for it is removed if it is empty at the end.
    """
    option = COLLECTIVE.get(verb)
    try:
        _allow_processes()
        require_complete(config)
        job: Any = nullcontext()
        if option is None:
            require_alone(verb)
        else:
            job = rendezvous.joined(*_processes(config.trainer if option else config), option)
        with job:
            rendezvous.current.cleanup = remove_unused
            require_agreement(config)
            output = rendezvous.current.decided(lambda: output_path(config))
            runtime: Any = HydraConfig.get().runtime
            with read_write(runtime), open_dict(runtime):
                config.output = runtime.output_dir = str(output)
            return main(config, output)
    finally:
        remove_unused()


def _allow_processes() -> None:
    """Let a job in a process of joblib start processes: the start method of joblib starts none."""
    methods = (None, *multiprocessing.get_all_start_methods())
    if multiprocessing.get_start_method(allow_none=True) not in methods:
        multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]


def require_complete(config: DictConfig) -> None:
    """Refuse a configuration with a missing value, a count below one, or arguments that its parts do not take."""
    schema.require_parts(config)
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
    timeout = OmegaConf.select(node, "strategy.timeout")
    seconds = instantiate(timeout).total_seconds() if timeout else PATIENCE
    return (int(number) if str(number).isdigit() else 0) or None, node.num_nodes, seconds


def output_path(config: DictConfig) -> Path:
    """Return the path `output=`; its default is made here as a fresh folder. In a sweep it is the folder of the job."""
    run, default = HydraConfig.get(), ""
    cwd, path = Path(run.runtime.cwd), Path(run.runtime.output_dir)
    if run.mode != RunMode.MULTIRUN and path == cwd:
        path, unresolved = cwd / path_of(config.output), cast(Any, OmegaConf.to_container(config))
        if "${dated:" in unresolved["output"] and config.output != config.get("resume"):
            path, default = _fresh(path), unresolved["output"]
    outputs[str(path)] = default
    return path


def dated(folder: str, suffix: str = "", *, _root_: DictConfig) -> str:
    """Resolve `${dated:<folder>}`, the default of `output`, to a path with the date; `output_path` makes the folder.

    It is the same everywhere in a configuration. The folder of a sweep is made here, before Hydra makes it.
    """
    paths: dict[Any, str] = OmegaConf.get_cache(_root_)["dated"]
    if (folder, suffix) not in paths:
        path = Path(f"{folder}/{datetime.now():%Y-%m-%d_%H-%M-%S}{suffix}")
        sweep = OmegaConf.select(_root_, "hydra.mode") == RunMode.MULTIRUN
        paths[folder, suffix] = str(_fresh(path) if sweep else path)
    return paths[folder, suffix]


def _fresh(path: Path) -> Path:
    """Make a folder that no other process has made, with a number behind its name if need be."""
    _made.extend([p for p in path.parents if not p.exists()][::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = path.with_name(f"{path.name}_{number}") if number > 1 else path
        with suppress(FileExistsError):
            folder.mkdir()
            break
    _made.append(folder)
    return folder


def remove_unused() -> None:
    """Remove the folders made here that are still empty."""
    while _made:
        with suppress(OSError):
            _made.pop().rmdir()


def run_folder(resume: str | None, fresh: str) -> str:
    """Return the default folder of a run: the one that it resumes, or a fresh one, also if that is missing."""
    return fresh if resume in (None, AUTO) or not path_of(resume).is_dir() else resume


def compose(overrides: Sequence[str] = (), verb: str = "train") -> DictConfig:
    """Return the checked configuration of src/<verb>.py with these options, written as on its command line.

    config = compose(["mode=ct", "data=digits", "trainer.max_steps=100"])
    config.optimizer.lr = 1e-3
    train(config)
    """
    record = _compose(overrides, verb)
    config = deepcopy(record)
    with open_dict(config):
        del config["hydra"]
    require_complete(config)
    vars(config)[RECORD] = record
    return config


def _compose(overrides: Sequence[str], verb: str) -> DictConfig:
    options = [overrides] if isinstance(overrides, str) else list(overrides)
    schema.register_experiments(options)
    verbs = sorted(file.stem for file in (ROOT / "conf").glob("*.yaml"))
    require(verb in verbs, f"a verb among {', '.join(verbs)}", verb, "choose one")
    # Another use of Hydra around this one continues unchanged.
    outer, base = GlobalHydra.instance().hydra, hydra.version.getbase()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return hydra.compose(verb, for_hydra(named(verb, options)), return_hydra_config=True)
    except ERRORS as error:
        raise UserError(message(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer
        if outer is not None:
            hydra.version.setbase(str(base))


def called(main: Main, config: DictConfig, verb: str) -> Any:
    """Run a verb's function with a configuration that was composed, and perhaps changed, in Python.

    Changes count as options of the command line: for a run that is resumed, and for further ranks. The default `output`
    becomes a fresh dated folder, which is in `config.output` afterwards.
    """
    composed = vars(config).get(RECORD)
    record = _compose([], verb) if composed is None else deepcopy(composed)
    before: Any = OmegaConf.to_container(record)
    plain: Any = OmegaConf.to_container(config)
    del before["hydra"]
    config.output = outputs.get(plain["output"]) or plain["output"]
    with read_write(record), open_dict(record):
        record.hydra.mode = RunMode.RUN
        record.hydra.overrides.task = [*given_options(record.hydra), *changes(before, plain)]
        record.hydra.runtime.cwd = record.hydra.runtime.output_dir = str(Path.cwd())
        if composed is None:
            record.hydra.runtime.choices = {}
    outer = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(record)
        return perform(verb, main, config)
    finally:
        HydraConfig.instance().cfg = outer


# On import, because the processes of a launcher import nothing else, and Hydra's own `compose` needs them as well.
schema.register()
OmegaConf.register_new_resolver("dated", dated, replace=True)
OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
OmegaConf.register_new_resolver("job_folder", sweeps.folder_name, replace=True)
