"""The bundled real images: scikit-learn's handwritten digits, under a fixed split."""

from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits

from consistency.data.source import Classes, Image, Images

SPLIT_SEED = 0
TRAIN_SIZE = 899


class Digits:
    """1,797 handwritten digits of 8x8 pixels, 10 classes [Alpaydin and Kaynak 1998, UCI; shipped with scikit-learn].

    split: "train" is 899 images chosen once at random, "held_out" the other 898. Grey values 0 to 16 become 0 to 255.
    """

    def __init__(self, *, split: Literal["train", "held_out"]) -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"expected split 'train' or 'held_out', got {split!r}")
        bundle = load_digits()
        order = np.random.RandomState(SPLIT_SEED).permutation(len(bundle.images))
        chosen = np.sort(order[:TRAIN_SIZE] if split == "train" else order[TRAIN_SIZE:])
        grey = np.rint(bundle.images[chosen] * (255 / 16)).astype(np.uint8)
        self.images = torch.from_numpy(grey)[:, None]
        self.labels: list[int] = bundle.target[chosen].tolist()
        self.classes = torch.tensor(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.images[index], self.labels[index]

    def batch(self, indices: list[int]) -> tuple[Images, Classes]:
        """Items `indices`, stacked."""
        return self.images[indices], self.classes[indices]
