"""The length of a run, `scale=`: everything that is counted in its steps, at a fraction."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from consistency.errors import require

SCALED = ("mode", "callbacks", "trainer")
"""Nodes of a configuration whose parts count steps."""

DECAYS = ("decays", "mu", "mu_0")
"""Arguments that are decays of averages in one step."""


def shorten(config: DictConfig) -> None:
    """Multiply the length of a run by `config.scale`, in place, with all that is counted in its steps.

    Arguments called `..._steps` or `keep_every` and half-lives are multiplied; whole numbers stay whole, and at least 1. A decay d becomes
    d^(1/scale), so that its average reaches over the same share of the run. A value that refers to another one follows it.
    """
    scale = config.get("scale", 1.0)
    remedy = "give the share of the run's length that is wanted; 1 is the whole run"
    require(0 < scale <= 1, "scale above 0 and at most 1", scale, remedy)
    if scale < 1:
        for name in SCALED:
            _shorten(config[name], OmegaConf.to_container(config[name], resolve=False), scale)


def _shorten(node: Any, plain: Any, scale: float, name: str = "") -> None:
    """Shorten the numbers below a node, which is `plain` without its interpolations resolved; those of a list have its name."""
    for key, value in plain.items() if isinstance(plain, dict) else enumerate(plain):
        argument = str(key) if isinstance(plain, dict) else name
        if isinstance(value, dict | list):
            _shorten(node[key], value, scale, argument)
        elif isinstance(value, int | float):
            node[key] = _in_small(argument, value, scale)


def _in_small(argument: str, value: float, scale: float) -> float:
    """Return the value of an argument in a run of `scale` times the length."""
    if argument in DECAYS:
        return value ** (1 / scale)
    counts = argument in ("half_lives", "keep_every") or argument.endswith("_steps")
    if not counts or value <= 0:
        return value
    return max(1, round(scale * value)) if isinstance(value, int) else scale * value
