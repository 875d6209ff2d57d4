"""The shape that all commands share: Hydra in front, one clear error message behind."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from consistency import schema
from consistency.errors import UserError, require
from consistency.masking import masked_output, masked_text

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "_CONSISTENCY_COMMAND"
AUTO = "auto"
"""resume=auto: goes on with what is at output=, or begins there."""


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
        OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)

        def job(config: DictConfig) -> None:
            output = Path(HydraConfig.get().runtime.output_dir)
            missing = sorted(OmegaConf.missing_keys(config))
            require(
                not missing,
                f"a value for {', '.join(missing)}",
                "none",
                f"add {' '.join(f'{key}=...' for key in missing)} to the command",
            )
            config.output = str(output)
            main(config, output)

        entry = hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)

        def guarded() -> None:
            asked = os.environ.get("HYDRA_FULL_ERROR") == "1" and INSIDE not in os.environ
            os.environ.update({"HYDRA_FULL_ERROR": "1", INSIDE: "1"})
            try:
                register_experiments()
                sys.argv[1:] = [part for given in sys.argv[1:] for part in spelled_out(given)]
                with masked_output():
                    entry(job)()
            except (UserError, HydraException, OmegaConfBaseException) as error:
                if asked:
                    raise
                if "LOCAL_RANK" not in os.environ or os.environ["LOCAL_RANK"] == "0":
                    print(f"error: {masked_text(message(error))}", file=sys.stderr)
                sys.exit(2)

        return guarded

    return decorate


def spelled_out(argument: str) -> list[str]:
    """Where a choice has an option `file`, a path is that option: mask=a.png is mask=file mask.path=a.png."""
    if argument == "experiment=null":
        return []
    argument = with_none(argument)
    group, _, value = argument.partition("=")
    folder = ROOT / "conf" / group
    takes_path = group.isidentifier() and (folder / "file.yaml").is_file()
    if not takes_path or not Path(value).suffix or (folder / f"{value}.yaml").is_file():
        return [argument]
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return [f"{group}=file", f"{group}.path='{escaped}'"]


def with_none(argument: str) -> str:
    """Where a choice has an option `none`, null is that option, which Hydra would end with a trace: logger=null."""
    key, _, value = argument.partition("=")
    choices = value.split(",")
    folder = ROOT / "conf" / key.partition("@")[0]
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


def output_path(folder: Path) -> Path:
    """The path `output=`. Hydra makes the folder of a job, and `output` may be a file: so it is taken from the sweep."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return folder
    return Path(hydra.runtime.cwd) / Path(hydra.sweep.dir).expanduser()


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
