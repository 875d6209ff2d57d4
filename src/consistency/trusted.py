"""Configurations that were not written here — in a checkpoint, in a run folder — are data; this says what they may name.

Hydra builds whatever a `_target_` names, so a configuration is a program. One from elsewhere may name the parts of the
formula, which know of no files, and of all else what is listed here; functions of this package that write, download or
start processes are not.
"""

from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from omegaconf import OmegaConf

from consistency.errors import UserError, require

PARTS = tuple(
    f"consistency.{name}."
    for name in (
        "distances",
        "grids",
        "networks.adm",
        "networks.dhariwal",
        "networks.mlp",
        "networks.song",
        "objectives",
        "pairs",
        "preconditioning",
        "samplers",
        "schedules",
        "solvers",
        "steps",
        "tangents",
        "weightings",
    )
)
"""Modules of the core: any class or function that is defined in them."""

OTHERS = frozenset(
    {
        "consistency.checkpoint.load_teacher",
        "consistency.data.archive.Archive",
        "consistency.data.cifar.CIFAR10",
        "consistency.data.cropping.box",
        "consistency.data.cropping.halving",
        "consistency.data.cropping.lanczos",
        "consistency.data.digits.Digits",
        "consistency.data.folder.Folder",
        "consistency.data.huggingface.HuggingFace",
        "consistency.data.idx.FashionMNIST",
        "consistency.data.idx.MNIST",
        "consistency.data.lsun.LSUN",
        "consistency.data.mixture.Mixture",
        "consistency.data.stream.Stream",
        "consistency.perceptual.load_lpips",
        "consistency.training.callbacks.averages.EvaluationEMA",
        "consistency.training.callbacks.averages.TargetEMA",
        "consistency.training.callbacks.checkpoints.RunCheckpoints",
        "consistency.training.callbacks.evaluation.Evaluation",
        "consistency.training.callbacks.pictures.Curves",
        "consistency.training.callbacks.pictures.SampleGrids",
        "consistency.training.callbacks.preemption.Preemption",
        "consistency.training.callbacks.progress.StepBar",
        "consistency.training.callbacks.progress.Throughput",
        "consistency.training.callbacks.schedules.LearningRateSchedule",
        "consistency.training.callbacks.schedules.ScaleSchedule",
        "consistency.training.callbacks.stages.DistillationStages",
        "consistency.training.logging.MetricsFile",
        "consistency.training.logging.PatientTensorBoardLogger",
        "consistency.training.logging.PatientWandbLogger",
        "datetime.timedelta",
        "lightning.Trainer",
        "lightning.pytorch.strategies.DDPStrategy",
        "torch.optim.Adam",
        "torch.optim.AdamW",
        "torch.optim.RAdam",
        "torch.optim.SGD",
    }
)
"""Whatever else a configuration of a run is made of, name by name."""

WRITERS = ("callbacks", "logger", "trainer")
PLACES = ("default_root_dir", "folder", "metrics", "path", "picture")
"""Where a configuration says what is written (below `mode` as well), and the arguments there that are paths."""

READERS = {
    "consistency.checkpoint.load_teacher": ("path",),
    "consistency.training.callbacks.evaluation.Evaluation": ("extractor", "reference", "cache"),
}
"""What has paths to read amid those that are written, or to keep what it computed where all runs do."""

MOST_BYTES = 1 << 18
MOST_VALUES, MOST_LEVELS, MOST_CHARACTERS = 20_000, 16, 4096

OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def named(target: object) -> object:
    """The class or function that a `_target_` of this package names, if it is defined where the name says; else None."""
    module, _, name = str(target).rpartition(".")
    plain = isinstance(target, str) and all(part.isidentifier() for part in target.split("."))
    if not plain or not module.startswith("consistency."):
        return None
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        return None
    return found if callable(found) and getattr(found, "__module__", None) == module else None


def require_trusted(tree: object, origin: object, also: Collection[str] = ()) -> None:
    """Refuses a plain configuration, before anything of it is built, unless it is data all through.

    tree: dictionaries, lists, numbers and texts, as `OmegaConf.to_container(config, resolve=False)` gives them;
    origin: where it comes from, for the message. Every `_target_` names one of `PARTS`, `OTHERS` or `also`, no other word of
    Hydra's stands in it but `_partial_`, nothing is interpolated, it is of sensible size, and where it says what a run
    writes, paths stay in its own `output`.
    """
    for place, reason in _objections(tree, also):
        raise UserError(
            f"expected a configuration of plain values that names parts of consistency in {origin}\n"
            f"  got: {reason} at {place[:120] or 'its top'}\n"
            "  do: do not use it unless you know who wrote it; `consistency.trusted` lists what it may name"
        )


def read(path: Path, also: Collection[str] = ()) -> dict[str, Any]:
    """The configuration in a YAML file that was not written here, checked; nothing of it is resolved or built."""
    require(path.is_file(), f"a configuration at {path}", "no such file", "check the path")
    size = path.stat().st_size
    require(size <= MOST_BYTES, f"at most {MOST_BYTES:,} bytes in {path}", f"{size:,}", "check it")
    try:
        text = path.read_text()
        _require_simple(text)
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise UserError(
            f"expected a configuration in {path}\n"
            f"  got: something else ({type(error).__name__}: {str(error)[:120]})\n  do: take the file as the run wrote it"
        ) from error
    require_trusted(tree, path, also)
    require(isinstance(tree, dict), f"a configuration in {path}", "a list", "check the path")
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _require_simple(text: str) -> None:
    """Refuses YAML that takes more memory or time than its length: ten lines of values that stand for others, or depth."""
    level = 0
    for token in yaml.scan(text):
        level += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if isinstance(token, yaml.AliasToken):
            raise ValueError("values that stand for others")
        if level > MOST_LEVELS:
            raise ValueError("more levels than any configuration has")


def _objections(tree: object, also: Collection[str]) -> Iterator[tuple[str, str]]:
    """Place and reason of everything that is wrong with a tree."""
    count, waiting = 0, [("", tree, 0)]
    while waiting:
        place, value, level = waiting.pop()
        count += 1
        if count > MOST_VALUES or level > MOST_LEVELS:
            yield place, "more values than any configuration has"
            return
        if isinstance(value, dict):
            yield from ((place, reason) for reason in _wrong_node(value, also))
            waiting += [(f"{place}.{k}".strip("."), v, level + 1) for k, v in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{place}[{i}]", v, level + 1) for i, v in enumerate(value)]
        elif not (value is None or isinstance(value, str | int | float)):
            yield place, f"a value of type {type(value).__name__}"
        elif isinstance(value, str) and "${" in value:
            yield place, "an interpolation"
        elif isinstance(value, str) and len(value) > MOST_CHARACTERS:
            yield place, "a text longer than any option"
    if isinstance(tree, dict):
        yield from _wrong_paths(tree)


def _wrong_node(node: dict[Any, Any], also: Collection[str]) -> Iterator[str]:
    for key in node:
        if not isinstance(key, str) or "${" in key or len(key) > MOST_CHARACTERS:
            yield "a key that is no name"
        elif key.startswith("_") and key not in ("_target_", "_partial_"):
            yield f"the key {key[:40]}"
    if not isinstance(node.get("_partial_", False), bool):
        yield "a _partial_ that is neither true nor false"
    if "_target_" in node:
        target = node["_target_"]
        if isinstance(target, str) and target in also:
            return
        known = isinstance(target, str) and (target in OTHERS or target.startswith(PARTS))
        ours = isinstance(target, str) and target.startswith("consistency.")
        if not known or (ours and named(target) is None):
            yield f"the target {target[:120] if isinstance(target, str) else type(target).__name__}"


def _wrong_paths(tree: dict[Any, Any]) -> Iterator[tuple[str, str]]:
    """Paths of what a run writes that lie outside of its `output`."""
    output = PurePosixPath(str(tree.get("output")))
    mode = tree.get("mode")
    for base, branch in (("", tree), ("mode.", mode if isinstance(mode, dict) else {})):
        for name in WRITERS:
            for place, text in _texts(branch.get(name), f"{base}{name}"):
                path = PurePosixPath(text)
                inside = output.is_absolute() and path.is_relative_to(output)
                meant = path.is_absolute() or place.endswith(tuple(f".{p}" for p in PLACES))
                if (meant and not inside) or ".." in path.parts or text.startswith("~"):
                    yield place, f"the path {text[:120]}, outside of output={output}"


def _texts(tree: object, place: str) -> Iterator[tuple[str, str]]:
    """All texts in a tree with their places, but for what `READERS` read."""
    if isinstance(tree, str):
        yield place, tree
    elif isinstance(tree, dict):
        read = READERS.get(str(tree.get("_target_")), ())
        for key, value in tree.items():
            if key not in read:
                yield from _texts(value, f"{place}.{key}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _texts(value, f"{place}[{number}]")
