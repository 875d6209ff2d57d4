"""The time embedding of a network, rewritten for diffusers, which can only compute the time input 250 ln t.

A pipeline evaluates its network at the N points of its scheduler's grid and nowhere else. So a network with another
time input is written with an embedding that has the network's own values at these points: random features of 250 ln t,
of which there are more than points, and the linear map that takes them to those values exactly. Elsewhere it means
nothing, so the original layers are kept in a file beside it, and the widened embedding tells other readers.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from consistency.formats.opened import OPENAI
from consistency.networks.layers import sinusoidal_features
from consistency.randomness import generator

LAYERS = ("time_embed.0.weight", "time_embed.0.bias", "time_embed.2.weight", "time_embed.2.bias")
SPREAD = 3.0
"""Standard deviation of what the random features are bent from: wide enough that N of them are independent."""


def width(channels: int, points: int) -> int:
    """The width of the rewritten embedding; never 4 x channels, by which an ordinary one is known."""
    return 4 * channels + points


def rewritten(
    weights: dict[str, Tensor], times: Float[Tensor, "n"], c_noise_scale: float
) -> dict[str, Tensor]:
    """All weights, with a time embedding of 250 ln t that agrees with the network's own at `times` (in float64)."""
    first, first_bias, second, second_bias = (weights[name].double() for name in LAYERS)
    channels, points = first.shape[1], len(times)
    own = sinusoidal_features(c_noise_scale * times.log(), channels)
    wanted = functional.silu(own @ first.T + first_bias) @ second.T + second_bias
    wide = width(channels, points)
    wanted = functional.pad(wanted, (0, wide - wanted.shape[1]))

    features = sinusoidal_features((OPENAI * times.log()).float(), channels).double()
    draw = generator(0, "timetable", channels, points)
    mix = torch.randn(wide, channels, generator=draw, dtype=torch.float64)
    mix = (mix * SPREAD * (2 / channels) ** 0.5).float()
    bent = functional.silu(features @ mix.double().T)
    exact = torch.linalg.lstsq(bent, wanted, driver="gelsd").solution

    found = {name: _widened(name, value, wide) for name, value in weights.items()}
    zero = torch.zeros(wide)
    return found | dict(zip(LAYERS, (mix, zero, exact.T.float(), zero), strict=True))


def _widened(name: str, value: Tensor, wide: int) -> Tensor:
    """A weight that reads the embedding, with zeros for the part that was added to it."""
    reads = name.endswith(".emb_layers.1.weight") or name == "label_emb.weight"
    return functional.pad(value, (0, wide - value.shape[1])) if reads else value


def restored(weights: dict[str, Tensor], layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `rewritten`, from the original layers."""
    narrow = layers[LAYERS[0]].shape[0]
    found = {
        name: value[:, :narrow]
        if name.endswith(".emb_layers.1.weight") or name == "label_emb.weight"
        else value
        for name, value in weights.items()
    }
    return found | {name: layers[name] for name in LAYERS}
