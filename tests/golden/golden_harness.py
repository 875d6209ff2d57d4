"""Reading golden data: numbers of the published implementations, see `golden/ARRAYS.md`.

An `Archive` is one file of arrays and keeps account of them: each is read as an input or compared with ours, or the test
fails. No name of a case, size or count is fixed here.
"""

import json
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FOLDER = Path(os.environ.get("CM_GOLDEN", Path(__file__).parent / "arrays"))


@dataclass(frozen=True)
class Tolerance:
    """The allowed difference: `absolute`, times max |expected|, times |expected|, or in the L2 norm."""

    absolute: float = 0.0
    of_largest: float = 0.0
    of_each: float = 0.0
    of_norm: float | None = None

    def used(self, ours: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
        """The share of the tolerance that the difference uses up; at most 1 where it holds."""
        difference = np.abs(ours - expected)
        largest = float(np.abs(expected).max(initial=0.0))
        if self.of_norm is not None:
            bound = self.of_norm * np.linalg.norm(expected) + self.absolute
            return float(np.linalg.norm(difference) / max(bound, 1e-300))
        bounds = self.absolute + self.of_largest * largest + self.of_each * np.abs(expected)
        return float(np.max(difference / np.maximum(bounds, 1e-300), initial=0.0))


# Section 4 of the golden README, column "suggested test".
OUTPUT = Tolerance(of_largest=5e-5)
GRADIENT = Tolerance(of_norm=1e-3)
SCALING = Tolerance(of_each=2e-6)
SCALING_FLOAT64 = Tolerance(of_each=1e-12)
TIME_EMBEDDING = Tolerance(absolute=2e-4)
HALF_PRECISION = Tolerance(absolute=5e-3)


@dataclass
class Archive:
    """The arrays of one .npz file, and which of them were read or compared."""

    path: Path
    read: set[str] = field(default_factory=set)
    compared: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with np.load(self.path, allow_pickle=False) as arrays:
            self.arrays: dict[str, NDArray] = {name: arrays[name] for name in arrays.files}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def has(self, name: str, *, unless: bool) -> bool:
        """Return whether the file has an array that the published code computes only in some cases.

        Fails if the array is missing, unless the case implies that: `unless`.
        """
        if name not in self.arrays and not unless:
            raise AssertionError(f"{name}: missing, although its case implies it")
        return name in self.arrays

    def matching(self, pattern: str) -> list[str]:
        return [name for name in self.arrays if fnmatchcase(name, pattern)]

    def input(self, name: str) -> NDArray:
        """An array that the comparison starts from."""
        self.read.add(name)
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.input(name)))

    def number(self, name: str, default: float | None = None) -> float:
        """A single value; the default, where there is one, for a file that leaves it out."""
        return float(self.input(name)) if default is None or name in self.arrays else default

    def compare(self, name: str, ours: Tensor, tolerance: Tolerance) -> None:
        """Fails unless `ours` equals the array within the tolerance, NaN where it has NaN."""
        expected = self.arrays[name].astype(np.float64)
        mine = ours.detach().double().cpu().numpy()
        if mine.shape != expected.shape:
            raise AssertionError(f"{name}: expected shape {expected.shape}, got {mine.shape}")
        holes = np.isnan(expected)
        if not np.array_equal(holes, np.isnan(mine)):
            raise AssertionError(f"{name}: NaN in other places than expected")
        used = tolerance.used(mine[~holes], expected[~holes])
        if not used <= 1.0:
            raise AssertionError(f"{name}: {used:.3g} times the tolerance {tolerance}")
        self.compared[name] = used

    def compare_names(self, name: str, ours: list[str]) -> None:
        """Fails unless the array holds exactly these names, in any order."""
        expected = [str(entry) for entry in self.arrays[name]]
        if sorted(expected) != sorted(ours):
            different = sorted(set(expected) ^ set(ours))
            raise AssertionError(f"{name}: names differ in {different[:6]}")
        self.compared[name] = 0.0


def require_known(settings: Mapping[str, object], known: Collection[str], what: str) -> None:
    """Fails on settings that nothing reads: they could change the numbers without a word."""
    unread = sorted(set(settings) - set(known))
    if unread:
        raise AssertionError(f"{what}: nothing reads the settings {unread}")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file as float32: 8 bytes of length, a JSON header, raw data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    types = {"F16": np.float16, "F32": np.float32}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            values = np.frombuffer(data[start:end], dtype=types[entry["dtype"]])
            tensors[name] = torch.from_numpy(
                values.reshape(entry["shape"]).astype(np.float32, copy=True)
            )
    return tensors


def compare_gradients(
    archive: Archive, name: str, names: list[str], gradients: Mapping[str, Tensor]
) -> None:
    """Compares an array of gradient norms, one per parameter and in the order of `names`.

    Some gradients are zero in exact arithmetic (the bias of the attention keys) and rounding noise
    in both, hence the floor of 1e-5 of the largest norm.
    """
    norms = torch.stack([gradients[parameter].double().norm() for parameter in names])
    archive.compare(name, norms, Tolerance(of_each=1e-3, of_largest=1e-5))
