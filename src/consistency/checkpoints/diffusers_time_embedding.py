"""The time embedding of a network, rewritten for diffusers, which can only compute the time input 250 ln t.

The rewritten embedding takes 250 ln t and returns the values that the network's own embedding has for c_noise_scale ln t.
It is exact, but for float32, at the N noise levels of the pipeline's scheduler, where alone a pipeline evaluates its
network: random features of 250 ln t, more than N of them, and the linear map that takes them to those values. At any other
noise level it is meaningless, so the original layers are kept in a file beside it, and its greater width marks it.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from consistency.checkpoints.contents import C_NOISE_OPENAI, StateDict
from consistency.inference.card import ModelCard
from consistency.networks.layers import sinusoidal_features
from consistency.randomness import generator

POINTS = 40  # of our pipelines' grids, as in the released distilled models
LAYERS = ("time_embed.0.weight", "time_embed.0.bias", "time_embed.2.weight", "time_embed.2.bias")
READERS = (".emb_layers.1.weight", "label_emb.weight")  # ends of weights that read the embedding
SPREAD = 3.0  # deviation of the features before their nonlinearity: N of them are then independent


def needs_rewriting(card: ModelCard) -> bool:
    """Return whether the network has another time input than 250 ln t, which diffusers computes."""
    return bool(card.preconditioning["c_noise_scale"] != C_NOISE_OPENAI)


def width(card: ModelCard) -> int:
    """Return the width of the rewritten embedding; an ordinary one has 4 x model_channels."""
    return int(4 * card.network["model_channels"] + POINTS)


def rewritten(weights: StateDict, card: ModelCard) -> dict[str, Tensor]:
    """Return all weights, with a time embedding of 250 ln t that agrees with the network's own on the pipeline's grid."""
    times = replace(card.process.grid, t_min=card.preconditioning["t_min"]).points(POINTS)
    first, first_bias, second, second_bias = (weights[name].double() for name in LAYERS)
    channels = first.shape[1]
    own = sinusoidal_features(card.preconditioning["c_noise_scale"] * times.log(), channels)
    values = functional.silu(own @ first.T + first_bias) @ second.T + second_bias
    wide = width(card)
    values = functional.pad(values, (0, wide - values.shape[1]))
    features = sinusoidal_features((C_NOISE_OPENAI * times.log()).float(), channels).double()
    noise = generator(0, "timetable", channels, POINTS)
    mix = torch.randn(wide, channels, generator=noise, dtype=torch.float64)
    mix = (mix * SPREAD * (2 / channels) ** 0.5).float()
    hidden = functional.silu(features @ mix.double().T)
    exact = torch.linalg.lstsq(hidden, values, driver="gelsd").solution
    readers = {k: v for k, v in weights.items() if k.endswith(READERS)}
    widened = {k: functional.pad(v, (0, wide - v.shape[1])) for k, v in readers.items()}
    zero = torch.zeros(wide)
    return {**weights, **widened} | dict(
        zip(LAYERS, (mix, zero, exact.T.float(), zero), strict=True)
    )


def restored(weights: StateDict, layers: StateDict) -> dict[str, Tensor]:
    """Return the inverse of `rewritten`, from the original layers."""
    narrow = layers[LAYERS[0]].shape[0]
    narrowed = {k: v[:, :narrow] for k, v in weights.items() if k.endswith(READERS)}
    return {**weights, **narrowed, **{name: layers[name] for name in LAYERS}}
