"""Augmentation of the training images of EDM [Karras et al. 2022, arXiv:2206.00364, Appendix F.2].

Names and draws are those of the released code; its augmentations that no published run used are left out.
"""

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional

from consistency.tensors import Data, sent

Draws: TypeAlias = Mapping[str, Tensor]
"""Draws by name, <transformation>.<draw>: (b,), of translate_frac.value (2, b)."""

SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
"""The low-pass filter of Daubechies' least asymmetric wavelet with six vanishing moments."""

MARGIN = len(SYM6) // 4  # pixels by which the filter reaches beyond the picture


class EDMAugmentation:
    """Flips, scales, turns, stretches and moves images; labels tell the network which.

    (images (b, c, h, w), draws) -> images of that shape, labels (b, 9): both flips, w of the scale, cos(a) - 1 and sin(a),
    w cos(r) and w sin(r) of the stretch, w of the move right and down. Labels of an image as it is are zeros, the labels for
    sampling. w are standard normal, before the factor `_std`; a transformation with factor 0 has no labels.

    p: probability of each transformation, times its factor; xflip is a fair coin by its factor.
    rotate_frac_max: largest angle, in half turns; aniso_rotate_prob: probability that a stretch has an axis of its own.
    """

    def __init__(
        self,
        *,
        p: float,
        xflip: float = 1e8,
        yflip: float = 1.0,
        scale: float = 1.0,
        rotate_frac: float = 1.0,
        aniso: float = 1.0,
        translate_frac: float = 1.0,
        scale_std: float = 0.2,
        rotate_frac_max: float = 1.0,
        aniso_std: float = 0.2,
        aniso_rotate_prob: float = 0.5,
        translate_frac_std: float = 0.125,
    ) -> None:
        factors = dict(xflip=xflip, yflip=yflip, scale=scale, rotate_frac=rotate_frac)
        factors |= dict(aniso=aniso, translate_frac=translate_frac)
        self.probabilities = {name: p * factor for name, factor in factors.items() if factor > 0}
        self.scale_std, self.rotate_frac_max = scale_std, rotate_frac_max
        self.aniso_std, self.aniso_rotate_prob = aniso_std, aniso_rotate_prob
        self.translate_frac_std = translate_frac_std

    @property
    def num_labels(self) -> int:
        """The number of labels of an image."""
        two = {"rotate_frac", "aniso", "translate_frac"} & self.probabilities.keys()
        return len(self.probabilities) + len(two)

    def draw(self, batch: int, generator: Generator) -> dict[str, Tensor]:
        """Draw the numbers of a batch, on the CPU."""
        draws = {}
        for name in self.probabilities:
            if name in ("xflip", "yflip"):
                value = torch.randint(2, (batch,), generator=generator)
            elif name == "rotate_frac":
                value = torch.rand(batch, generator=generator)
            else:
                shape = (2, batch) if name == "translate_frac" else (batch,)
                value = torch.randn(shape, generator=generator)
            draws[f"{name}.value"] = value
            if name == "aniso":
                draws["aniso.angle"] = torch.rand(batch, generator=generator)
            draws[f"{name}.gate"] = torch.rand(batch, generator=generator)
            if name == "aniso":
                draws["aniso.angle_gate"] = torch.rand(batch, generator=generator)
        return draws

    def __call__(self, images: Data, draws: Draws) -> tuple[Data, Float[Tensor, "b _a"]]:
        def amount(name: str) -> Tensor:
            gate = draws[f"{name}.gate"] < self.probabilities[name]
            return draws[f"{name}.value"] * gate

        (_, _, height, width), labels = images.shape, list[Tensor]()
        for name, axis in (("xflip", 3), ("yflip", 2)):
            if name in self.probabilities:
                flip = amount(name)
                labels.append(flip.float())
                chosen = sent(flip.bool(), images.device)[:, None, None, None]
                images = torch.where(chosen, images.flip(axis), images)
        if self.probabilities.keys() <= {"xflip", "yflip"}:
            return images, sent(torch.stack(labels, dim=1), images.device)
        # A pixel at p about the centre takes the value at linear @ (p - move).
        linear = torch.eye(2).expand(len(images), 2, 2)
        move = torch.zeros(2, len(images))
        if "scale" in self.probabilities:
            w = amount("scale")
            labels.append(w)
            linear = linear / (2 ** (w * self.scale_std))[:, None, None]
        if "rotate_frac" in self.probabilities:
            gate = draws["rotate_frac.gate"] < self.probabilities["rotate_frac"]
            a = gate * (2 * draws["rotate_frac.value"] - 1) * math.pi * self.rotate_frac_max
            labels += [a.cos() - 1, a.sin()]
            linear = linear @ rotation(a)
        if "aniso" in self.probabilities:
            w, turned = amount("aniso"), draws["aniso.angle_gate"] < self.aniso_rotate_prob
            r = turned * (2 * draws["aniso.angle"] - 1) * math.pi
            labels += [w * r.cos(), w * r.sin()]
            stretch = torch.stack([-w, w], dim=1) * self.aniso_std
            linear = linear @ rotation(-r) @ torch.diag_embed(2**stretch) @ rotation(r)
        if "translate_frac" in self.probabilities:
            w = amount("translate_frac")
            labels += [*w]
            move = w * torch.tensor([[width], [height]]) * self.translate_frac_std
        offset = -(linear @ move.T[:, :, None])[:, :, 0]
        return resampled(images, linear, offset), sent(torch.stack(labels, dim=1), images.device)


def rotation(a: Float[Tensor, "b"]) -> Float[Tensor, "b 2 2"]:
    """Return the rotation by a from the axis right to the axis down."""
    return torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], dim=1).unflatten(1, (2, 2))


def resampled(images: Data, linear: Float[Tensor, "b 2 2"], offset: Float[Tensor, "b 2"]) -> Data:
    """Return images whose pixel at p is that of `images` at linear @ p + offset, in pixels (right, down) about the centre.

    They are sampled on a grid twice as fine, between the two halves of an orthonormal filter. Beyond its border a picture is
    mirrored, as far as the batch needs and at most once.
    """
    height, width = images.shape[2:]
    last = torch.tensor([width - 1, height - 1])
    corners = last[:, None] / 2 * torch.tensor([[-1, 1, 1, -1], [-1, -1, 1, 1]])
    reach = (linear @ corners + offset[:, :, None]).transpose(0, 1).flatten(1)
    reach = torch.stack([-reach, reach]).amax(2) + 2 * MARGIN - last / 2
    (left, top), (right, bottom) = reach.clamp(min=0).minimum(last).ceil().long().tolist()
    fine = doubled(functional.pad(images, (left, right, top, bottom), mode="reflect"))
    offset = offset + torch.tensor([left - right, top - bottom]) / 2
    # The filter moves the fine picture by half of its pixels.
    across, down = (torch.arange(2 * (n + 2 * MARGIN)) for n in (width, height))
    p = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)
    p = p + 1 - torch.tensor([len(across), len(down)]) / 2
    source = torch.einsum("hwj,bij->bhwi", p, linear) + 2 * offset[:, None, None] - 0.5
    grid = source * 2 / torch.tensor([fine.shape[3], fine.shape[2]])
    return halved(
        functional.grid_sample(
            fine, sent(grid, images.device).to(images.dtype), align_corners=False
        )
    )


def doubled(images: Data) -> Float[Tensor, "b c _h _w"]:
    """Return twice the pixels in each direction, at half the brightness."""
    kernel = images.new_tensor(SYM6).repeat(images.shape[1], 1, 1, 1)
    parts, pad = len(kernel), len(SYM6) // 2 - 1
    images = functional.conv_transpose2d(images, kernel, None, (1, 2), (0, pad), groups=parts)
    return functional.conv_transpose2d(images, kernel.mT, None, (2, 1), (pad, 0), groups=parts)


def halved(images: Data) -> Float[Tensor, "b c _h _w"]:
    """Return half the pixels in each direction, at twice the brightness, without the margin."""
    kernel = images.new_tensor(SYM6).repeat(images.shape[1], 1, 1, 1)
    parts, pad = len(kernel), len(SYM6) // 2 - 1
    images = functional.conv2d(images, kernel, None, (1, 2), (0, pad), groups=parts)
    images = functional.conv2d(images, kernel.mT, None, (2, 1), (pad, 0), groups=parts)
    return images[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
