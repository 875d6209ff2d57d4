"""What every reader of a checkpoint format returns: weights under our names, and the card that builds their denoiser."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from consistency.errors import require
from consistency.inference.card import ModelCard, Process, Role

T = TypeVar("T")

OPENAI, NVLABS = 250.0, 0.25
"""c_noise / ln t of the networks of OpenAI's PyTorch code and of diffusers, and of the NVlabs and JAX codes."""


class ContentError(ValueError):
    """The content of a file is not that of a checkpoint; the message says what was found."""


@dataclass(frozen=True)
class Hints:
    """What some formats do not record; None takes what the released files have.

    image_size: side of the images; num_head_channels: channels of one attention head; attention_resolutions: sides of
    the feature maps with attention; num_heads, num_heads_upsample: attention heads, and those on the way up where their
    number differs; they count where num_head_channels is not given.
    """

    image_size: int | None = None
    num_head_channels: int | None = None
    attention_resolutions: Sequence[int] | None = None
    num_heads: int | None = None
    num_heads_upsample: int | None = None


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The content of a checkpoint file of any format.

    format: its name.
    weights: of the network, under our names.
    card: without a role if the file does not record one.
    notes: assumptions that the file leaves open.
    """

    format: str
    weights: dict[str, Tensor]
    card: ModelCard
    notes: tuple[str, ...] = ()


def chosen(held: Mapping[str, T], weights: str) -> T:
    """The set of weights of that name; a file with one set of weights answers to `ema`."""
    if len(held) == 1 and weights == "ema":
        return next(iter(held.values()))
    require(
        weights in held,
        f"weights among {', '.join(held)}",
        weights,
        "choose one of those that this checkpoint holds",
    )
    return held[weights]


def process(
    *, sigma_data: float = 0.5, t_min: float = 0.002, t_max: float = 80.0, second_time: float
) -> Process:
    """Return the published noise process; second_time: the second time point of two-step sampling."""
    times = (t_max, second_time)
    return Process(sigma_data=sigma_data, t_min=t_min, t_max=t_max, rho=7.0, times=times)


def describe(
    *,
    role: Role | None,
    network: dict[str, Any],
    process: Process,
    c_noise_scale: float,
    num_classes: int | None,
) -> ModelCard:
    """Return the card of a network; without a role its scalings stay open until `with_role`."""
    card = ModelCard(
        role=role,
        network=network,
        preconditioning={"sigma_data": process.sigma_data, "c_noise_scale": c_noise_scale},
        process=process,
        channels=network["in_channels"],
        image_size=network["image_size"],
        num_classes=num_classes,
    )
    return card if role is None else card.with_role(role, "")
