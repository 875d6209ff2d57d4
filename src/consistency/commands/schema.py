"""The keys that a configuration may have, and their types; a misspelt key is an error.

The default values in conf/ give both, except for the nodes that each data set and each mode has. A node of type `Any` is
built by its `_target_`, whose signature refuses unknown arguments.
"""

import re
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from consistency.runtime.files import ROOT

PATHS = ("checkpoint", "export", "init", "input", "mode.init", "output", "resume", "samples", "source", "teacher", "verify")  # fmt: skip
PATH_WORDS = ("cache", "dir", "dirpath", "extractor", "file", "folder", "metrics", "path", "picture", "reference")  # fmt: skip

POSITIVE = ("batch_size", "devices", "num_nodes", "num_samples", "outputs", "points")
"""Counts at the top of a configuration that must be at least 1; null is no count."""

COUNTS = ("channels", "image_size", "images", "num_head_channels", "num_heads", "num_heads_upsample", "num_samples", "num_workers", "resolution", "train_batch")  # fmt: skip
OPTIONAL = {
    **dict.fromkeys(COUNTS, int | None),
    **dict.fromkeys(("callbacks", "labels", "model", "process", "weights"), Any),
    "attention_resolutions": list[int] | None,
}
"""Types of the options that are null or the mode's by default, if they are no text."""


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
    """A training method, named part by part."""

    role: str
    init: str | None = None
    total_steps: int
    process: Process
    preconditioning: Any
    sampling_preconditioning: Any
    objective: Any
    callbacks: dict[str, Any] = field(default_factory=dict)
    samplers: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Data:
    """A data set and its batches.

    batch_size: images of an optimizer step over all devices.
    device_batch_size: most images that a device holds at once; null for no limit.
    on_bad: stop or skip, at an image that cannot be used.
    in_memory: decode the images once and hold them.
    background: colour behind transparent images; null refuses them.
    download: fetch a public set that is missing at `path`.
    allow_reorder: resume although the images come in another order than before.
    """

    source: Any
    held_out: Any = None
    path: str | None = None
    image_size: int
    channels: int
    num_classes: int | None = None
    batch_size: int
    device_batch_size: int | None = None
    num_workers: int = 0
    flip: bool = False
    on_bad: str = "stop"
    background: str | None = None
    in_memory: bool = False
    download: bool = False
    allow_reorder: bool = False


def _type(name: str, default: Any) -> Any:
    if default is None or str(default).startswith("${mode."):
        return OPTIONAL.get(name, str | None)
    return {dict: Any, list: list[str]}.get(type(default), type(default))


@cache
def structure(name: str) -> Any:
    """Return a dataclass with the keys and types of conf/<name>.yaml, and the groups of its defaults list."""
    values: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / f"{name}.yaml"))
    entries = [entry for entry in values.pop("defaults", ()) if isinstance(entry, dict)]
    types = {key: _type(key, value) for key, value in values.items() if key != "hydra"}
    for group in (next(iter(entry)).rpartition("@")[2] for entry in entries):
        if group in GROUPS:
            types.setdefault(group, GROUPS[group])
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
    **dict.fromkeys(("callbacks", "logger", "samplers"), NODES),
    "data": Data,
    "evaluation": structure("metrics/inception"),
    "mode": Mode,
    "model": structure("model/unet"),
}
"""Types of the groups in a defaults list."""


def register() -> None:
    """Store the structures in Hydra under the names of their commands: train_schema, prepare_schema and so on."""
    for file in (ROOT / "conf").glob("*.yaml"):
        ConfigStore.instance().store(name=f"{file.stem}_schema", node=structure(file.stem))


def register_experiments(folder: Path = ROOT / "experiments") -> None:
    """Make every YAML below experiments/ an option of `experiment=`."""
    for file in sorted(folder.rglob("*.yaml")):
        name = file.relative_to(folder).with_suffix("")
        ConfigStore.instance().store(
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
