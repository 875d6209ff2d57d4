"""Where a run begins: at step 0 of a fresh folder, or where the run in a folder stood, with the configuration saved there."""

import math
import shlex
from collections.abc import Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from consistency import trusted
from consistency.checkpoint import CHECKPOINTS, LAST, PREVIOUS
from consistency.command import AUTO, given_options, require_fresh
from consistency.errors import UserError, require
from consistency.masking import MASK, masked
from consistency.paths import path_of
from consistency.runtime.files import write_text
from consistency.runtime.meeting import decided
from consistency.schema import Train
from consistency.training.rotation import newest

CONFIG = "config.yaml"
DEVICES = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")
FREE = (*DEVICES, "trainer.max_steps", "data.num_workers", "data.allow_reorder", "logger")
"""What may be given anew when a run goes on, because its result does not depend on it, or is meant to."""

SHOWN = 4
ABSENT = "nothing"


@dataclass(frozen=True)
class Start:
    """The configuration of the run, and where it begins: `checkpoint` None and `step` 0 where none has been kept.

    resumed: the folder holds a run already; step: optimizer steps done; sources: the files that the run began with, and
    value: the best monitored value, as its checkpoint has them.
    """

    config: DictConfig
    resumed: bool = False
    checkpoint: Path | None = None
    step: int = 0
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    value: float = math.nan


def begin(config: DictConfig, output: Path) -> Start:
    """What `resume=` means for the folder `output`, as the first process of the job finds it. Changes no file.

    Raises `UserError` where the folder is not fresh, is no run, or was begun with other settings than those given.
    """
    found = decided(lambda: _found(config, output))
    if not found["resumed"]:
        return Start(config)
    path = found["checkpoint"] and Path(found["checkpoint"])
    resumed = resumed_config(config, output)
    return Start(resumed, True, path, found["step"], found["sources"], found["value"])


def _found(config: DictConfig, output: Path) -> dict[str, Any]:
    """The fields of a `Start` but for its configuration, in plain values."""
    nothing: dict[str, Any] = {"resumed": False, "checkpoint": None, "step": 0, "sources": {}}
    nothing["value"] = math.nan
    if config.resume is None:
        again = shlex.quote(f"resume={output}")
        require_fresh(output, f"choose another output=, or go on with {again}")
        return nothing
    if config.resume == AUTO and _is_fresh(output):
        print(f"No run at {output} to go on with: it begins there.", flush=True)
        return nothing
    folder = output if config.resume == AUTO else path_of(config.resume).absolute()
    run = next((f for f in (folder, *folder.parents[:2]) if (f / CONFIG).is_file()), folder)
    require(
        run == folder or not folder.exists(),
        f"the folder of a run at resume={config.resume}",
        f"something inside of the run {run}",
        f"say {shlex.quote(f'resume={run}')}",
    )
    require(
        folder.is_dir(),
        f"a run folder at resume={config.resume}",
        "a file" if folder.exists() else "no such folder",
        "check the path; it is taken relative to the folder the command runs in",
    )
    require(
        folder.resolve() == output.resolve(),
        "the same folder at output= and resume=",
        f"output={output} and resume={folder}",
        "leave output= out; in a sweep say output=<folder> resume=auto",
    )
    require(
        (folder / CONFIG).is_file(),
        f"a run folder with its {CONFIG} at {folder}",
        "a folder without one",
        "check the path, or begin a run in another folder",
    )
    resumed_config(config, folder)
    found = newest(folder / CHECKPOINTS)
    if found is None:
        print(f"{folder} has no checkpoint yet: the run begins again at step 0.", flush=True)
        return nothing | {"resumed": True}
    path, content = found
    if path.name == PREVIOUS:
        state = "damaged" if path.with_name(LAST).is_file() else "missing"
        print(f"{path.with_name(LAST)} is {state}: {PREVIOUS} is taken instead.", flush=True)
    step = int(content["global_step"])
    print(f"Going on with {folder} at step {step}.", flush=True)
    kept = [state["best_value"] for state in content["callbacks"].values() if "best_value" in state]
    return {
        "resumed": True,
        "checkpoint": str(path),
        "step": step,
        "sources": content["sources"],
        "value": next(filter(math.isfinite, kept), math.nan),
    }


def keep_config(config: dict[str, Any], folder: Path) -> None:
    """Writes the plain configuration of a run into its folder, once."""
    if not (folder / CONFIG).is_file():
        write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(config)))


def resumed_config(config: DictConfig, folder: Path) -> DictConfig:
    """The configuration saved in a run folder with what the command line may change; `config` is the one composed now.

    Everything that the command line names, a choice with all it stands for, must say what the saved one says, else
    `UserError`; what it does not name comes from the saved one.
    """
    saved = _saved_config(folder, _targets(OmegaConf.to_container(config)))
    now = deepcopy(config)
    for key in (*FREE, "output", "resume"):
        OmegaConf.update(now, key, OmegaConf.select(saved, key), merge=False, force_add=True)
    places = _named(HydraConfig.get(), saved)
    before = OmegaConf.to_container(saved, resolve=True)
    after = masked(OmegaConf.to_container(now, resolve=True))
    contradictions = [
        f"{where}={new}, where the run has {where}={old}"
        for place in places
        for where, old, new in _differences(place, _at(before, place), _at(after, place))
    ]
    shown = list(dict.fromkeys(contradictions))[:SHOWN]
    require(
        not contradictions,
        f"the settings of {folder / CONFIG}",
        "\n       ".join(shown),
        f"leave them out, or begin another run; only {', '.join(FREE)} may change",
    )
    given = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    for place in filter(None, places):
        if MASK in str(_at(before, place)):  # a secret, which is stored nowhere
            OmegaConf.update(saved, place, OmegaConf.select(given, place), merge=False)
    for key in FREE:
        named = any(f"{place}.".startswith(f"{key}.") for place in places)
        if named or (key in DEVICES and "trainer" in places):
            OmegaConf.update(saved, key, OmegaConf.select(given, key), merge=False, force_add=True)
    return saved


def _targets(tree: Any) -> set[str]:
    """All that the nodes of a tree are built by: what this command itself names is trusted."""
    if isinstance(tree, list):
        return {target for part in tree for target in _targets(part)}
    if not isinstance(tree, dict):
        return set()
    own = {tree["_target_"]} if isinstance(tree.get("_target_"), str) else set()
    return own | _targets(list(tree.values()))


def _is_fresh(folder: Path) -> bool:
    """Whether nothing has begun: a process that died first of all may have left a piece of its configuration."""
    return not folder.exists() or all(path.name == f"{CONFIG}.part" for path in folder.iterdir())


def _saved_config(folder: Path, also: Collection[str]) -> DictConfig:
    """A run's own configuration; where its folder has been moved, the paths inside it have moved along. Beside what any
    configuration from elsewhere may name it may name `also`.
    """
    loaded = trusted.read(folder / CONFIG, also)
    try:
        moved = _moved(loaded, str(loaded["output"]), str(folder))
        saved = OmegaConf.merge(OmegaConf.structured(Train), moved)
    except (KeyError, OmegaConfBaseException) as error:
        raise UserError(
            f"expected the configuration of a run in {folder / CONFIG}\n  got: {error}\n"
            "  do: put the file back as the run wrote it"
        ) from error
    assert isinstance(saved, DictConfig)
    OmegaConf.set_struct(saved, True)
    return saved


def _moved(node: Any, old: str, new: str) -> Any:
    if isinstance(node, dict):
        return {key: _moved(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [_moved(value, old, new) for value in node]
    inside = isinstance(node, str) and (node == old or node.startswith(f"{old}/"))
    return f"{new}{node[len(old) :]}" if inside else node


def _named(hydra: Any, saved: DictConfig) -> list[str]:
    """The places in the configuration that the command line names; "" is all of it, which experiment= stands for."""
    places = []
    for override in OverridesParser.create().parse_overrides(given_options(hydra)):
        key, package = override.key_or_group, override.package
        place = (package or key).replace("/", ".")
        choice = key if package is None else f"{key}@{package}"
        everywhere = choice in hydra.runtime.choices and place not in saved
        places.append("" if everywhere and "." not in place else place)
    return places


def _at(tree: Any, place: str) -> Any:
    for key in filter(None, place.split(".")):
        if not isinstance(tree, dict) or key not in tree:
            return ABSENT
        tree = tree[key]
    return tree


def _differences(place: str, old: Any, new: Any) -> Iterable[tuple[str, Any, Any]]:
    """Place, old and new value of every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            where = f"{place}.{key}" if place else str(key)
            yield from _differences(where, old.get(key, ABSENT), new.get(key, ABSENT))
    elif old != new and not (old == ABSENT and new is None):  # an option younger than the run
        yield place, old, new
