"""A small classifier whose features replace Inception's for images far too small for that network."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from consistency.data.digits import Digits
from consistency.data.source import Source
from consistency.pixels import to_unit
from consistency.randomness import generator

FEATURES = 64


class SmallClassifier(nn.Module):
    """uint8 images -> 64 features of the last hidden layer: three 3x3 convolutions and one hidden linear layer."""

    def __init__(self, *, channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, FEATURES),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        return self.trunk(to_unit(images))

    def logits(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        """Return the logits of the classes."""
        return self.head(functional.silu(features))


def shifted(images: Tensor, draw: torch.Generator) -> Tensor:
    """Move a batch by -1, 0 or 1 pixel in each direction, and repeat the border."""
    padded = functional.pad(images.float(), (1, 1, 1, 1), mode="replicate").to(images.dtype)
    top, left = torch.randint(3, (2,), generator=draw).tolist()
    return padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute the body on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train_classifier(
    source: Source,
    *,
    num_classes: int,
    seed: int = 0,
    epochs: int = 24,
    batch_size: int = 64,
    lr: float = 3e-3,
) -> SmallClassifier:
    """Train by AdamW with a one-cycle rate on images shifted by up to a pixel.

    The result is a function of the arguments: it computes on one thread, because sums differ with the number of threads.
    """
    images = torch.stack([source[i][0] for i in range(len(source))])
    labels = torch.tensor([source[i][1] for i in range(len(source))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = SmallClassifier(channels=images.shape[1], num_classes=num_classes)
    draw = generator(seed, "classifier")
    batches = -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=draw).split(batch_size):
            logits = classifier.logits(classifier(shifted(images[chosen], draw)))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return classifier.eval().requires_grad_(False)


@cache
def digits_classifier() -> tuple[SmallClassifier, int]:
    """Return the classifier of the default data set, trained once a process in seconds, and the side of its images."""
    digits = Digits(split="train")
    return train_classifier(digits, num_classes=len(digits.class_names)), digits.images.shape[-1]
