"""The keys that a configuration may have: a misspelt one is an error, wherever it stands.

Nodes typed `Any` are built by their `_target_`, whose own signature refuses unknown arguments.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

PATHS = (
    "checkpoint",
    "export",
    "init",
    "input",
    "mode.init",
    "output",
    "resume",
    "samples",
    "source",
    "teacher",
    "verify",
)
PATH_WORDS = ("cache", "dir", "dirpath", "extractor", "file", "folder", "metrics", "path", "picture", "reference")  # fmt: skip


def is_path(key: str) -> bool:
    """Whether an option takes a path: one of `PATHS`, or one below the top whose last word is among `PATH_WORDS`."""
    return key in PATHS or ("." in key and re.split(r"[._]", key)[-1] in PATH_WORDS)


@dataclass
class Process:
    """Constants of the noise process: data deviation, range and shape of the grid, points of two-step sampling."""

    sigma_data: float = MISSING
    t_min: float = MISSING
    t_max: float = MISSING
    rho: float = MISSING
    times: list[float] = MISSING


@dataclass
class Mode:
    """A training method, named part by part."""

    role: str = MISSING
    init: str | None = None
    total_steps: int = MISSING
    process: Process = field(default_factory=Process)
    preconditioning: Any = MISSING
    sampling_preconditioning: Any = MISSING
    objective: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    samplers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Model:
    """A network and the scale of its time input, c_noise = c_noise_scale ln t."""

    c_noise_scale: float = MISSING
    network: Any = MISSING


@dataclass
class Data:
    """A data set and how it is batched; batch_size counts images per optimizer step over all devices, device_batch_size
    bounds how many of them a device holds at once.

    on_bad: stop or skip, what happens at an image that cannot be used; in_memory: the images are decoded once and held;
    background: the colour that transparent images are put on, null refuses them; download: a public set is fetched if it is not at `path`; allow_reorder: resume although the data come in another
    order than before.
    """

    source: Any = MISSING
    held_out: Any = None
    path: str | None = None
    image_size: int = MISSING
    channels: int = MISSING
    num_classes: int | None = None
    batch_size: int = MISSING
    device_batch_size: int | None = None
    num_workers: int = 0
    flip: bool = False
    on_bad: str = "stop"
    background: str | None = None
    in_memory: bool = False
    download: bool = False
    allow_reorder: bool = False


@dataclass
class Train:
    """conf/train.yaml."""

    seed: int = 0
    output: str = MISSING
    teacher: str | None = None
    teacher_weights: str = "ema"
    init: str | None = None
    init_weights: str = "ema"
    resume: str | None = None
    on_nonfinite: str = "stop"
    process: Any = MISSING
    model: Model = field(default_factory=Model)
    mode: Mode = field(default_factory=Mode)
    data: Data = field(default_factory=Data)
    optimizer: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    trainer: Any = MISSING
    logger: dict[str, Any] = field(default_factory=dict)


@dataclass
class Benchmark(Train):
    """conf/benchmark.yaml: the options of training and what is measured."""

    part: str = MISSING
    images: int | None = None
    seconds: float = MISSING
    train_steps: int = MISSING
    train_batch: int | None = None


@dataclass
class Draw:
    """What the commands that draw samples of a checkpoint share."""

    role: str | None = None
    seed: int = 0
    num_samples: int = MISSING
    batch_size: int = MISSING
    labels: Any = None
    force: bool = False
    device: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    output: str = MISSING
    process: Any = None


@dataclass
class Sample(Draw):
    """conf/sample.yaml."""

    checkpoint: str = MISSING
    weights: str = "ema"
    images: bool = False
    trajectory: bool = False
    compile: bool = False
    sampler: Any = MISSING


@dataclass
class Measurement:
    """conf/metrics: `consistency.evaluation.measuring.Settings`."""

    extractor: str = MISSING
    reference: str | None = None
    reference_features: int = MISSING
    cache: str | None = None


@dataclass
class Evaluate(Draw):
    """conf/evaluate.yaml."""

    checkpoint: str | None = None
    samples: str | None = None
    export: str | None = None
    weights: Any = None
    num_nodes: int = 1
    evaluation: Measurement = field(default_factory=Measurement)
    samplers: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    logger: dict[str, Any] = field(default_factory=dict)
    model: Any = None
    callbacks: Any = None


@dataclass
class Edit:
    """conf/edit.yaml."""

    checkpoint: str = MISSING
    input: str | None = None
    background: str | None = None
    teacher: str | None = None
    role: str | None = None
    weights: str = "ema"
    seed: int = 0
    outputs: int = 4
    batch_size: int = 64
    labels: Any = None
    start: str | None = None
    images: bool = False
    device: str = "auto"
    output: str = MISSING
    process: Any = None
    task: Any = MISSING
    mask: Any = None


@dataclass
class Compare:
    """conf/compare.yaml."""

    seed: int = 0
    data: str = MISSING
    teacher_mode: str = MISSING
    modes: list[str] = MISSING
    seconds: float = MISSING
    calibration_steps: int = MISSING
    overrides: list[str] = field(default_factory=list)
    output: str = MISSING


@dataclass
class Convert:
    """conf/convert.yaml."""

    source: str | None = None
    to: str = "ours"
    verify: str | None = None
    role: str | None = None
    weights: str = "ema"
    image_size: int | None = None
    num_head_channels: int | None = None
    attention_resolutions: list[int] | None = None
    num_heads: int | None = None
    num_heads_upsample: int | None = None
    output: str = MISSING


@dataclass
class Demo:
    """conf/demo.yaml."""

    checkpoint: str = MISSING
    role: str | None = None
    weights: str = "ema"
    device: str = "auto"
    background: str | None = None
    host: str = MISSING
    port: int = MISSING
    upload_megabytes: int = MISSING
    browser: bool = False
    output: str = MISSING


@dataclass
class Search:
    """conf/search.yaml."""

    checkpoint: str = MISSING
    weights: str = "ema"
    points: int = MISSING
    num_scales: int = MISSING
    metric: str = MISSING
    evaluation: Measurement = field(default_factory=Measurement)
    num_samples: int | None = None
    seed: int = 0
    batch_size: int = MISSING
    device: str = "auto"
    devices: int = 1
    output: str = MISSING


@dataclass
class Prepare:
    """conf/prepare.yaml."""

    source: str = MISSING
    to: str = "zip"
    resolution: int | None = None
    channels: int | None = None
    crop: Any = MISSING
    split: str = "train"
    classes: bool = False
    on_bad: str = "stop"
    background: str | None = None
    num_workers: int | None = None
    output: str = MISSING


def register() -> None:
    """Makes the schemas known to Hydra under their command's name: train_schema, prepare_schema and so on."""
    store = ConfigStore.instance()
    for schema in (
        Train,
        Benchmark,
        Sample,
        Evaluate,
        Edit,
        Compare,
        Convert,
        Search,
        Demo,
        Prepare,
    ):
        store.store(name=f"{schema.__name__.lower()}_schema", node=schema)
