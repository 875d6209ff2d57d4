"""The analytic toy: a distribution with a known exact denoiser, as images."""

from collections.abc import Sequence

import torch

from consistency.data.memory import InMemory
from consistency.errors import require
from consistency.randomness import generator


class Mixture(InMemory):
    """`size` images of one channel whose pixels are draws of sum_k weight_k N(mean_k, std_k^2).

    The pixels are independent, in [-1, 1] units, then rounded to the nearest of the 256 grey values, as in every source:
    this adds the variance (2/255)^2 / 12 = 5e-6 to the law. Values outside of [-1, 1] are cut off, so the modes must lie
    a few deviations inside. Under x_t = x_0 + t z the exact denoiser of the law, without rounding, acts on each pixel
    alone: D(x, t) = sum_k w_k(x, t) (m_k + s_k^2 / (s_k^2 + t^2) (x - m_k)), with the posterior weights w_k of the modes.
    """

    def __init__(
        self,
        *,
        size: int,
        image_size: int,
        weights: Sequence[float],
        means: Sequence[float],
        stds: Sequence[float],
        seed: int,
    ) -> None:
        valid = len(weights) == len(means) == len(stds) and min(*weights, *stds) > 0
        valid &= max(abs(m) + 3 * s for m, s in zip(means, stds, strict=False)) <= 1
        expected = "positive weights and stds, as many as means, and modes of 3 stds within [-1, 1]"
        got = f"weights {list(weights)}, means {list(means)}, stds {list(stds)}"
        require(valid, expected, got, "set data.source.weights, means, stds")
        draw = generator(seed, "mixture")
        share = torch.tensor(weights, dtype=torch.float64)
        mode = torch.multinomial(share, size * image_size**2, replacement=True, generator=draw)
        z = torch.randn(len(mode), dtype=torch.float64, generator=draw)
        x_0 = torch.tensor(means).double()[mode] + torch.tensor(stds).double()[mode] * z
        # in float64; `pixels.quantised`, in float32, rounds a few pixels of a million the other way
        grey = (x_0.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        images = grey.reshape(size, 1, image_size, image_size)
        super().__init__(images, torch.zeros(size, dtype=torch.int64))
