"""Images in memory: decoded, or drawn."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64, UInt8
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from consistency.data.parallel import in_threads
from consistency.data.source import Classes, Image, Images, Source
from consistency.errors import require
from consistency.randomness import generator


class InMemory(Source):
    """Images (n, c, h, w) of grey values 0 ... 255, with their class indices."""

    def __init__(
        self,
        images: UInt8[Tensor, "n c h w"],
        labels: Int64[Tensor, "n"],
        class_names: Sequence[str] = (),
        left_out: int = 0,
    ) -> None:
        self.images, self.labels = images, labels
        self.class_names, self.left_out = list(class_names), left_out

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: list[int]) -> tuple[Images, Classes]:
        return self.images[indices], self.labels[indices]

    def stamp(self, index: int) -> bytes:
        """Return the pixels of an image."""
        return self.images[index].numpy().tobytes()


def load_into_memory(source: Source) -> InMemory:
    """Decode every image of a source, in as many threads as there are cores."""
    if isinstance(source, InMemory):
        return source
    shape = source[0][0].shape
    images = torch.empty((len(source), *shape), dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64)

    def load(index: int) -> None:
        image, labels[index] = source[index]
        expected = f"images of one shape, {tuple(shape)} as the first"
        got = f"shape {tuple(image.shape)} of image number {index}"
        remedy = "prepare the images at one resolution and mode"
        require(image.shape == shape, expected, got, remedy)
        images[index] = image

    in_threads(load, len(source), "decoding")
    size = f"{len(source):,} images, {images.nbytes / 2**20:,.0f} MiB"
    rank_zero_only(print)(f"held in memory: {size}")
    return InMemory(images, labels, source.class_names, source.left_out)


def noise(*, count: int, channels: int, image_size: int, num_classes: int | None) -> InMemory:
    """Draw `count` images of independent random grey values with random classes, to measure speed."""
    draw = generator(0, "images")
    shape = (count, channels, image_size, image_size)
    return InMemory(
        torch.randint(256, shape, generator=draw, dtype=torch.uint8),
        torch.randint(num_classes or 1, (count,), generator=draw),
    )


class Mixture(InMemory):
    """The analytic toy: `size` images of one channel whose pixels are draws of sum_k weight_k N(mean_k, std_k^2).

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
        expected = "as many weights as means and stds, weights and stds positive"
        got = f"weights {list(weights)}, means {list(means)}, stds {list(stds)}"
        require(valid, expected, got, "set data.source.weights, means, stds")
        reach = max(abs(m) + 3 * s for m, s in zip(means, stds, strict=True))
        require(reach <= 1, "modes within [-1, 1], 3 deviations wide", reach, "move or narrow them")
        draw = generator(seed, "mixture")
        share = torch.tensor(weights, dtype=torch.float64)
        mode = torch.multinomial(share, size * image_size**2, replacement=True, generator=draw)
        z = torch.randn(len(mode), dtype=torch.float64, generator=draw)
        x_0 = torch.tensor(means).double()[mode] + torch.tensor(stds).double()[mode] * z
        # in float64; `pixels.quantised`, in float32, rounds a few pixels of a million the other way
        grey = (x_0.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        images = grey.reshape(size, 1, image_size, image_size)
        super().__init__(images, torch.zeros(size, dtype=torch.int64))
