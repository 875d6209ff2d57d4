"""The card of a model: everything about it but its weights, as every checkpoint carries it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from consistency.errors import UserError, require
from consistency.flow_samplers import flow_jumps
from consistency.grids import KarrasGrid
from consistency.latents import SCALINGS
from consistency.randomness import generator
from consistency.samplers import Sampler, heun, multistep, trigflow_multistep

Role: TypeAlias = Literal["teacher", "consistency"]
"""A denoiser D (EDM scalings), or a consistency function f (boundary scalings)."""

EXPLODING, TRIGFLOW, FLOW = "the variance-exploding process", "TrigFlow", "the rectified flow"
"""Names of noise processes."""

LARGEST, MOST_LISTED, MOST_CHARACTERS, MOST_PATH = 1 << 20, 64, 256, 4096
"""Bounds of numbers, lists and texts in a card from elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """The noise process of a model, and its Karras grid.

    times: time points of two-step sampling, the first of them t_max; None if none are published.
    """

    sigma_data: float
    t_min: float
    t_max: float
    rho: float
    times: tuple[float, ...] | None = None

    @property
    def grid(self) -> KarrasGrid:
        """The Karras grid from t_min to t_max."""
        return KarrasGrid(t_min=self.t_min, t_max=self.t_max, rho=self.rho)


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """The latents that a model draws instead of pixels.

    autoencoder: its folder, or its name on the Hugging Face hub; two spaces are equal whatever the place.
    sha256: of its file of weights; None if a checkpoint of another program does not record it.
    scaling: a name in `consistency.latents.SCALINGS`.
    channels, image_size: of the images that latents are decoded to.
    """

    autoencoder: str = field(compare=False)
    sha256: str | None
    scaling: str
    channels: int
    image_size: int

    @classmethod
    def parse(cls, saved: object, origin: object) -> "LatentSpace":
        """Check the saved form, a dictionary of the fields. Raise `UserError` that names `origin`, the file."""
        fields = saved if isinstance(saved, dict) else {}
        names, counts = ("autoencoder", "sha256", "scaling"), ("channels", "image_size")
        texts = [fields.get(n) for n in names if n != "sha256" or fields.get(n) is not None]
        require(
            set(fields) == {*names, *counts}
            and all(type(text) is str and len(text) <= MOST_PATH for text in texts)
            and fields["scaling"] in SCALINGS
            and all(type(fields[n]) is int and 1 <= fields[n] <= LARGEST for n in counts),
            f"latents with autoencoder, sha256, scaling, channels and image_size in {origin}",
            "a missing or impossible part",
            "take another checkpoint, or prepare the latents again",
        )
        return cls(**fields)

    @property
    def protocol(self) -> dict[str, str | None]:
        """What a measure of decoded images depends on: the autoencoder, the scaling and the rounding of pixels."""
        return {
            "autoencoder_sha256": self.sha256,
            "scaling": self.scaling,
            "quantisation": SCALINGS[self.scaling].quantisation,
        }


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The description of a model.

    role: teacher or consistency; None if the file does not record it.
    network, preconditioning: `_target_` and arguments; without a role, preconditioning has no `_target_`.
    channels, image_size: of the images or latents, which are square.
    num_classes: number of classes; None for an unconditional model.
    class_names: names of the classes; empty if unknown.
    latents: of which autoencoder they are; None for images.
    """

    role: Role | None
    network: dict[str, Any]
    preconditioning: dict[str, Any]
    process: Process
    channels: int
    image_size: int
    num_classes: int | None
    class_names: tuple[str, ...] = ()
    latents: LatentSpace | None = None

    @classmethod
    def parse(cls, saved: Mapping[str, Any], origin: object) -> "ModelCard":
        """Check the saved form of a card. Raise `UserError` that names `origin`, the file, if a part is wrong."""
        names, classes = saved.get("class_names") or [], saved.get("num_classes")
        network, scalings, process, image = (
            value if isinstance(value := saved.get(part), dict) else {}
            for part in ("network", "preconditioning", "process", "image")
        )
        scalars = ("sigma_data", "t_min", "t_max", "rho")
        times = process.get("times") or ()
        counts = (image.get("channels"), image.get("size"), 1 if classes is None else classes)
        latents = saved.get("latents")
        require(
            saved.get("role") in ("teacher", "consistency", None)
            and bool(network and scalings)
            and all(type(count) is int and 1 <= count <= LARGEST for count in counts)
            and isinstance(names, list | tuple)
            and len(names) in (0, classes)
            and all(isinstance(name, str) and len(name) <= MOST_CHARACTERS for name in names)
            and set(process) <= {*scalars, "times"}
            and isinstance(times, list | tuple)
            and len(times) <= MOST_LISTED
            and all(
                isinstance(number, int | float) and abs(number) <= LARGEST
                for number in (*map(process.get, scalars), *times)
            ),
            f"a card with role, network, preconditioning, process, image and num_classes in {origin}",
            "a card with a missing or impossible part",
            "take another checkpoint, or convert the original file again",
        )
        return cls(
            role=saved.get("role"),
            network=network,
            preconditioning=scalings,
            process=Process(**{**process, "times": tuple(times) or None}),
            channels=image["channels"],
            image_size=image["size"],
            num_classes=classes,
            class_names=tuple(names),
            latents=None if latents is None else LatentSpace.parse(latents, origin),
        )

    def saved(self) -> dict[str, Any]:
        """Return the form in which checkpoints hold the card: plain dictionaries, lists and scalars."""
        times, extras = self.process.times, dict[str, Any]()
        if self.class_names:
            extras["class_names"] = list(self.class_names)
        if self.latents is not None:
            extras["latents"] = asdict(self.latents)
        return {
            "role": self.role,
            "network": dict(self.network),
            "preconditioning": dict(self.preconditioning),
            "process": asdict(self.process) | ({} if times is None else {"times": list(times)}),
            "image": {"channels": self.channels, "size": self.image_size},
            "num_classes": self.num_classes,
            **extras,
        }

    def with_role(self, role: Role | None, origin: object) -> "ModelCard":
        """Return the card with its role, or else `role`. Raise `UserError` if they differ or neither is known."""
        require(
            role is None or self.role in (None, role),
            f"a {role} checkpoint",
            f"{origin}, a {self.role} checkpoint",
            "train a teacher with mode=edm" if role == "teacher" else "give a consistency model",
        )
        known = self.role or role
        if known is None:
            raise UserError(
                "role=teacher (a denoiser, EDM scalings) or role=consistency (boundary scalings)",
                f"no role, and {origin} does not record one",
                "add the one that the file is: the keys and shapes of both are the same",
            )
        if "_target_" in self.preconditioning:
            return replace(self, role=known)
        boundary = {"_target_": "consistency.preconditioning.Boundary", "t_min": self.process.t_min}
        edm = {"_target_": "consistency.preconditioning.EDM"}
        scalings = (edm if known == "teacher" else boundary) | self.preconditioning
        return replace(self, role=known, preconditioning=scalings)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image or a latent."""
        return self.channels, self.image_size, self.image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image, a decoded one of a model of latents."""
        own = self if self.latents is None else self.latents
        return own.channels, own.image_size, own.image_size

    @property
    def clips(self) -> bool:
        """Whether samplers may clip estimates to [-1, 1], the range of images."""
        return self.latents is None

    @property
    def noise_process(self) -> str:
        """The name of the noise process whose times the scalings take."""
        scalings = str(self.preconditioning.get("_target_")).rpartition(".")[2]
        return {"TrigFlow": TRIGFLOW, "RectifiedFlow": FLOW}.get(scalings, EXPLODING)

    def require_variance_exploding(self, what: str) -> None:
        """Refuse a model of another process for work that moves along the variance-exploding one."""
        expected, got = f"a model of {EXPLODING}, for {what}", f"one of {self.noise_process}"
        require(self.noise_process == EXPLODING, expected, got, "choose another")

    def require_start(self, start: str) -> None:
        """Refuse an edit that takes the noise of an image for that of its latents."""
        expected, remedy = "a model of images for start=input", "choose start=reference or noise"
        suited = self.latents is None or start != "input"
        require(suited, expected, "one of latents, whose noise is not that of an image", remedy)

    def sampler(self, steps: int) -> Sampler:
        """Return Heun's sampler for a teacher, jumps for an average velocity, else Algorithm 1 of Song et al. 2023.

        It has `steps` evaluations. The time points are those of the process if it has as many, else the first of the Karras
        grid with one more; of the rectified flow evenly spaced ones.
        """
        require(steps >= 1, "steps >= 1", steps, "1 or 2 suit a consistency model, 18 a denoiser")
        process, sigma_data = self.process, self.process.sigma_data
        if self.role == "teacher":
            return partial(heun, grid=process.grid, steps=max(steps, 2), clip=False)
        times = [process.t_max] if steps == 1 else list(process.times or ())
        if self.noise_process == FLOW:
            if len(times) != steps:
                times = [process.t_max * (1 - i / steps) for i in range(steps)]
            return partial(flow_jumps, times=times, t_max=process.t_max)
        if len(times) != steps:
            times = process.grid.points(steps + 1)[:-1].tolist()
        if self.noise_process == TRIGFLOW:
            angles = [math.atan(t / sigma_data) for t in times]
            return partial(trigflow_multistep, times=angles, sigma_data=sigma_data, clip=self.clips)
        return partial(
            multistep, times=times, t_min=process.t_min, t_max=process.t_max, clip=self.clips
        )

    def labels(self, labels: object, seed: int, numbers: Sequence[int]) -> Int[Tensor, "n"] | None:
        """Return the class index of each sample number; None for an unconditional model.

        labels: an index or a class name, or several that are repeated in turn; None draws them at random.
        """
        if self.num_classes is None:
            expected = "labels=null for a model without classes"
            require(labels is None, expected, labels, "leave it out")
            return None
        if labels is None:
            return random_labels(seed, numbers, self.num_classes)
        several = isinstance(labels, Sequence) and not isinstance(labels, str)
        choices: Sequence[Any] = labels if several else [labels]  # type: ignore[assignment]
        names = list(self.class_names)
        indices = [names.index(c) if isinstance(c, str) and c in names else c for c in choices]
        known = f", or of {', '.join(names[:9])}{' ...' if len(names) > 9 else ''}" if names else ""
        require(
            bool(indices) and all(type(i) is int and 0 <= i < self.num_classes for i in indices),
            f"labels from 0 to {self.num_classes - 1}{known}",
            labels,
            "for example labels=[0,1,2]",
        )
        return torch.tensor([indices[number % len(indices)] for number in numbers])

    def edit_labels(
        self, labels: object, seed: int, images: int, outputs: int
    ) -> Int[Tensor, "m"] | None:
        """Return the class index of each of images x outputs results: given ones by image, random ones by result."""
        if labels is None:
            return self.labels(None, seed, range(images * outputs))
        by_image = self.labels(labels, seed, range(images))
        return None if by_image is None else by_image.repeat_interleave(outputs)


def random_labels(seed: int, numbers: Sequence[int], num_classes: int) -> Int[Tensor, "n"]:
    """Draw the class of each sample number uniformly; number i depends on (seed, i) alone."""
    draws = [torch.randint(num_classes, (), generator=generator(seed, "label", i)) for i in numbers]
    return torch.stack(draws)
