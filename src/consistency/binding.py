"""Whether the parts that a configuration names take the arguments that stand beside their names."""

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
    """Refuses a node whose part does not take its arguments, or lacks some; builds nothing and opens nothing.

    A part may be swapped by its `_target_` alone, and then the arguments of the old one are still there. What a
    `_partial_` node lacks may come with its call, as the step k of a schedule does; but a keyword never does.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    for place, node in _nodes(plain, ""):
        target = OmegaConf.select(config, f"{place}._target_".strip("."))
        part = _part(place, target)
        try:
            parameters = list(inspect.signature(part).parameters.values())
        except (TypeError, ValueError):  # a class in C that does not say what it takes
            continue
        if getattr(part, "__init__", None) is nn.Module.__init__:
            parameters = []  # it says that it takes anything, and refuses everything
        given = [str(name) for name in node if name not in HYDRAS]
        free = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        known = [p.name for p in by_name]
        unknown = [] if free else [name for name in given if name not in known]
        needed = [p for p in by_name[len(node.get("_args_") or []) :] if p.default is p.empty]
        shown = known
        if node.get("_partial_"):
            shown = [
                p.name for p in by_name if p.default is not p.empty or p.kind is p.KEYWORD_ONLY
            ]
            needed = [p for p in needed if p.kind is p.KEYWORD_ONLY]
        lacking = [p.name for p in needed if p.name not in given]
        removals = shlex.join(f"~{place}.{name}" for name in unknown)
        additions = shlex.join(f"+{place}.{name}=..." for name in lacking)
        require(
            not unknown and not lacking,
            f"arguments of {target} at {place}: {', '.join(shown) or 'none'}",
            "; ".join(
                [f"{name}, which it does not take" for name in unknown]
                + [f"no {name}, which it needs" for name in lacking]
            ),
            f"a part is swapped with its arguments: add {f'{removals} {additions}'.strip()} to the command",
        )


def _nodes(tree: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_`, and where it stands."""
    if isinstance(tree, dict):
        if isinstance(tree.get("_target_"), str):
            yield place, tree
        for key, value in tree.items():
            yield from _nodes(value, f"{place}.{key}".strip("."))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _nodes(value, f"{place}[{number}]")


def _part(place: str, target: str) -> Any:
    try:
        return get_object(target)
    except Exception as error:  # the import of a module of one's own can fail in any way
        reason = str(error.__cause__ or error).strip().splitlines()
        raise UserError(
            f"expected the name of a class or function at {place}._target_\n"
            f"  got: {target} ({reason[-1] if reason else type(error).__name__})\n  do: check the name"
        ) from error
