"""The content of a checkpoint, as every reader of a format returns it."""

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from consistency.errors import UserError
from consistency.inference.card import ModelCard, Process, Role

StateDict: TypeAlias = Mapping[str, Tensor]

C_NOISE_OPENAI, C_NOISE_NVLABS = 250.0, 0.25
"""c_noise / ln t of the networks of OpenAI's PyTorch code and of diffusers; of the NVlabs and JAX codes."""

PUBLISHED = Process(sigma_data=0.5, t_min=0.002, t_max=80.0, rho=7.0)
"""The noise process of EDM, which all published models have."""

KNOWN = (
    "a run folder or checkpoint of ours, an OpenAI .pt, an NVlabs .pkl, a flax file of the JAX code, "
    "or a diffusers folder"
)


class ContentError(ValueError):
    """A file's content is not a checkpoint. The message describes the content."""


def check(holds: object, fault: str) -> None:
    """Raise `ContentError` for a fault of the content."""
    if not holds:
        raise ContentError(fault)


def unreadable(path: Path, error: Exception) -> UserError:
    """Return the error for a checkpoint that cannot be used, whatever failed."""
    reason = str(error)
    if not isinstance(error, ContentError):
        line = (reason.splitlines() or [""])[0][:120]
        reason = f"content that makes no sense ({type(error).__name__}: {line})"
    remedy = "check that the file is complete and is the one you mean, or take another"
    return UserError(f"a checkpoint at {path}: {KNOWN}", reason, remedy)


@dataclass(frozen=True)
class Hints:
    """Settings that some formats do not record; None takes those of the released files.

    attention_resolutions: sides of the feature maps with attention.
    num_heads: attention heads; counts only without num_head_channels.
    num_heads_upsample: attention heads of the decoder, if their number differs.
    role: role of a published file.
    weights: the set of weights whose settings are taken, if a file holds networks of several sizes.
    """

    image_size: int | None = None
    num_head_channels: int | None = None
    attention_resolutions: Sequence[int] | None = None
    num_heads: int | None = None
    num_heads_upsample: int | None = None
    role: Role | None = None
    weights: str = "ema"


class Lazy(UserDict[str, Any]):
    """Sets of weights by name, each made by `read` of its entry when it is looked up."""

    def __init__(self, entries: Mapping[str, Any], read: Callable[[Any], StateDict]) -> None:
        super().__init__(entries)
        self.read = read

    def __getitem__(self, name: str) -> StateDict:
        return self.read(self.data[name])


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint of any format.

    card: without a role if the file does not record one.
    weights: the sets of weights by name, state dicts under our names of the parameters. They are not typed as such, because
        a check of types at run time would build a lazy set.
    notes: assumptions that the file leaves open.
    """

    path: Path
    format: str
    card: ModelCard
    weights: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the sets of weights, without `ema` if that stands for the first of several averages."""
        averages = any(name.startswith(("ema:", "power:")) for name in self.weights)
        return [name for name in self.weights if name != "ema" or not averages]


def card_of(
    network: dict[str, Any],
    c_noise_scale: float,
    *,
    role: Role | None = None,
    process: Process = PUBLISHED,
    second_time: float = 0.821,
) -> ModelCard:
    """Return the card of a network; without a role its scalings stay open until `with_role`.

    second_time: the second time point of two-step sampling.
    """
    card = ModelCard(
        role=None,
        network=network,
        preconditioning={"sigma_data": process.sigma_data, "c_noise_scale": c_noise_scale},
        process=replace(process, times=(process.t_max, second_time)),
        channels=network["in_channels"],
        image_size=network["image_size"],
        num_classes=network["num_classes"],
    )
    return card if role is None else card.with_role(role, "")


def assumes(what: str, option: str) -> str:
    """Return the note on a setting that a file does not record."""
    return f"assumes {what} (the file does not record it; {option} sets it)"
