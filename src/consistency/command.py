"""The shape that all commands share: Hydra in front, one clear error message behind; and the same without a command line."""

import multiprocessing
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeAlias

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from consistency import schema
from consistency.binding import require_bound
from consistency.errors import UserError, require
from consistency.masking import masked_output, masked_text
from consistency.output import claimed, is_claimed, register_dated, remove_unused
from consistency.paths import expanded, path_of
from consistency.runtime import interrupt, meeting
from consistency.runtime.ranks import here, is_started_here, require_alone

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "_CONSISTENCY_COMMAND"
AUTO = "auto"
"""resume=auto: goes on with what is at output=, or begins there."""

Main: TypeAlias = Callable[[DictConfig, Path], Any]
"""What a command does with its configuration and output folder; a number that it returns is what a sweeper minimises."""

METHODS = multiprocessing.get_all_start_methods()
OVERRIDE = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
SWEEP = re.compile(r"(choice|glob|interval|range|shuffle|sort|tag)\s*\(.*\)", re.DOTALL)

PATIENCE = 300.0
"""Seconds that the processes of a job wait for each other at its start, where trainer.strategy.timeout is not given."""


def register_experiments(folder: Path = ROOT / "experiments") -> None:
    """Makes every YAML below experiments/ an option of `experiment=`."""
    store = ConfigStore.instance()
    for file in sorted(folder.rglob("*.yaml")):
        name = file.relative_to(folder).with_suffix("")
        store.store(
            group="/".join(("experiment", *name.parent.parts)),
            name=name.name,
            node=OmegaConf.load(file),
            package="_global_",
            provider="experiments",
        )


def register_samplers(folder: Path = ROOT / "conf" / "sampler") -> None:
    """Make every file of conf/sampler an option of the list `samplers=`."""
    for file in folder.glob("*.yaml"):
        node = {"defaults": [{f"/sampler@{file.stem}": file.stem}]}
        ConfigStore.instance().store(group="samplers", name=file.stem, node=node)


def command(name: str) -> Callable[[Main], Callable[[], None]]:
    """Turns `main(config, output folder)` into a command configured by conf/<name>.yaml.

    Whatever a person can mend ends in one message and exit status 2, without a stack trace; HYDRA_FULL_ERROR=1 brings
    the trace back.
    """

    def decorate(main: Main) -> Callable[[], None]:
        def job(config: DictConfig) -> Any:
            run = HydraConfig.get()
            try:
                return _done(name, main, config)
            except Exception as error:
                if run.mode == RunMode.MULTIRUN:
                    _tell_failure(run, error)
                raise

        entry = hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)

        def guarded() -> None:
            asked = os.environ.get("HYDRA_FULL_ERROR") == "1" and INSIDE not in os.environ
            os.environ.update({"HYDRA_FULL_ERROR": "1", INSIDE: "1"})
            try:
                register_experiments()
                sys.argv[1:] = taken(sys.argv[1:])
                _require_no_sweep(sys.argv[1:])
                with masked_output(), interrupt.stoppable(remove_unused):
                    entry(job)()
            except interrupt.Interrupted:
                interrupt.say(stopped(name))
                raise
            except (UserError, HydraException, OmegaConfBaseException) as error:
                if asked:
                    raise
                text = masked_text(message(error))
                if not is_started_here():
                    print(f"error: {text}", file=sys.stderr, flush=True)
                if name in SEVERAL:
                    meeting.tell_early(error, text)
                sys.exit(error.status if isinstance(error, meeting.EndedError) else 2)
            except Exception as error:
                if name in SEVERAL:
                    meeting.tell_early(error, f"{type(error).__name__}: {error}")
                raise

        return guarded

    return decorate


SEVERAL = {"train": "trainer.", "evaluate": ""}
"""The commands that work in several processes, and what stands before `devices` and `num_nodes` in their options."""

CONTINUED = ("sample", "search", "prepare")
"""The commands that go on with what is there, where they are run again."""

_output: Path | None = None


@contextmanager
def placed(verb: str, config: DictConfig) -> Iterator[Path]:
    """The folder or file that the command writes, for all its processes as the first of them has decided.

    Stands in `config.output` too. What was made for the command alone, and is empty at the end, is removed.
    """
    try:
        if verb in SEVERAL:
            devices, nodes, seconds = _asked(config.trainer if SEVERAL[verb] else config)
            with meeting.together(devices, nodes, seconds, _words, SEVERAL[verb]):
                plain = OmegaConf.to_container(config, resolve=False)
                assert isinstance(plain, dict)
                meeting.agreed({str(k): v for k, v in plain.items() if k != "output"})
                yield _settled(config, Path(meeting.decided(lambda: str(output_path(config)))))
        else:
            require_alone(verb)
            yield _settled(config, output_path(config))
    finally:
        remove_unused()


def _asked(node: DictConfig) -> tuple[int | None, int, float]:
    """Devices of a machine, None where only the machine can say; machines; seconds that they wait for each other."""
    devices: Any = node.devices
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part] if "," in devices else devices
        devices = int(devices) if str(devices).isdigit() else devices
    count = len(devices) if isinstance(devices, list | ListConfig) else devices
    timeout = OmegaConf.select(node, "strategy.timeout") if "strategy" in node else None
    seconds = instantiate(timeout).total_seconds() if timeout else PATIENCE
    return count if isinstance(count, int) and count > 0 else None, node.num_nodes, seconds


def _settled(config: DictConfig, output: Path) -> Path:
    global _output
    config.output, _output = str(output), output
    known: Any = HydraConfig.instance().cfg
    with read_write(known.hydra.runtime), open_dict(known.hydra.runtime):
        known.hydra.runtime.output_dir = str(output)
    return output


def _words(error: BaseException) -> str:
    return masked_text(message(error))


def _require_no_sweep(arguments: Sequence[str]) -> None:
    sweep = {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments)
    place = here()
    require(
        not sweep or place.rank is None or (place.processes or 1) == 1,
        "one process that runs a sweep, and starts the processes of each job itself",
        f"{place.processes}, started by {place.launcher}",
        f"leave {place.launcher} out, or leave -m out and start every job by itself",
    )


def stopped(verb: str) -> str:
    """The line about a command that Ctrl-C has ended."""
    again = ""
    if verb in CONTINUED and _output is not None and not is_claimed(_output):
        again = "; the same command again goes on"
    elif verb in CONTINUED and _output is not None and _output.exists():
        again = f"; the same command with {shlex.quote(f'output={_output}')} goes on"
    return f"stopped by Ctrl-C{again}"


def _done(verb: str, main: Main, config: DictConfig) -> Any:
    """Checks the configuration and hands it to a command's own function."""
    _allow_processes()
    _require_whole(config)
    with placed(verb, config) as output:
        return main(config, output)


def _allow_processes() -> None:
    """Lets a job in a process of joblib start processes: the start method there is joblib's own, which starts no others."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *METHODS):
        multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]


def _require_whole(config: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(config))
    require(
        not missing,
        f"a value for {', '.join(missing)}",
        "none",
        f"add {' '.join(f'{key}=...' for key in missing)} to the command",
    )
    require_bound(config)


def _tell_failure(run: Any, error: Exception) -> None:
    """Says at once which job of a sweep fails, and why: of all that fail a sweeper raises one, without what caused it."""
    job = f"error: job {run.job.num} of the sweep ({run.job.override_dirname})"
    if isinstance(error, UserError | HydraException | OmegaConfBaseException):
        print(f"{job}: {masked_text(message(error))}", file=sys.stderr, flush=True)
    else:
        trace = "".join(traceback.format_exception(error))
        print(f"{job}:\n{masked_text(trace)}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------ without a command line


def composed(overrides: Sequence[str], verb: str) -> DictConfig:
    """The checked configuration of a verb, with Hydra's own part of it out of sight; see `consistency.compose`."""
    config = _with_hydra(overrides, verb)
    shown = _without_hydra(config)
    _require_whole(shown)
    vars(shown)[RECORD] = config
    return shown


RECORD = "_composed"
"""The attribute of a configuration under which it keeps what Hydra composed: lost in a copy, and then made anew."""


def _with_hydra(overrides: Sequence[str], verb: str) -> DictConfig:
    register_experiments()
    given = [overrides] if isinstance(overrides, str) else list(overrides)
    verbs = sorted(file.stem for file in (ROOT / "conf").glob("*.yaml"))
    require(verb in verbs, f"a verb among {', '.join(verbs)}", verb, "choose one")
    theirs, base = GlobalHydra.instance().hydra, hydra.version.getbase()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return hydra.compose(verb, taken(given), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(message(error)) from error
    finally:
        # Another use of Hydra, around this one, goes on as it was.
        GlobalHydra.instance().hydra = theirs
        if theirs is not None:
            hydra.version.setbase(str(base))


def _without_hydra(config: DictConfig) -> DictConfig:
    shown = deepcopy(config)
    with open_dict(shown):
        del shown["hydra"]
    return shown


def called(main: Main, config: DictConfig, verb: str) -> Any:
    """Does what the command `verb` does, with a configuration that was composed, and perhaps changed, in Python.

    What was changed counts as named on the command line: where the run is resumed, and in further processes of it.
    Where nobody has said `output`, it is a fresh dated folder, and stands in `config.output` afterwards.
    """
    made = vars(config).get(RECORD)
    record = deepcopy(made) if made is not None else _with_hydra([], verb)
    changes = list(_changes(_plain(_without_hydra(record)), _plain(config)))
    written = str(_plain(config)["output"])
    config.output = written = MADE.get(written, written)
    with read_write(record), open_dict(record):
        record.hydra.mode = RunMode.RUN
        record.hydra.overrides.task = [*given_options(record.hydra), *changes]
        record.hydra.runtime.cwd = record.hydra.runtime.output_dir = str(Path.cwd())
        if made is None:
            record.hydra.runtime.choices = {}
    before = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(record)
        return _done(verb, main, config)
    finally:
        if is_claimed(Path(config.output)):
            MADE[config.output] = written
        HydraConfig.instance().cfg = before


MADE: dict[str, str] = {}
"""The folders that were made because nobody said `output`, and what stood there."""


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _changes(old: dict[str, Any], new: dict[str, Any], above: str = "") -> Iterator[str]:
    """The overrides that make the one configuration of the other."""
    for key in dict.fromkeys([*old, *new]):
        place = f"{above}.{key}" if above else key
        if place == "output" or (key in old and key in new and old[key] == new[key]):
            continue
        if key not in new:
            yield f"~{place}"
        elif isinstance(old.get(key), dict) and isinstance(new[key], dict):
            yield from _changes(old[key], new[key], place)
        else:
            yield f"++{place}={_spelled(new[key])}"


def _spelled(value: Any) -> str:
    """A plain value as Hydra's command line has it."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_spelled(each)}' for key, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_spelled, value))}]"
    return quoted(value) if isinstance(value, str) else "null" if value is None else str(value)


# ------------------------------------------------------------------------ paths, to Hydra and to a shell


def taken(arguments: Sequence[str]) -> list[str]:
    """The arguments with every path in them quoted for Hydra, whose grammar then takes it as it is."""
    sweep = any(flag in arguments for flag in ("-m", "--multirun", "hydra.mode=MULTIRUN"))
    options = [option for argument in arguments for option in spelled_out(argument)]
    return [_taken(option, sweep=sweep) for option in options]


def _taken(argument: str, *, sweep: bool) -> str:
    found = OVERRIDE.fullmatch(argument)
    if found is None or not schema.is_path(found[2]):
        return argument
    prefix, key, value = found.groups()
    whole = not sweep or key in ("output", "hydra.run.dir", "hydra.sweep.dir") or _is_there(value)
    if not whole and SWEEP.fullmatch(value):
        return argument
    pieces = [value] if whole else list(_pieces(value))
    return f"{prefix}{key}={','.join(map(_path, pieces))}"


def _pieces(value: str) -> Iterator[str]:
    """The paths of a sweep, cut at commas: the longest that are there, else as short as possible."""
    parts = value.split(",")
    while parts:
        starts = [",".join(parts[:n]) for n in range(1, len(parts) + 1)]
        whole = [piece for piece in starts if piece.count("${") <= piece.count("}")]
        piece = next((p for p in starts[::-1] if _is_one(p.strip())), (whole or starts[-1:])[0])
        yield piece if _is_there(piece) else piece.strip()
        parts = parts[starts.index(piece) + 1 :]


def _is_one(piece: str) -> bool:
    return QUOTED.fullmatch(piece) is not None or _is_there(piece)


def _is_there(value: str) -> bool:
    return bool(value) and os.path.lexists(expanded(value))


def _path(value: str) -> str:
    """A path as Hydra has to be given it; null and what is empty keep their meaning, as an interpolation does in quotes."""
    if QUOTED.fullmatch(value) and not _is_there(value):
        value = str(OverridesParser.create().parse_override(f"x={value}").value())
    elif value.lower() in ("", "null"):
        return value
    return quoted(expanded(value))


def quoted(text: str) -> str:
    """A text as it stands in an override, where Hydra takes every character of it for itself."""
    return QuotedString(text, Quote.single).with_quotes()


def given_options(run: Any) -> list[str]:
    """The options of a job as they were given; `run` is Hydra's part of its configuration, which would fill them in."""
    options = OmegaConf.to_container(run.overrides.task, resolve=False)
    assert isinstance(options, list)
    return [str(option) for option in options]


def spelled_out(argument: str) -> list[str]:
    """Where a choice has an option `file`, a path is that option: mask=a.png is mask=file mask.path=a.png."""
    if argument == "experiment=null":
        return []
    argument = with_none(argument)
    group, _, value = argument.partition("=")
    folder = ROOT / "conf" / group
    takes_path = group.isidentifier() and (folder / "file.yaml").is_file()
    if not takes_path or (folder / f"{value}.yaml").is_file():
        return [argument]
    named = bool(Path(value).suffix) or path_of(value).is_file()
    return [f"{group}=file", f"{group}.path={value}"] if named else [argument]


def shell_line(verb: str, *options: str) -> str:
    """The command line of a verb, to be pasted into a shell as it is."""
    return shlex.join([sys.executable, str(ROOT / "src" / f"{verb}.py"), *options])


# ------------------------------------------------------------------------ messages and folders


def with_none(argument: str) -> str:
    """Where a choice has an option `none`, null is that option, which Hydra would end with a trace: logger=null."""
    key, _, value = argument.partition("=")
    choices = value.split(",")
    group = key.partition("@")[0]
    folder = ROOT / "conf" / ("sampler" if group == "samplers" else group)
    if "null" not in choices or not key or not folder.is_dir():
        return argument
    require(
        (folder / "none.yaml").is_file(),
        f"{key}= among {', '.join(sorted(file.stem for file in folder.glob('*.yaml')))}",
        argument,
        "choose one",
    )
    return f"{key}={','.join('none' if choice == 'null' else choice for choice in choices)}"


def message(error: BaseException) -> str:
    """What went wrong in a few lines: the innermost cause that speaks to a person."""
    if isinstance(error, UserError):
        # One from a process that loads data comes with that process's trace in front.
        traced = re.search(r"Original Traceback.*\n[\w.]+: (expected .*)|$", str(error), re.S)
        return (traced and traced[1]) or str(error)
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        cause = error.__cause__
        if isinstance(cause, UserError | InstantiationException):
            return message(cause)
        place = next((line for line in str(error).splitlines() if "full_key" in line), "")
        return f"{cause}\n  while building {place.strip() or 'the configuration'}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error.__cause__, OmegaConfBaseException) and error.__cause__ is not error:
        lines += [line.strip() for line in str(error.__cause__).splitlines() if line.strip()]
    # Hydra proposes to add the key with a plus sign; here every key is known, so it is a misspelt one.
    lines = [line for line in lines if not line.startswith("To append to your config use")]
    if len(lines) == 1:
        lines.append("do: see all options and their values by adding `--cfg job` to the command")
    return "\n  ".join(dict.fromkeys(lines[:8]))


def output_path(config: DictConfig) -> Path:
    """The path `output=`, whose folder is made here where nobody says it; in a sweep the folder of the job."""
    hydra = HydraConfig.get()
    cwd, folder = Path(hydra.runtime.cwd), Path(hydra.runtime.output_dir)
    if hydra.mode == RunMode.MULTIRUN or folder != cwd:
        return folder
    return claimed(config.output, cwd)


def run_folder(resume: str | None, fresh: str) -> str:
    """Where a run writes by default: into the folder that it resumes, or into a fresh one.

    Hydra makes the folder of a job, so a missing one must not be named: the command then says that it is missing.
    """
    if resume in (None, AUTO):
        return fresh
    folder = path_of(str(resume))
    return str(folder) if folder.is_dir() else "."


def require_fresh(
    folder: Path, remedy: str = "choose another output=, or move the old one away"
) -> None:
    """Refuses to write into a folder that already holds something."""
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"a new or empty folder to write to at output={folder}",
        "a folder with content" if folder.is_dir() else "a file",
        remedy,
    )


# With the module, because the processes of a launcher import nothing else, and Hydra's own `compose` is served as well.
schema.register()
register_samplers()
register_dated()
OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
