"""Allowlist: the classes and functions that a configuration from elsewhere may name.

Hydra calls whatever a `_target_` names, so the configuration in a checkpoint or in a run folder is a program. It may name
what the files of conf/ and experiments/ name, all parts of the method, and torch's optimizers; other functions of this
package may write, download or start processes.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from consistency.errors import UserError
from consistency.runtime.files import ROOT

EDITING = ("mask", "task")  # folders of conf/ that no run uses
# The parts of a configuration that write files, and their arguments that are paths.
WRITERS = ("callbacks", "logger", "trainer", "mode.callbacks", "mode.logger", "mode.trainer")
PATHS = (".default_root_dir", ".folder", ".metrics", ".path", ".picture")
# Arguments of writers that are paths to read, or to a cache that runs share.
READERS = {
    "consistency.checkpoints.load.load_teacher": ("path",),
    "consistency.checkpoints.load.load_first_stage": ("path",),
    "consistency.training.callbacks.evaluation.Evaluation": ("extractor", "reference", "cache"),
}
MOST_BYTES = 1 << 18
MOST_VALUES, MOST_LEVELS, MOST_CHARACTERS = 20_000, 16, 4096


@cache
def wandb_options() -> frozenset[str]:
    """Return the options of W&B that conf/ names: others may start programs, or send the API key elsewhere."""
    import yaml

    node = yaml.safe_load((ROOT / "conf" / "logger" / "wandb.yaml").read_text())["wandb"]
    return frozenset([*node, *node["settings"]])


@cache
def shipped() -> frozenset[str]:
    """Return every `_target_` that a run may have in conf/ and experiments/."""
    files = [file for name in ("conf", "experiments") for file in (ROOT / name).rglob("*.yaml")]
    texts = (file.read_text() for file in files if file.parent.name not in EDITING)
    return frozenset(re.findall(r"_target_: *([\w.]+)", "\n".join(texts)))


def named(target: str) -> object:
    """Return the class or function of this package that a `_target_` names in the module that defines it, else None."""
    module, _, name = target.rpartition(".")
    if not re.fullmatch(r"consistency(\.\w+)+", module):
        return None
    with suppress(ImportError):
        value = getattr(import_module(module), name, None)
        return value if callable(value) and getattr(value, "__module__", None) == module else None
    return None


def is_allowed(target: str) -> bool:
    """Return whether a configuration from elsewhere may name a target."""
    module, _, name = target.rpartition(".")
    if module == "torch.optim":
        from torch import optim

        kind = getattr(optim, name, None)
        return isinstance(kind, type) and optim.Optimizer in kind.__mro__[1:]
    if not module.startswith("consistency."):
        return target in shipped()
    # The modules of the method stand at the top of the package, and conf/ names a part of each.
    method = module.count(".") == 1 and any(t.rpartition(".")[0] == module for t in shipped())
    part = method or module.startswith("consistency.networks.") or target in shipped()
    return part and named(target) is not None


def require_trusted(tree: object, origin: object, also: Collection[str] = ()) -> None:
    """Refuse a configuration, before anything of it is built, unless it is data all through.

    Every `_target_` is allowed, Hydra's other keywords but `_partial_` are missing, nothing is interpolated, its size is
    sensible, and the paths that a run writes are below its own `output`.

    tree: plain values, as `OmegaConf.to_container(config, resolve=False)` returns them.
    also: further targets that are allowed.
    """
    for key, reason in _objections(tree, also):
        raise UserError(
            f"a configuration of plain values that names parts of consistency in {origin}",
            f"{reason} at {key[:120] or 'its top'}",
            "do not use it unless you know who wrote it; `consistency.runtime.allowlist` defines the names",
        )


def read(path: Path, also: Collection[str] = ()) -> dict[str, Any]:
    """Read the configuration in a YAML file from elsewhere and check it; nothing is resolved or built."""
    import yaml
    from omegaconf import OmegaConf

    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"{size:,} bytes; at most {MOST_BYTES:,} are read")
        text, level = path.read_text(), 0
        for token in yaml.scan(text):  # otherwise a small file takes minutes, or all memory
            kind = type(token).__name__
            level += kind.endswith("StartToken") - kind.endswith("EndToken")
            if kind == "AliasToken" or level > 2 * MOST_LEVELS:
                raise ValueError("values that stand for others, or too many levels")
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        if not isinstance(tree, dict):
            raise ValueError("a list")
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise UserError(
            f"a configuration in {path}",
            f"something else ({type(error).__name__}: {str(error)[:120]})",
            "take the file as the run wrote it",
        ) from error
    require_trusted(tree, path, also)
    return {str(key): value for key, value in tree.items()}


def _objections(tree: object, also: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield key and reason of everything that is wrong with a tree."""
    output = PurePosixPath(str(tree.get("output") if isinstance(tree, dict) else None))
    count, waiting = 0, [("", tree, 0, False)]  # the last: whether a run writes to paths in it
    while waiting:
        key, value, level, writes = waiting.pop()
        count += 1
        if count > MOST_VALUES or level > MOST_LEVELS:
            yield key, "more values than any configuration has"
            return
        if isinstance(value, dict):
            yield from ((key, reason) for reason in _wrong_node(value, also))
            read = READERS.get(str(value.get("_target_")), ())
            for name, child in value.items():
                inner = f"{key}.{name}".strip(".")
                written = (writes or inner in WRITERS) and name not in read
                waiting.append((inner, child, level + 1, written))
        elif isinstance(value, list | tuple):
            waiting += [(f"{key}[{i}]", v, level + 1, writes) for i, v in enumerate(value)]
        elif not isinstance(value, str | int | float | None):
            yield key, f"a value of type {type(value).__name__}"
        elif isinstance(value, str) and "${" in value:
            yield key, "an interpolation"
        elif isinstance(value, str) and len(value) > MOST_CHARACTERS:
            yield key, "a text longer than any option"
        elif isinstance(value, str) and writes and _is_outside(key, value, output):
            yield key, f"the path {value[:120]}, outside of output={output}"


def _wrong_node(node: dict[Any, Any], also: Collection[str]) -> Iterator[str]:
    for key in node:
        if not isinstance(key, str) or "${" in key or len(key) > MOST_CHARACTERS:
            yield "a key that is no name"
        elif key.startswith("_") and key not in ("_target_", "_partial_"):
            yield f"the key {key[:40]}"
    if not isinstance(node.get("_partial_", False), bool):
        yield "a _partial_ that is neither true nor false"
    target = node.get("_target_", "")
    if not isinstance(target, str):
        yield f"the target {type(target).__name__}"
    elif "_target_" in node and target not in also and not is_allowed(target):
        yield f"the target {target[:120]}"
    if target == "consistency.training.loggers.PatientWandbLogger":
        settings = node.get("settings")
        names = [*node, *(settings if isinstance(settings, dict) else ())]
        yield from (f"the option {n!s:.40} of W&B" for n in names if n not in wandb_options())


def _is_outside(key: str, text: str, output: PurePosixPath) -> bool:
    """Return whether a text of a part that writes is a path outside of the run's `output`."""
    path = PurePosixPath(text)
    inside = output.is_absolute() and path.is_relative_to(output)
    is_path = path.is_absolute() or key.endswith(PATHS)
    return (is_path and not inside) or ".." in path.parts or text.startswith("~")
