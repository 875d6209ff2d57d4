"""The keys that a configuration may have and their types, and the arguments of the parts that it names.

The default values in conf/ give keys and types, except for the nodes that each data set and each mode has. A node of type
`Any` names its part by `_target_`, whose signature refuses unknown arguments.
"""

import inspect
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, make_dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import nn

from consistency.errors import UserError, require
from consistency.runtime.files import ROOT

HYDRAS = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")

PATHS = ("autoencoder", "checkpoint", "export", "init", "input", "mode.init", "output", "results", "resume", "samples", "source", "teacher", "verify")  # fmt: skip
PATH_WORDS = ("autoencoder", "cache", "dir", "dirpath", "extractor", "file", "folder", "metrics", "path", "picture", "reference")  # fmt: skip

POSITIVE = ("batch_size", "devices", "num_nodes", "num_samples", "outputs", "points")
"""Counts at the top of a configuration that must be at least 1; null is no count."""

COUNTS = ("batch_size", "channels", "image_size", "images", "num_head_channels", "num_heads", "num_heads_upsample", "num_samples", "num_workers", "resolution", "train_batch")  # fmt: skip
OPTIONAL = {
    **dict.fromkeys(COUNTS, int | None),
    **dict.fromkeys(
        ("callbacks", "labels", "model", "process", "scaler", "weights", "augmentation"), Any
    ),
    "attention_resolutions": list[int] | None,
    "teacher_hints": Any,
}
"""Types of the options that are null or the mode's by default, if they are no text."""
UNIONS = {"compile": bool | str, "init_hints": Any}
"""Types of the options that their default does not show."""


CHOICE = re.compile(r"\$\{parts\.(\w+)\.\$\{mode\.\1\}\}")
"""The value at the place of a part that a mode names."""


def is_path(key: str) -> bool:
    """Return whether an option takes a path: one of `PATHS`, or one below the top that ends with one of `PATH_WORDS`."""
    return key in PATHS or ("." in key and re.split(r"[._]", key)[-1] in PATH_WORDS)


@dataclass(kw_only=True)
class Process:
    """Constants of the noise process: data deviation, range and shape of the grid, points of two-step sampling."""

    sigma_data: float
    t_min: float
    t_max: float
    rho: float
    times: list[float]


@dataclass(kw_only=True)
class Mode:
    """A training method, named part by part: `distance` and those below it are names in conf/parts/<kind>.yaml."""

    role: str
    published: str | None = None  # the published run with these settings
    init: str | None = None
    total_steps: int
    process: Process
    distance: str | None = None
    pairs: str | None = None
    times: str | None = None
    tangent: str | None = None
    derivative: str | None = None
    guidance: str | None = None
    warmup: str | None = None
    alpha: str | None = None
    normalisation: str | None = None
    weighting: str | None = None
    head: str | None = None
    solver: str | None = None
    scales: str | None = None
    target: str | None = None
    rate: str
    average: str
    augmentation: str
    preconditioning: Any
    sampling_preconditioning: Any
    objective: Any
    callbacks: dict[str, Any] = field(default_factory=dict)
    samplers: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Data:
    """A data set and its batches."""

    source: Any
    held_out: Any = None
    path: str | None = None
    image_size: int
    channels: int
    num_classes: int | None = None
    batch_size: int  # images of an optimizer step over all devices
    device_batch_size: int | None = None  # most images that a device holds at once
    num_workers: int = 0
    flip: bool = False
    on_bad: str = "stop"  # stop or skip, at an image that cannot be used
    background: str | None = None  # colour behind transparent images; null refuses them
    clips: bool = True  # samplers may clip estimates to [-1, 1]: images, no latents
    in_memory: bool = False  # decode the images once and hold them
    download: bool = False  # fetch a public set that is missing at `path`
    allow_reorder: bool = False  # resume although the images come in another order than before


def _type(name: str, default: Any) -> Any:
    if default is None or str(default).startswith(("${mode.", "${parts.")):
        return OPTIONAL.get(name, str | None)
    types: dict[type, Any] = {dict: Any, list: list[str]}
    return UNIONS.get(name) or types.get(type(default), type(default))


@cache
def structure(name: str) -> Any:
    """Return a dataclass with the keys and types of conf/<name>.yaml, and the groups of its defaults list."""
    values: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / f"{name}.yaml"))
    entries = [entry for entry in values.pop("defaults", ()) if isinstance(entry, dict)]
    types = {key: _type(key, value) for key, value in values.items() if key != "hydra"}
    groups = [next(iter(entry)).rpartition("@")[2] for entry in entries]
    types |= {group: GROUPS[group] for group in groups if group in GROUPS and group not in types}
    # A group without content, as logger=none, is an empty dictionary.
    members = [
        (k, t, field(default_factory=dict) if t == NODES else field()) for k, t in types.items()
    ]
    return make_dataclass(name, members, kw_only=True, namespace={"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Return the structure of a command, which pickle looks up here."""
    if not (ROOT / "conf" / f"{name}.yaml").is_file():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return structure(name)


NODES = dict[str, Any]
GROUPS = {
    **dict.fromkeys(("crop", "mask", "optimizer", "sampler", "task", "trainer"), Any),
    **dict.fromkeys(("baseline", "callbacks", "logger", "parts", "samplers"), NODES),
    "data": Data,
    "evaluation": structure("metrics/inception"),
    "mode": Mode,
    "model": structure("model/unet"),
}
"""Types of the groups in a defaults list."""


@cache
def places() -> dict[str, str]:
    """Return the keys at which modes and callbacks take a part from the menu, and its kind, a file of conf/parts."""
    conf = ROOT / "conf"
    files = {file: "mode." for file in (conf / "mode").glob("*.yaml")}
    files |= {conf / "callbacks" / "default.yaml": "callbacks.", conf / "train.yaml": ""}
    found = {}
    for file, above in files.items():
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        waiting = [(f"{above}{name}", value) for name, value in content.items()]
        for key, value in waiting:
            if isinstance(value, dict):
                waiting += [(f"{key}.{name!s}", child) for name, child in value.items()]
            elif kind := CHOICE.fullmatch(str(value)):
                found[key] = kind[1]
    return found


def require_parts(config: DictConfig) -> None:
    """Refuse a name that the menu of parts lacks, and arguments at the place of a part."""
    tree: Any = OmegaConf.to_container(config, resolve=False)
    if "parts" not in tree:
        return
    named = {kind: tree["mode"].get(kind) for kind in tree["parts"]}
    waiting = list(places().items())
    for key, kind in waiting:
        node = reduce(lambda node, name: (node or {}).get(name), key.split("."), tree)
        name, menu = named[kind], tree["parts"][kind]
        require(
            not isinstance(node, dict),
            f"the part at {key} to be named by mode.{kind}",
            f"settings of its own: {node}",
            f"say parts.{kind}.{name}.<argument>=<value>, or for a part of your own "
            f"'+parts.{kind}.<name>={{_target_: ...}}' mode.{kind}=<name>",
        )
        if isinstance(node, str):
            expected = f"mode.{kind} among {', '.join(menu)}"
            require(name in menu, expected, name, "choose one; conf/parts has their arguments")
            inner = (CHOICE.fullmatch(str(value)) for value in (menu[name] or {}).values())
            waiting += [(f"parts.{kind}.{name}.{match[1]}", match[1]) for match in inner if match]


def require_bound(config: DictConfig) -> None:
    """Refuse a node whose part does not take its arguments, or lacks some; build nothing and open nothing.

    A part may be swapped by its `_target_` alone, and then has the arguments of the old one.
    """
    for key, node in targets(OmegaConf.to_container(config, resolve=False)):
        target = OmegaConf.select(config, f"{key}._target_".strip("."))
        parameters = _parameters(key, target)
        arguments = [str(name) for name in node if name not in HYDRAS]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        needed = [p for p in named[len(node.get("_args_") or []) :] if p.default is p.empty]
        if node.get("_partial_"):
            # Its call may add positional arguments, as the step k of a schedule, but never a keyword.
            needed = [p for p in needed if p.kind is p.KEYWORD_ONLY]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        unknown = [] if takes_any else [a for a in arguments if a not in [p.name for p in named]]
        lacking = [p.name for p in needed if p.name not in arguments]
        faults = {f"~{key}.{name}": f"{name}, which it does not take" for name in unknown}
        faults |= {f"+{key}.{name}=...": f"no {name}, which it needs" for name in lacking}
        shown = [p.name for p in named if p in needed or p.default is not p.empty]
        require(
            not faults,
            f"arguments of {target} at {key}: {', '.join(shown) or 'none'}",
            "; ".join(faults.values()),
            f"a part is swapped with its arguments: add {shlex.join(faults)} to the command",
        )


def targets(tree: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every node with a `_target_` and its key."""
    nodes = tree if isinstance(tree, dict) else {}
    if isinstance(nodes.get("_target_"), str):
        yield key, nodes
    for name, value in enumerate(tree) if isinstance(tree, list) else nodes.items():
        yield from targets(value, f"{key}.{name}".strip("."))


def _parameters(key: str, target: str) -> list[inspect.Parameter]:
    """Return the parameters of the part with that name."""
    try:
        part = get_object(target)
    except Exception as error:  # the import of a user's module can fail in any way
        reason = [type(error).__name__, *str(error.__cause__ or error).strip().splitlines()][-1]
        expected = f"the name of a class or function at {key}._target_"
        raise UserError(expected, f"{target} ({reason})", "check the name") from error
    if getattr(part, "__init__", None) is nn.Module.__init__:
        return []  # its signature takes anything, its code nothing
    try:
        return list(inspect.signature(part).parameters.values())
    except (TypeError, ValueError):  # a class in C without a signature may take anything
        return [inspect.Parameter("any", inspect.Parameter.VAR_KEYWORD)]


def register() -> None:
    """Store the structure of every command in Hydra, as train_schema and so on, and the options of `samplers=`."""
    store = ConfigStore.instance().store
    for file in (ROOT / "conf").glob("*.yaml"):
        store(name=f"{file.stem}_schema", node=structure(file.stem))
    for file in (ROOT / "conf" / "sampler").glob("*.yaml"):
        node = {"defaults": [{f"/sampler@{file.stem}": file.stem}]}
        store(group="samplers", name=file.stem, node=node)


def register_experiments(arguments: Iterable[str], folder: Path = ROOT / "experiments") -> None:
    """Make every YAML below experiments/ an option of `experiment=`, if arguments may choose one.

    arguments: the command line. Without an experiment, a sweep or a flag such as --help nothing is read: that takes 0.3 s.
    """
    if not any("experiment" in given or given.startswith("-") for given in arguments):
        return
    for file in sorted(folder.rglob("*.yaml")):
        group = "/".join(("experiment", *file.relative_to(folder).parent.parts))
        node = OmegaConf.load(file)
        ConfigStore.instance().store(file.stem, node, group, "_global_", "experiments")
