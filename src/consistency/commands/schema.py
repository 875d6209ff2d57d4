"""The keys that a configuration may have, and their types; a misspelt key is an error.

The values are in conf/, except those that the YAML of every data set would repeat (`Data`) and of `Mode`. A node of type
`Any` is built by its `_target_`, whose signature refuses unknown arguments.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from consistency.runtime.files import ROOT

PATHS = ("checkpoint", "export", "init", "input", "mode.init", "output", "resume", "samples", "source", "teacher", "verify")  # fmt: skip
PATH_WORDS = ("cache", "dir", "dirpath", "extractor", "file", "folder", "metrics", "path", "picture", "reference")  # fmt: skip

POSITIVE = ("batch_size", "devices", "num_nodes", "num_samples", "outputs", "points")
"""Counts at the top of a configuration that must be at least 1; null is no count."""


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
class Model:
    """A network and the scale of its time input, c_noise = c_noise_scale ln t."""

    c_noise_scale: float
    network: Any


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


@dataclass(kw_only=True)
class Train:
    """conf/train.yaml."""

    seed: int
    output: str
    teacher: str | None
    teacher_weights: str
    init: str | None
    init_weights: str
    resume: str | None
    on_nonfinite: str
    process: Any
    model: Model
    mode: Mode
    data: Data
    optimizer: Any
    callbacks: dict[str, Any] = field(default_factory=dict)
    trainer: Any
    logger: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Benchmark(Train):
    """conf/benchmark.yaml."""

    part: str
    images: int | None
    seconds: float
    train_steps: int
    train_batch: int | None


@dataclass(kw_only=True)
class Draw:
    """The options that sample and evaluate share."""

    role: str | None
    seed: int
    num_samples: int
    batch_size: int
    labels: Any
    force: bool
    device: str
    devices: int
    precision: str
    output: str
    process: Any


@dataclass(kw_only=True)
class Sample(Draw):
    """conf/sample.yaml."""

    checkpoint: str
    weights: str
    images: bool
    trajectory: bool
    compile: bool
    sampler: Any


@dataclass(kw_only=True)
class Measurement:
    """conf/measure."""

    extractor: str
    reference: str | None
    reference_features: int
    cache: str | None


@dataclass(kw_only=True)
class Evaluate(Draw):
    """conf/evaluate.yaml."""

    checkpoint: str | None
    samples: str | None
    export: str | None
    weights: Any
    num_nodes: int
    evaluation: Measurement
    samplers: dict[str, Any] = field(default_factory=dict)
    data: Data
    logger: dict[str, Any] = field(default_factory=dict)
    model: Any
    callbacks: Any


@dataclass(kw_only=True)
class Edit:
    """conf/edit.yaml."""

    checkpoint: str
    input: str | None
    background: str | None
    teacher: str | None
    role: str | None
    weights: str
    seed: int
    outputs: int
    batch_size: int
    labels: Any
    start: str | None
    images: bool
    device: str
    output: str
    process: Any
    task: Any
    mask: Any


@dataclass(kw_only=True)
class Compare:
    """conf/compare.yaml."""

    seed: int
    data: str
    teacher_mode: str
    modes: list[str]
    seconds: float
    calibration_steps: int
    overrides: list[str] = field(default_factory=list)
    output: str


@dataclass(kw_only=True)
class Convert:
    """conf/convert.yaml."""

    source: str | None
    to: str
    verify: str | None
    role: str | None
    weights: str
    image_size: int | None
    num_head_channels: int | None
    attention_resolutions: list[int] | None
    num_heads: int | None
    num_heads_upsample: int | None
    output: str


@dataclass(kw_only=True)
class Demo:
    """conf/demo.yaml."""

    checkpoint: str
    role: str | None
    weights: str
    device: str
    background: str | None
    host: str
    port: int
    upload_megabytes: int
    browser: bool
    output: str


@dataclass(kw_only=True)
class Search:
    """conf/search.yaml."""

    checkpoint: str
    weights: str
    points: int
    num_scales: int
    metric: str
    evaluation: Measurement
    num_samples: int | None
    seed: int
    batch_size: int
    device: str
    devices: int
    output: str


@dataclass(kw_only=True)
class Prepare:
    """conf/prepare.yaml."""

    source: str
    to: str
    resolution: int | None
    channels: int | None
    crop: Any
    split: str
    classes: bool
    on_bad: str
    background: str | None
    num_workers: int | None
    output: str


SCHEMAS = (Train, Benchmark, Sample, Evaluate, Edit, Compare, Convert, Search, Demo, Prepare)


def register() -> None:
    """Store the schemas in Hydra under the names of their commands: train_schema, prepare_schema and so on."""
    for schema in SCHEMAS:
        ConfigStore.instance().store(name=f"{schema.__name__.lower()}_schema", node=schema)


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
