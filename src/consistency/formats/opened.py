"""What every reader of a checkpoint format returns: weights under our names, and the card that builds their denoiser."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from consistency.errors import require

T = TypeVar("T")

Role = Literal["teacher", "consistency"]

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

    format: its name; weights: of the network, under our names; card: as in `consistency.checkpoint`, where `role` and
    `preconditioning` are None if the file does not say which of the two scalings its weights belong to; c_noise_scale:
    of the network; notes: what was assumed.
    """

    format: str
    weights: dict[str, Tensor]
    card: dict[str, Any]
    c_noise_scale: float | None = None
    notes: tuple[str, ...] = ()

    def with_role(self, role: Role | None, path: object) -> dict[str, Any]:
        """The complete card. `role` is what was asked for; it decides only where the file does not say."""
        told = self.card["role"]
        require(
            role is None or told is None or role == told,
            f"a {role} checkpoint",
            f"{path}, a {told} checkpoint",
            "train a teacher with mode=edm" if role == "teacher" else "give a consistency model",
        )
        require(
            role is not None or told is not None,
            "role=teacher (a denoiser, EDM scalings) or role=consistency (boundary scalings)",
            f"no role, and {path} ({self.format}) does not say it",
            "add the one that the file is: the keys and shapes of both are the same",
        )
        chosen: Role = "teacher" if "teacher" in (told, role) else "consistency"
        scalings = self.card["preconditioning"]
        if scalings is None:
            process = self.card["process"]
            assert self.c_noise_scale is not None
            scalings = preconditioning(
                chosen, process["sigma_data"], process["t_min"], self.c_noise_scale
            )
        return {**self.card, "role": chosen, "preconditioning": scalings}


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


def preconditioning(
    role: Role, sigma_data: float, t_min: float, c_noise_scale: float
) -> dict[str, Any]:
    """The scalings of a denoiser or of a consistency function, as a node of a card."""
    node: dict[str, Any] = {"sigma_data": sigma_data, "c_noise_scale": c_noise_scale}
    if role == "teacher":
        return {"_target_": "consistency.preconditioning.EDM", **node}
    return {"_target_": "consistency.preconditioning.Boundary", "t_min": t_min, **node}


def process(
    *, sigma_data: float = 0.5, t_min: float = 0.002, t_max: float = 80.0, second_time: float
) -> dict[str, Any]:
    """The published noise process; second_time: where two-step sampling evaluates for the second time."""
    times = [t_max, second_time]
    return {"sigma_data": sigma_data, "t_min": t_min, "t_max": t_max, "rho": 7.0, "times": times}


def describe(
    *,
    role: Role | None,
    network: dict[str, Any],
    process: dict[str, Any],
    num_classes: int | None,
) -> dict[str, Any]:
    """A card whose scalings are still to be chosen by its role."""
    return {
        "role": role,
        "network": network,
        "preconditioning": None,
        "process": process,
        "image": {"channels": network["in_channels"], "size": network["image_size"]},
        "num_classes": num_classes,
    }
