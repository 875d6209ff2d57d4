"""The bundled real images: scikit-learn's handwritten digits, under a fixed split."""

from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits

from consistency.data.memory import InMemory
from consistency.errors import require


class Digits(InMemory):
    """1,797 handwritten digits of 8x8 pixels, 10 classes [Alpaydin and Kaynak 1998, UCI; shipped with scikit-learn].

    split: "train" is 899 images chosen once at random, "held_out" the other 898. Grey values 0 to 16 become 0 to 255.
    """

    def __init__(self, *, split: Literal["train", "held_out"]) -> None:
        require(split in ("train", "held_out"), "split=train or held_out", split, "choose one")
        bundle = load_digits()
        order = np.random.RandomState(0).permutation(len(bundle.images))
        chosen = np.sort(order[:899] if split == "train" else order[899:])
        grey = np.rint(bundle.images[chosen] * (255 / 16)).astype(np.uint8)
        images, labels = torch.from_numpy(grey), torch.from_numpy(bundle.target[chosen])
        names = [str(digit) for digit in bundle.target_names]
        super().__init__(images[:, None], labels.long(), names)
