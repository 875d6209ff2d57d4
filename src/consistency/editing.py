"""Zero-shot editing with a consistency function: one loop, in which a task is a pair of a transform and a mask.

Algorithm 4 of [Song et al. 2023, arXiv:2303.01469]: an image y is known where Omega = 0 in the space of an invertible
linear transform A, and free where Omega = 1. Every estimate x_0 keeps what is known,

    x_0 <- A^-1[ (A y) (1 - Omega) + (A x_0) Omega ].

Inpainting knows pixels, colorization the brightness, super-resolution the means of patches (Appendix D); with all of
it free the loop is SDEdit's guidance by strokes. Interpolation walks on the sphere between two noises.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from consistency.errors import require
from consistency.grids import KarrasGrid
from consistency.processes import variance_exploding
from consistency.samplers import Noise, at, bounded, followed, refined, require_falling
from consistency.solvers import heun_step
from consistency.tensors import Data, Denoise, Label, PerSample, Time

Start = Literal["reference", "noise", "input"]
"""Start of the loop: N(y, t_1^2) with the known part of y, as in Algorithm 4; N(0, t_1^2), as in the released code; or
the input itself, which is noisy already.
"""

Transformed: TypeAlias = Float[Tensor, "b k i j"]
"""A x, with as many numbers as x."""

LUMINANCE = (0.2989, 0.5870, 0.1140)
"""Share of red, green and blue in the brightness of a colour [Song et al. 2023, Appendix D]."""


@runtime_checkable
class Transform(Protocol):
    """An orthogonal linear map A of images, and its inverse."""

    def __call__(self, x: Data) -> Transformed: ...

    def inverse(self, x: Transformed) -> Data: ...


@dataclass(frozen=True)
class Pixels:
    """A = identity: the space of the pixels."""

    def __call__(self, x: Data) -> Transformed:
        return x

    def inverse(self, x: Transformed) -> Data:
        return x


def orthonormal_basis(first: Sequence[float]) -> Float[Tensor, "n n"]:
    """An orthogonal matrix whose first column points along `first`, in float64.

    The other columns are the unit vectors e_2, e_3, ..., made orthogonal to those before them (by QR).
    """
    columns = torch.eye(len(first), dtype=torch.float64)
    columns[:, 0] = torch.tensor(first, dtype=torch.float64)
    q, r = torch.linalg.qr(columns)
    return q * r[0, 0].sign()


@dataclass(frozen=True)
class ColourBasis:
    """Change the basis of the three colours: channel 0 of A x is the brightness [Song et al. 2023, Appendix D]."""

    def __call__(self, x: Data) -> Transformed:
        return torch.einsum("bchw,ck->bkhw", x, self.matrix.to(x))

    def inverse(self, x: Transformed) -> Data:
        return torch.einsum("bkhw,ck->bchw", x, self.matrix.to(x))

    @property
    def matrix(self) -> Float[Tensor, "3 3"]:
        """The new basis, a column a channel."""
        return orthonormal_basis(LUMINANCE)


@dataclass(frozen=True)
class PatchBasis:
    """Change the basis of the p x p pixels of every patch; component 0 is their sum over p, the mean times p.

    [Song et al. 2023, Appendix D.] A x has c p^2 channels, those of channel c at c p^2 ... (c + 1) p^2 - 1.
    """

    patch: int

    def __call__(self, x: Data) -> Transformed:
        return self._turned(pixel_unshuffle(x, self.patch), "bckhw,kl->bclhw")

    def inverse(self, x: Transformed) -> Data:
        return pixel_shuffle(self._turned(x, "bclhw,kl->bckhw"), self.patch)

    def _turned(self, x: Transformed, product: str) -> Transformed:
        matrix = orthonormal_basis([1.0] * self.patch**2).to(x)
        return torch.einsum(product, x.unflatten(1, (-1, self.patch**2)), matrix).flatten(1, 2)


@runtime_checkable
class Space(Protocol):
    """A map from images in [-1, 1] to the x_0 of a model, and back."""

    def encoded(self, images: Data) -> Data: ...

    def decoded(self, x_0: Data) -> Data: ...


@dataclass(frozen=True)
class ImageSpace:
    """x_0 is the image."""

    def encoded(self, images: Data) -> Data:
        return images

    def decoded(self, x_0: Data) -> Data:
        return x_0


@dataclass(frozen=True)
class Task:
    """A transform A and the mask Omega in its space, 1 where the image is free and 0 where it is known.

    guided: start from y itself (SDEdit) instead of its known part, which is 0 if all of it is free.
    """

    transform: Transform
    omega: Float[Tensor, "b k i j"]
    guided: bool = False

    def imposed(self, y: Data, x: Data) -> Data:
        """Return x with the known part of y: A^-1[(A y) (1 - Omega) + (A x) Omega]."""
        omega, a = self.omega.to(x), self.transform
        return a.inverse(a(y) * (1 - omega) + a(x) * omega)

    def reference(self, y: Data) -> Data:
        """Return the start of Algorithm 4: the known part of y and 0 for the rest; y itself if guided."""
        return y if self.guided else self.imposed(y, torch.zeros_like(y))


@runtime_checkable
class Mask(Protocol):
    """(height, width, generator) -> 1 where the pixels are free."""

    def __call__(self, height: int, width: int, draw: Generator) -> Float[Tensor, "h w"]: ...


@dataclass(frozen=True, kw_only=True)
class Box:
    """The pixels of the box [x, y, w, h] are free: left and upper edge, width and height."""

    box: Sequence[int]

    def __call__(self, height: int, width: int, draw: Generator) -> Float[Tensor, "h w"]:
        fits = len(self.box) == 4 and all(isinstance(n, int) for n in self.box)
        x, y, w, h = self.box if fits else (0, 0, 0, 0)
        fits = fits and min(x, y) >= 0 and min(w, h) >= 1 and x + w <= width and y + h <= height
        expected = f"mask.box=[x,y,w,h], a box inside {width}x{height} pixels"
        example = f"for example mask.box=[0,0,{max(1, width // 2)},{height}]"
        require(fits, expected, list(self.box), example)
        omega = torch.zeros(height, width)
        omega[y : y + h, x : x + w] = 1
        return omega


@dataclass(frozen=True, kw_only=True)
class Center:
    """The central square of side `size` pixels is free; None is half the image's side."""

    size: int | None = None

    def __call__(self, height: int, width: int, draw: Generator) -> Float[Tensor, "h w"]:
        side = max(1, min(height, width) // 2) if self.size is None else self.size
        most = min(height, width)
        expected = f"mask.size of 1 to {most} pixels"
        require(1 <= side <= most, expected, side, "choose a square that fits into the image")
        box = [(width - side) // 2, (height - side) // 2, side, side]
        return Box(box=box)(height, width, draw)


@dataclass(frozen=True, kw_only=True)
class Random:
    """A random share of the pixels is free; 0 < share <= 1."""

    share: float

    def __call__(self, height: int, width: int, draw: Generator) -> Float[Tensor, "h w"]:
        require(0 < self.share <= 1, "0 < mask.share <= 1", self.share, "for example 0.5")
        count = max(1, round(self.share * height * width))
        omega = torch.zeros(height * width)
        omega[torch.randperm(height * width, generator=draw)[:count]] = 1
        return omega.view(height, width)


@runtime_checkable
class Pairing(Protocol):
    """(shape of an image, generator) -> the task for such images."""

    def __call__(self, shape: tuple[int, int, int], draw: Generator) -> Task: ...


def inpaint(shape: tuple[int, int, int], draw: Generator, *, mask: Mask) -> Task:
    """The pixels outside the mask are known."""
    return Task(Pixels(), mask(shape[1], shape[2], draw)[None, None])


def colorize(shape: tuple[int, int, int], draw: Generator) -> Task:
    """The brightness is known, both other components of the colour are free."""
    expected = "a model of images with 3 channels to colorize with"
    remedy = "choose another task= or a model of colour images"
    require(shape[0] == 3, expected, f"one with {shape[0]}", remedy)
    return Task(ColourBasis(), torch.tensor([0.0, 1.0, 1.0])[None, :, None, None])


def superres(shape: tuple[int, int, int], draw: Generator, *, patch: int) -> Task:
    """The mean of every patch x patch pixels is known."""
    channels, height, width = shape
    divides = patch >= 2 and height % patch == width % patch == 0
    expected = f"a patch of at least 2 pixels that divides the images' {width}x{height}"
    require(divides, expected, patch, "set task.pairing.patch, for example to 2")
    omega = torch.ones(channels, patch**2)
    omega[:, 0] = 0
    return Task(PatchBasis(patch), omega.view(1, -1, 1, 1))


def regenerate(shape: tuple[int, int, int], draw: Generator) -> Task:
    """Everything is free: the image is only the start of the loop."""
    return Task(Pixels(), torch.ones(1, 1, 1, 1), guided=True)


def edit(
    denoise: Denoise,
    noise: Noise,
    y: Data,
    task: Task,
    label: Label = None,
    *,
    times: Sequence[float],
    t_min: float,
    start: Start,
    clip: bool,
    space: Space = ImageSpace(),  # frozen
) -> Data:
    """Algorithm 4 of Song et al. 2023 at the falling time points `times`; NFE len(times).

    The loop is that of `samplers.multistep`, with the known part of y imposed on every estimate. The released code
    differs in `start`, and in the picture of the free part of y. In another `space` than that of images, the known part
    is imposed on the decoded estimate, which is encoded again.
    """
    require_falling(times, t_min)
    estimate, edited = bounded(denoise, clip), y

    def imposed(x_t: Data, t: Time, label: Label = None) -> Data:
        nonlocal edited
        edited = task.imposed(y, space.decoded(estimate(x_t, t, label)))
        return space.encoded(edited)

    if start == "input":
        x = space.encoded(y)
    else:
        x = space.encoded(task.reference(y))
        origin = x if start == "reference" else torch.zeros_like(x)
        x = variance_exploding(origin, noise(), at(times[0], x))
    refined(imposed, x, noise, label, times, t_min)
    return edited


def spherical(z_0: Data, z_1: Data, share: float) -> Data:
    """The point at that share of the great circle's arc from z_0 to z_1, image by image.

    sin((1 - a) psi) / sin(psi) z_0 + sin(a psi) / sin(psi) z_1, psi the angle between the two [Song et al. 2023,
    Appendix D]; the straight line where they point the same way.
    """
    cosine = torch.cosine_similarity(z_0.flatten(1), z_1.flatten(1), dim=1).clamp(-1, 1)
    psi = cosine.double().arccos()
    sine = psi.sin()
    straight = sine.abs() < 1e-6
    safe = sine.masked_fill(straight, 1.0)
    first = torch.where(straight, 1 - share, ((1 - share) * psi).sin() / safe)
    second = torch.where(straight, share, (share * psi).sin() / safe)
    weights = (w.to(z_0)[:, None, None, None] for w in (first, second))
    return next(weights) * z_0 + next(weights) * z_1


def invert(
    denoise: Denoise, x_0: Data, label: Label = None, *, grid: KarrasGrid, steps: int
) -> Data:
    """The noise z whose x_T = t_max z flows to x_0 along the PF-ODE of a denoiser, by Heun's method upwards.

    NFE 2 steps - 2; x_0 stands for x at t_min, the lower end of the grid with `steps` points.
    """
    points = grid.points(steps).flip(0).tolist()
    return followed(heun_step, denoise, x_0, points, label) / grid.t_max


def interpolate(
    denoise: Denoise,
    z_0: Data,
    z_1: Data,
    label_0: Label = None,
    label_1: Label = None,
    *,
    frames: int,
    t_max: float,
    clip: bool,
) -> Float[Tensor, "f b c h w"]:
    """f(t_max z, t_max) at `frames` noises z on the arc from z_0 to z_1, both ends among them; NFE frames.

    The class is that of the nearer end.
    """
    require(frames >= 2, "at least 2 frames, the two ends", frames, "set task.frames")
    estimate, shown = bounded(denoise, clip), []
    for n in range(frames):
        share = n / (frames - 1)
        x = t_max * spherical(z_0, z_1, share)
        shown.append(estimate(x, at(t_max, x), label_0 if share < 0.5 else label_1))
    return torch.stack(shown)


def difference(x: Data, y: Data) -> PerSample:
    """Root mean square of x - y, image by image: how far a round trip ends from where it began."""
    return (x - y).square().mean(dim=(1, 2, 3)).sqrt()


def grid_times(grid: KarrasGrid, num_scales: int = 40) -> list[float]:
    """All points of the grid but t_min, where a consistency function changes nothing."""
    require(num_scales >= 2, "task.num_scales >= 2", num_scales, "the published number is 40")
    return grid.points(num_scales)[:-1].tolist()
