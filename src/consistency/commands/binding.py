"""Binding: the parts that a configuration names must take the arguments beside their names."""

import inspect
import shlex
from collections.abc import Iterator
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import nn

from consistency.errors import UserError, require

HYDRAS = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def require_bound(config: DictConfig) -> None:
    """Refuse a node whose part does not take its arguments, or lacks some; build nothing and open nothing.

    A part may be swapped by its `_target_` alone, and then has the arguments of the old one.
    """
    for key, node in targets(OmegaConf.to_container(config, resolve=False)):
        target = OmegaConf.select(config, f"{key}._target_".strip("."))
        if (parameters := _parameters(_part(key, target))) is None:
            continue
        arguments = [str(name) for name in node if name not in HYDRAS]
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        needed = [p for p in by_name[len(node.get("_args_") or []) :] if p.default is p.empty]
        shown = by_name
        if node.get("_partial_"):
            # Its call may add positional arguments, as the step k of a schedule, but never a keyword.
            shown = [p for p in by_name if p.default is not p.empty or p.kind is p.KEYWORD_ONLY]
            needed = [p for p in needed if p.kind is p.KEYWORD_ONLY]
        names = {p.name for p in by_name}
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            names |= set(arguments)
        unknown = [name for name in arguments if name not in names]
        lacking = [p.name for p in needed if p.name not in arguments]
        faults = {f"~{key}.{name}": f"{name}, which it does not take" for name in unknown}
        faults |= {f"+{key}.{name}=...": f"no {name}, which it needs" for name in lacking}
        require(
            not faults,
            f"arguments of {target} at {key}: {', '.join(p.name for p in shown) or 'none'}",
            "; ".join(faults.values()),
            f"a part is swapped with its arguments: add {shlex.join(faults)} to the command",
        )


def targets(tree: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every node with a `_target_` and its key."""
    if isinstance(tree, dict):
        if isinstance(tree.get("_target_"), str):
            yield key, tree
        for name, value in tree.items():
            yield from targets(value, f"{key}.{name}".strip("."))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from targets(value, f"{key}[{number}]")


def _part(key: str, target: str) -> Any:
    try:
        return get_object(target)
    except Exception as error:  # the import of a user's module can fail in any way
        reason = str(error.__cause__ or error).strip().splitlines()
        raise UserError(
            f"the name of a class or function at {key}._target_",
            f"{target} ({reason[-1] if reason else type(error).__name__})",
            "check the name",
        ) from error


def _parameters(part: Any) -> list[inspect.Parameter] | None:
    """Return the parameters of a part; None for a class in C without a signature."""
    if getattr(part, "__init__", None) is nn.Module.__init__:
        return []  # its signature takes anything, its code nothing
    try:
        return list(inspect.signature(part).parameters.values())
    except (TypeError, ValueError):
        return None
