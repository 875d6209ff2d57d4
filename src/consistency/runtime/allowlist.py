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

from consistency.errors import UserError, require
from consistency.runtime.files import ROOT

SHELL = ("consistency.checkpoints.load", "consistency.training.lpips")
"""Modules at the top of the package that are not of the method."""

EDITING = ("mask", "task")
"""Folders of conf/ that no run uses."""

WRITERS = ("callbacks", "logger", "trainer", "mode.callbacks", "mode.logger", "mode.trainer")
PATHS = (".default_root_dir", ".folder", ".metrics", ".path", ".picture")
"""The parts of a configuration that write files, and their arguments that are paths."""

READERS = {
    "consistency.checkpoints.load.load_teacher": ("path",),
    "consistency.training.callbacks.evaluation.Evaluation": ("extractor", "reference", "cache"),
}
"""Arguments of writers that are paths to read, or to a cache that runs share."""

MOST_BYTES = 1 << 18
MOST_VALUES, MOST_LEVELS, MOST_CHARACTERS = 20_000, 16, 4096


@cache
def shipped() -> frozenset[str]:
    """Return every `_target_` that a run may have in conf/ and experiments/."""
    files = [file for name in ("conf", "experiments") for file in (ROOT / name).rglob("*.yaml")]
    texts = (file.read_text() for file in files if file.parent.name not in EDITING)
    return frozenset(re.findall(r"_target_: *([\w.]+)", "\n".join(texts)))


@cache
def method() -> frozenset[str]:
    """Return the modules of the method: those at the top of the package of which conf/ names a part."""
    modules = {target.rpartition(".")[0] for target in shipped()}
    return frozenset(m for m in modules if re.fullmatch(r"consistency\.\w+", m)) - set(SHELL)


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
    part = module in method() or module.startswith("consistency.networks.")
    if module == "torch.optim":
        from torch import optim

        kind = getattr(optim, name, None)
        return isinstance(kind, type) and optim.Optimizer in kind.__mro__[1:]
    ours = module.startswith("consistency.")
    return (part or target in shipped()) and (not ours or named(target) is not None)


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

    require(path.is_file(), f"a configuration at {path}", "no such file", "check the path")
    size = path.stat().st_size
    require(size <= MOST_BYTES, f"at most {MOST_BYTES:,} bytes in {path}", f"{size:,}", "check it")
    try:
        text = path.read_text()
        level = 0  # without these two checks a small file takes minutes, or all memory
        for token in yaml.scan(text):
            kind = type(token).__name__
            level += kind.endswith("StartToken") - kind.endswith("EndToken")
            if kind == "AliasToken" or level > 2 * MOST_LEVELS:
                raise ValueError("values that stand for others, or too many levels")
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise UserError(
            f"a configuration in {path}",
            f"something else ({type(error).__name__}: {str(error)[:120]})",
            "take the file as the run wrote it",
        ) from error
    require_trusted(tree, path, also)
    if not isinstance(tree, dict):
        raise UserError(f"a configuration in {path}", "a list", "check the path")
    return {str(key): value for key, value in tree.items()}


def _objections(tree: object, also: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield key and reason of everything that is wrong with a tree."""
    count, waiting = 0, [("", tree, 0)]
    while waiting:
        key, value, level = waiting.pop()
        count += 1
        if count > MOST_VALUES or level > MOST_LEVELS:
            yield key, "more values than any configuration has"
            return
        if isinstance(value, dict):
            yield from ((key, reason) for reason in _wrong_node(value, also))
            waiting += [(f"{key}.{k}".strip("."), v, level + 1) for k, v in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{key}[{i}]", v, level + 1) for i, v in enumerate(value)]
        elif not isinstance(value, str | int | float | None):
            yield key, f"a value of type {type(value).__name__}"
        elif isinstance(value, str) and "${" in value:
            yield key, "an interpolation"
        elif isinstance(value, str) and len(value) > MOST_CHARACTERS:
            yield key, "a text longer than any option"
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
    target = node.get("_target_", "")
    if not isinstance(target, str):
        yield f"the target {type(target).__name__}"
    elif "_target_" in node and target not in also and not is_allowed(target):
        yield f"the target {target[:120]}"


def _wrong_paths(tree: dict[Any, Any]) -> Iterator[tuple[str, str]]:
    """Yield the paths that a run writes outside of its `output`."""
    output = PurePosixPath(str(tree.get("output")))
    mode = tree.get("mode")
    parts = tree | {f"mode.{k}": v for k, v in (mode if isinstance(mode, dict) else {}).items()}
    for key, text in (pair for name in WRITERS for pair in _texts(parts.get(name), name)):
        path = PurePosixPath(text)
        inside = output.is_absolute() and path.is_relative_to(output)
        is_path = path.is_absolute() or key.endswith(PATHS)
        if (is_path and not inside) or ".." in path.parts or text.startswith("~"):
            yield key, f"the path {text[:120]}, outside of output={output}"


def _texts(tree: object, key: str) -> Iterator[tuple[str, str]]:
    """Yield all texts in a tree with their keys, except the arguments of `READERS`."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        read = READERS.get(str(tree.get("_target_")), ())
        for name, value in tree.items():
            if name not in read:
                yield from _texts(value, f"{key}.{name}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _texts(value, f"{key}[{number}]")
