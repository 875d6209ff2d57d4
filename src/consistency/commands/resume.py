"""The start of a run: at step 0 in a fresh folder, or at a checkpoint of the run in its folder, with its configuration."""

import math
import re
import shlex
from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from consistency.checkpoints.ours import CHECKPOINTS, LAST, PREVIOUS, newest
from consistency.commands import schema
from consistency.commands.cli import AUTO
from consistency.commands.overrides import given_options
from consistency.errors import UserError, require
from consistency.runtime import allowlist, rendezvous
from consistency.runtime.files import path_of, require_fresh
from consistency.runtime.redaction import MASK, masked

CONFIG, ABSENT = "config.yaml", "nothing"

# Options that may change on resume: the result does not depend on them, or is meant to.
DEVICES = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")
SPEED = ("compile", "float32_matmul", "data.num_workers")
FREE = (*DEVICES, *SPEED, "trainer.max_steps", "data.allow_reorder", "logger")


@dataclass(frozen=True)
class RunStart:
    """The configuration of a run, and the state of its checkpoint: files that it began with, best monitored value."""

    config: DictConfig
    resumed: bool = False  # whether the folder holds a run already
    checkpoint: Path | None = None
    step: int = 0
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    value: float = math.nan


def begin(config: DictConfig, output: Path) -> RunStart:
    """Return what `resume=` means for the folder `output`, the same on every process. Changes no file.

    Raises `UserError` if the folder is not fresh, holds no run, or was begun with other settings.
    """
    state = rendezvous.current.decided(lambda: _state(config, output))
    return RunStart(config) if state is None else RunStart(resumed_config(config, output), **state)


def _state(config: DictConfig, output: Path) -> dict[str, Any] | None:
    """Return the other fields of `RunStart`, or None for a new run."""
    if (folder := _folder_of_run(config.resume, output)) is None:
        return None
    resumed_config(config, folder)  # refused before a checkpoint is read
    if (checkpoint := newest(folder / CHECKPOINTS)) is None:
        print(f"{folder} has no checkpoint yet: the run begins again at step 0.", flush=True)
        return {"resumed": True}
    path, content = checkpoint
    if path.name == PREVIOUS:
        state = "damaged" if path.with_name(LAST).is_file() else "missing"
        print(f"{path.with_name(LAST)} is {state}: {PREVIOUS} is taken instead.", flush=True)
    step, sources = int(content["global_step"]), content["sources"]
    print(f"Resuming {folder} at step {step}.", flush=True)
    best = (s["best_value"] for s in content["callbacks"].values() if "best_value" in s)
    value = next(filter(math.isfinite, best), math.nan)
    return dict(resumed=True, checkpoint=path, step=step, sources=sources, value=value)


def _folder_of_run(resume: str | None, output: Path) -> Path | None:
    """Return the folder of the run to resume, or None for a new run."""
    if resume is None:
        again = shlex.quote(f"resume={output}")
        require_fresh(output, f"choose another output=, or go on with {again}")
        return None
    folder = output if resume == AUTO else path_of(resume).absolute()
    if resume == AUTO and all(path.name == f"{CONFIG}.part" for path in folder.glob("*")):
        # At most a part of its configuration, of a process that died at once.
        print(f"No run to resume at {output}: it begins there.", flush=True)
        return None
    kind = "a folder without one" if folder.is_dir() else "a file"
    got = kind if folder.exists() else "no such folder"
    remedy = "check the path, which is relative to the folder the command runs in"
    for run in folder.parents[:2]:
        if folder.exists() and (run / CONFIG).is_file():
            remedy = f"say {shlex.quote(f'resume={run}')}"
    expected = f"a run folder with its {CONFIG} at resume={folder}"
    require((folder / CONFIG).is_file(), expected, got, remedy)
    require(
        folder.resolve() == output.resolve(),
        "the same folder at output= and resume=",
        f"output={output} and resume={folder}",
        "leave output= out; in a sweep say output=<folder> resume=auto",
    )
    return folder


def resumed_config(config: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration saved in a run folder, with the `FREE` settings of the command line.

    Every other setting that the command line names, directly or by a choice, must repeat the saved value, else it is a
    `UserError`. config: the one composed now.
    """
    targets = {node["_target_"] for _, node in schema.targets(OmegaConf.to_container(config))}
    saved, now = _saved_config(folder, targets), deepcopy(config)
    for key in [key for key in saved if OmegaConf.is_missing(saved, key)]:  # younger than the run
        saved[key] = config[key]
    for key in (*FREE, "output", "resume"):
        OmegaConf.update(now, key, OmegaConf.select(saved, key), merge=False, force_add=True)
    before = dict(_leaves(OmegaConf.to_container(saved, resolve=True)))
    after = dict(_leaves(masked(OmegaConf.to_container(now, resolve=True))))
    named = _named(HydraConfig.get(), saved)
    settings = [key for key in before | after if f"{key}.".startswith(named)]
    different = [
        f"{key}={new}, where the run has {key}={old}"
        for key in settings
        if (new := after.get(key, ABSENT)) != (old := before.get(key, ABSENT))
        and not (old == ABSENT and new is None)  # an option younger than the run
    ]
    got = "\n       ".join(different[:4])
    remedy = f"leave them out, or begin another run; only {', '.join(FREE)} may change"
    require(not different, f"the settings of {folder / CONFIG}", got, remedy)
    given = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    secrets = [key for key in settings if MASK in str(before.get(key))]  # stored nowhere
    free = [key for key in FREE if any(name.startswith(f"{key}.") for name in named)]
    for key in (*secrets, *free, *(DEVICES if "trainer." in named else ())):
        OmegaConf.update(saved, key, OmegaConf.select(given, key), merge=False, force_add=True)
    return saved


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, tree


def _saved_config(folder: Path, also: Collection[str]) -> DictConfig:
    """Read the configuration of a run, whose paths move with its folder; `also`: targets besides the allowlist."""
    path = folder / CONFIG
    try:
        loaded = allowlist.read(path, also)
    except UserError:  # from a version whose classes have moved since, or from elsewhere
        with path.open(errors="replace") as file:
            text = file.read(allowlist.MOST_BYTES)
        targets = re.findall(r"_target_: (consistency(?:\.\w+)+)\s*$", text, re.M)
        gone = next((target for target in targets if allowlist.named(target) is None), None)
        got = f"one of another version: it names {gone}, which is missing here"
        remedy = "finish it with that version; its checkpoints still open: init=, teacher= and checkpoint= take them"
        require(gone is None, f"a run that this version began, in {folder}", got, remedy)
        raise
    saved: DictConfig = OmegaConf.structured(schema.structure("train"))
    try:
        saved.merge_with(_moved(loaded, str(loaded["output"]), str(folder)))
    except (KeyError, OmegaConfBaseException) as error:
        remedy = "restore the file as the run wrote it"
        raise UserError(f"the configuration of a run in {path}", error, remedy) from error
    OmegaConf.set_struct(saved, True)
    return saved


def _moved(node: Any, old: str, new: str) -> Any:
    if isinstance(node, dict):
        return {key: _moved(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [_moved(value, old, new) for value in node]
    inside = isinstance(node, str) and (node == old or node.startswith(f"{old}/"))
    return f"{new}{node[len(old) :]}" if inside else node


def _named(hydra: Any, saved: DictConfig) -> tuple[str, ...]:
    """Return the starts of the settings that the command line names, as "data."; experiment= may change all, ""."""
    named: tuple[str, ...] = ()
    for override in OverridesParser.create().parse_overrides(given_options(hydra)):
        key, package = override.key_or_group, override.package
        name = (package or key).replace("/", ".")
        if name.startswith("parts."):  # the menu, of which the run saves what it chose
            kind = name.split(".")[1]
            named += tuple(
                f"{place}." for place, k in schema.places().items() if kind in (k, "grid")
            )
        choice = key if package is None else f"{key}@{package}"
        everywhere = choice in hydra.runtime.choices and name not in saved
        named += ("" if everywhere and "." not in name else f"{name}.",)
    return named
