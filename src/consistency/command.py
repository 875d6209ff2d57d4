"""The shape that all commands share: Hydra in front, one clear error message behind."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from consistency import schema
from consistency.errors import UserError, require
from consistency.masking import masked_output, masked_text
from consistency.runtime import files, interrupt, meeting
from consistency.runtime.ranks import here, is_started_here, require_alone

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "_CONSISTENCY_COMMAND"
AUTO = "auto"
"""resume=auto: goes on with what is at output=, or begins there."""

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


def command(name: str) -> Callable[[Callable[[DictConfig, Path], None]], Callable[[], None]]:
    """Turns `main(config, output folder)` into a command configured by conf/<name>.yaml.

    Whatever a person can mend ends in one message and exit status 2, without a stack trace; HYDRA_FULL_ERROR=1 brings
    the trace back.
    """

    def decorate(main: Callable[[DictConfig, Path], None]) -> Callable[[], None]:
        schema.register()
        files.register()
        OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)

        def job(config: DictConfig) -> None:
            missing = sorted(OmegaConf.missing_keys(config))
            require(
                not missing,
                f"a value for {', '.join(missing)}",
                "none",
                f"add {' '.join(f'{key}=...' for key in missing)} to the command",
            )
            with placed(name, config) as output:
                main(config, output)

        entry = hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)

        def guarded() -> None:
            asked = os.environ.get("HYDRA_FULL_ERROR") == "1" and INSIDE not in os.environ
            os.environ.update({"HYDRA_FULL_ERROR": "1", INSIDE: "1"})
            try:
                register_experiments()
                sys.argv[1:] = [part for given in sys.argv[1:] for part in spelled_out(given)]
                _require_no_sweep(sys.argv[1:])
                with masked_output(), interrupt.stoppable(files.remove_unused):
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
        files.remove_unused()


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
    if verb in CONTINUED and _output is not None and not files.is_claimed(_output):
        again = "; the same command again goes on"
    elif verb in CONTINUED and _output is not None and _output.exists():
        again = f"; the same command with {shlex.quote(f'output={_output}')} goes on"
    return f"stopped by Ctrl-C{again}"


def spelled_out(argument: str) -> list[str]:
    """Where a choice has an option `file`, a path is that option: mask=a.png is mask=file mask.path=a.png."""
    group, _, value = argument.partition("=")
    folder = ROOT / "conf" / group
    takes_path = group.isidentifier() and (folder / "file.yaml").is_file()
    if not takes_path or not Path(value).suffix or (folder / f"{value}.yaml").is_file():
        return [argument]
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return [f"{group}=file", f"{group}.path='{escaped}'"]


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
    return files.claimed(config.output, cwd)


def run_folder(resume: str | None, fresh: str) -> str:
    """Where a run writes by default: into the folder that it resumes, or into a fresh one.

    Hydra makes the folder of a job, so a missing one must not be named: the command then says that it is missing.
    """
    if resume in (None, AUTO):
        return fresh
    folder = Path(str(resume)).expanduser()
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
