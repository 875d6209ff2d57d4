"""The length of a run, `scale=`: everything that is counted in its steps, at a fraction."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from consistency.errors import require

SCALED = ("mode", "callbacks", "trainer")
"""Nodes of a configuration whose parts count steps."""


def shorten(config: DictConfig) -> None:
    """Multiply the length of a run by `config.scale`, in place, with all that is counted in its steps.

    Arguments called `..._steps` and half-lives are multiplied; whole numbers stay whole, and at least 1. A decay d becomes
    d^(1/scale), so that its average reaches over the same share of the run. A value that refers to another one follows it.
    """
    scale = config.get("scale", 1.0)
    remedy = "give the share of the run's length that is wanted; 1 is the whole run"
    require(0 < scale <= 1, "scale above 0 and at most 1", scale, remedy)
    if scale < 1:
        for name in SCALED:
            _shorten(config[name], scale)


def _shorten(node: Any, scale: float) -> None:
    plain: Any = OmegaConf.to_container(node, resolve=False)
    for key in plain if isinstance(plain, dict) else range(len(plain)):
        law = _law(str(key), scale)
        if isinstance(plain[key], dict | list) and law is None:
            _shorten(node[key], scale)
        elif isinstance(plain[key], list) and law is not None:
            node[key] = [law(value) for value in node[key]]
        elif isinstance(plain[key], int | float) and law is not None:
            node[key] = law(plain[key])


def _law(name: str, scale: float) -> Callable[[float], float] | None:
    """Return how an argument of that name changes with the length of its run, None for one that does not."""
    if name in ("mu", "mu_0", "decays"):
        return lambda decay: decay ** (1 / scale)
    if name == "half_lives" or name.endswith("_steps"):
        return lambda n: (
            n if n <= 0 else max(1, round(scale * n)) if isinstance(n, int) else scale * n
        )
    return None
