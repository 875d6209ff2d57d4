"""Random numbers as a function of a key, never of earlier draws.

A key is (seed, purpose, indices ...), for example (0, "train", 0, step). A resumed run therefore draws the numbers of an
uninterrupted one, and a sample does not depend on its batch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from consistency.tensors import Data, sent


def key(seed: int, purpose: str, *indices: int) -> int:
    """Return a 63-bit seed for the key, the same on every machine."""
    text = "/".join(str(part) for part in (seed, purpose, *indices))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(
    seed: int, purpose: str, *indices: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a generator on `device`, seeded by the key."""
    return torch.Generator(device).manual_seed(key(seed, purpose, *indices))


class Share(NamedTuple):
    """Part `number` of `parts` equal parts of an optimizer step's batch: what a device holds at once.

    Draw for all parts and keep the rows of one, so that an image meets the same noise on any number of devices.
    """

    number: int = 0
    parts: int = 1

    def rows(self, size: int) -> slice:
        """Return the rows of this part, of `size` rows, in the whole batch."""
        return slice(self.number * size, (self.number + 1) * size)


WHOLE = Share()
"""The whole batch at once."""


class SampleNoise:
    """Standard normal noise for samples number `indices`: each call draws the next tensor of every sample's own stream.

    Drawn on the CPU and moved, so that a sample's noise is the same on any device, in any batch.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.generators = [generator(seed, "sample", index) for index in indices]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Data:
        draws = [torch.randn(self.shape, generator=each) for each in self.generators]
        return sent(torch.stack(draws), self.device)


class DropoutState:
    """The present state of the global generator that dropout on `device` draws from.

    Both passes of a consistency loss must drop the same units; saving only the CPU state, as the released code does,
    leaves the masks on a GPU different.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.state = torch.cuda.get_rng_state(device) if self.cuda else torch.get_rng_state()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run the body with this state, and restore the one before it afterwards."""
        with torch.random.fork_rng([self.device] if self.cuda else []):
            if self.cuda:
                torch.cuda.set_rng_state(self.state, self.device)
            else:
                torch.set_rng_state(self.state)
            yield
