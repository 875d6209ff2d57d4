"""Write scikit-learn's digits in colour, as images to try `data=folder` with: `python tests/tools/coloured_digits.py <folder> [count [noise]]`.

Each digit has a random hue on a darker background of the opposite one, also in print without colours; there is one folder a class. `noise` is the standard deviation of noise
that is added to the pixels, which are in [-1, 1].
"""

import sys
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write(folder: Path, count: int = 1797, noise: float = 0.0) -> None:
    """Write the first `count` of 1,797 digits as PNG of 8x8 pixels."""
    bundle, random, disturbed = load_digits(), np.random.RandomState(0), np.random.RandomState(1)
    pairs = zip(bundle.images[:count] / 16, bundle.target[:count], strict=True)
    for number, (ink, digit) in enumerate(pairs):
        hue = random.rand()
        front, back = hsv_to_rgb(hue, 0.6, 1.0), hsv_to_rgb((hue + 0.5) % 1, 0.6, 0.25)
        colours = ink[..., None] * np.array(front) + (1 - ink[..., None]) * np.array(back)
        colours = (colours + noise / 2 * disturbed.standard_normal(colours.shape)).clip(0, 1)
        file = folder / str(digit) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(255 * colours).astype(np.uint8)).save(file)


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:3]), *map(float, sys.argv[3:4]))
