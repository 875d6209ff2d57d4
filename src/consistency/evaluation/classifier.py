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

    def __init__(self, *, channels: int, num_classes: int) -> None:
        super().__init__()

        def convolution(inputs: int, outputs: int) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, 3, padding=1)
            return [layer, nn.GroupNorm(8, outputs), nn.SiLU()]

        first, second = convolution(channels, 32), convolution(32, 64)
        third = [nn.MaxPool2d(2), *convolution(64, 64), nn.AdaptiveAvgPool2d(2)]
        self.trunk = nn.Sequential(*first, *second, *third, nn.Flatten(), nn.Linear(256, FEATURES))
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        return self.trunk(to_unit(images))

    def logits(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        """Return the logits of the classes."""
        return self.head(functional.silu(features))


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
def train_classifier(source: Source, *, num_classes: int, epochs: int = 24) -> SmallClassifier:
    """Train by AdamW with a one-cycle rate, in batches of 64, each shifted by up to a pixel with its border repeated.

    The result is a function of the arguments: it computes on one thread, because sums differ with the number of threads.
    """
    images, labels = source.batch(list(range(len(source))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = SmallClassifier(channels=images.shape[1], num_classes=num_classes)
    padded = functional.pad(images.float(), (1, 1, 1, 1), mode="replicate").to(images.dtype)
    height, width = images.shape[-2:]
    draw, steps = generator(0, "classifier"), epochs * -(-len(images) // 64)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=draw).split(64):
            top, left = torch.randint(3, (2,), generator=draw).tolist()
            shifted = padded[chosen, :, top : top + height, left : left + width]
            logits = classifier.logits(classifier(shifted))
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
