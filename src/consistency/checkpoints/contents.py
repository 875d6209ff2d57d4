"""The content of a checkpoint, as every reader of a format returns it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from consistency.errors import UserError, require
from consistency.inference.card import ModelCard, Process, Role

StateDict: TypeAlias = Mapping[str, Tensor]

C_NOISE_OPENAI, C_NOISE_NVLABS = 250.0, 0.25
"""c_noise / ln t of the networks of OpenAI's PyTorch code and of diffusers; of the NVlabs and JAX codes."""

PUBLISHED = Process(sigma_data=0.5, t_min=0.002, t_max=80.0, rho=7.0)
"""The noise process of EDM, which all published models have."""


class ContentError(ValueError):
    """A file's content is not a checkpoint. The message describes the content."""


def check(holds: object, fault: str) -> None:
    """Raise `ContentError` for a fault of the content."""
    if not holds:
        raise ContentError(fault)


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    path: str


@dataclass
class Object:
    """An object of a class that a pickle names; its class is not looked up and its state stays as it is stored."""

    kind: str
    state: Any = None


def brief(value: object) -> str:
    """Return a value from a file, short enough for a message; never a container, which could be endless."""
    if isinstance(value, Name):
        return value.path
    if isinstance(value, str):
        return repr(value[:80])
    return str(value)[:80] if isinstance(value, int | float | None) else type(value).__name__


@contextmanager
def checking(path: Path) -> Iterator[None]:
    """Turn every failure of the body into a `UserError`: a damaged or hostile file can fail in any way."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error)
        if not isinstance(error, ContentError):
            line = (reason.splitlines() or [""])[0][:120]
            reason = f"content that makes no sense ({type(error).__name__}: {line})"
        raise UserError(
            f"a checkpoint at {path}: a run folder or checkpoint of ours, an OpenAI .pt, "
            "an NVlabs .pkl, a flax file of the JAX code, or a diffusers folder",
            reason,
            "check that the file is complete and is the one you mean, or take another",
        ) from error


@dataclass(frozen=True)
class Hints:
    """Settings that some formats do not record; None takes those of the released files.

    attention_resolutions: sides of the feature maps with attention.
    num_heads: attention heads; counts only without num_head_channels.
    num_heads_upsample: attention heads of the decoder, if their number differs.
    weights: the set of weights whose settings are taken, if a file holds networks of several sizes.
    """

    image_size: int | None = None
    num_head_channels: int | None = None
    attention_resolutions: Sequence[int] | None = None
    num_heads: int | None = None
    num_heads_upsample: int | None = None
    weights: str = "ema"

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None, weights: str) -> "Hints":
        """Return the hints of an option, `teacher_hints=` or `init_hints=`; refuse other names, and values of other types."""
        hints = {name: value for name, value in (given or {}).items() if value is not None}
        sides = hints.get("attention_resolutions", [])
        listed = isinstance(sides, Sequence) and not isinstance(sides, str)
        counts = [value for name, value in hints.items() if name != "attention_resolutions"]
        whole = all(type(n) is int and n >= 1 for n in (*counts, *(sides if listed else ())))
        expected = f"settings among {', '.join(HINTS)}: whole numbers, and attention_resolutions a list of them"
        right = listed and whole and {*hints} <= {*HINTS}
        require(right, expected, dict(given or {}), "for example {image_size: 64, num_heads: 4}")
        return cls(**hints, weights=weights)

    def require_agreement(self, network: Mapping[str, Any], path: Path) -> None:
        """Refuse hints that contradict the settings of the network in a file."""
        given = {name: value for name in HINTS if (value := getattr(self, name)) is not None}
        got = [
            f"{name}={value}, where the file has {network.get(name)}"
            for name, value in given.items()
            if _sorted(network.get(name)) != _sorted(value)
        ]
        expected = f"hints for settings that {path.name} does not hold"
        remedy = "leave them out; init_hints=null leaves out those of init= alone"
        require(not got, expected, "; ".join(got), remedy)


HINTS = [field.name for field in fields(Hints) if field.name != "weights"]
"""Names of the hints, which are options of `convert` too."""


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, Sequence) else value


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint of any format.

    card: without a role if the file does not record one.
    sets: the sets of weights by name, as the file holds them; `read` turns one into a state dict under our names.
    reconstruct: takes posthoc:<width> and returns that average; None if the format has no averages of any width.
    notes: assumptions that the file leaves open.
    """

    path: Path
    format: str
    card: ModelCard
    sets: Mapping[str, Any]
    read: Callable[[Any], StateDict] = dict
    reconstruct: Callable[[str], StateDict] | None = None
    notes: Sequence[str] = ()


def card_of(
    network: dict[str, Any],
    c_noise_scale: float,
    *,
    role: Role | None = None,
    process: Process = PUBLISHED,
    second_time: float = 0.821,
) -> ModelCard:
    """Return the card of a network. Without a role its scalings stay open.

    second_time: of two-step sampling, unless `process` has time points.
    """
    card = ModelCard(
        role=None,
        network=network,
        preconditioning={"sigma_data": process.sigma_data, "c_noise_scale": c_noise_scale},
        process=replace(process, times=process.times or (process.t_max, second_time)),
        channels=network["in_channels"],
        image_size=network["image_size"],
        num_classes=network["num_classes"],
    )
    return card if role is None else card.with_role(role, "")


def assumes(what: str, option: str) -> str:
    """Return the note on a setting that a file does not record."""
    return f"assumes {what} (the file does not record it; {option} sets it)"
