"""Latents of images that an autoencoder has encoded once: what `prepare.py to=latents` writes, read item by item.

A folder of .safetensors files, each with `latents` (images, orientations, k, h, w) and `labels` (images,), and a table,
latents.json. The first orientation is the image, the second, if stored, its mirror image. k is twice the channels for means
and standard deviations of the autoencoder's own latents, the channels alone for one sample of each.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from consistency.data.parallel import PerProcess
from consistency.data.source import Classes, Images, Source, required_path
from consistency.errors import UserError, require
from consistency.inference.autoencoder import autoencoder_of
from consistency.inference.card import LatentSpace
from consistency.latents import SCALINGS, scaling_of
from consistency.randomness import WHOLE, Share
from consistency.tensors import Data

TABLE = "latents.json"
MOMENTS, SAMPLES = "moments", "samples"
"""What is stored: means and standard deviations, or one sample of each image."""


class Latents(Source):
    """Latents in the folder `path`; conf/data/latents.yaml has the arguments.

    An item is what the folder stores of an image, and a new latent is drawn from it at every use. With `flip` the mirror
    images follow the images as entries of their own.

    autoencoder: its present place; None for that at which the latents were encoded.
    scaling: a name in `consistency.latents.SCALINGS`; None for that of the folder.
    """

    def __init__(
        self,
        *,
        path: str | None,
        flip: bool,
        autoencoder: str | None = None,
        scaling: str | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.folder = required_path(path, "a folder of latents, which prepare.py to=latents writes")
        table = self._table()
        space = LatentSpace.parse(table["latents"], self.folder / TABLE)
        self.latents = replace(
            space, autoencoder=autoencoder or space.autoencoder, scaling=scaling or space.scaling
        )
        self.channels, *self.sides = table["shape"]
        self.scaling = scaling_of(self.latents.scaling, self.channels)
        expected = f"a scaling for pixels as they were encoded, of scaling={space.scaling}"
        same = self.scaling.black == SCALINGS[space.scaling].black
        remedy = f"choose scaling={space.scaling}, or encode the images with prepare.py scaling={scaling}"
        require(same, expected, f"scaling={scaling}, of pixels in another range", remedy)
        expected, got = "latents of mirror images too, for data.flip=true", "those of images alone"
        remedy = "prepare them with flip=true, or set data.flip=false"
        require(not flip or table["orientations"] == 2, expected, got, remedy)
        classes = table["num_classes"] or 0
        expected = f"latents of 1 to data.num_classes={num_classes} classes at data.path={path}"
        remedy = "set data.num_classes to that; null trains without classes"
        fits = num_classes is None or 1 <= classes <= num_classes
        require(fits, expected, f"{classes or 'no'} classes", remedy)
        self.class_names, self.left_out = table["class_names"], table["left_out"]
        self.stored, self.orientations = table["stored"], 2 if flip else 1
        self.files = [self.folder / name for name, _ in table["files"]]
        self.counts = [count for _, count in table["files"]]
        self.ends = torch.tensor(self.counts).cumsum(0)
        channels = self.channels * (2 if self.stored == MOMENTS else 1)
        self.item = table["orientations"], channels, *self.sides
        self.open_files: PerProcess[dict[int, Any]] = PerProcess(dict)

    def _table(self) -> dict[str, Any]:
        """Read latents.json. Refuse a folder without it, another content, and files that lie elsewhere."""
        file = self.folder / TABLE
        expected = f"a folder of latents with {TABLE} at data.path={self.folder}"
        remedy = "write one with prepare.py to=latents"
        require(file.is_file(), expected, "none", remedy)
        try:
            table: dict[str, Any] = json.loads(file.read_text())
            names = [str(name) for name, _ in table["files"]]
            counts = [*table["shape"], *(count for _, count in table["files"])]
            right = (
                bool(names)
                and all(Path(name).name == name and name.endswith(".safetensors") for name in names)
                and all(type(count) is int and count >= 1 for count in counts)
                and len(table["shape"]) == 3
                and table["stored"] in (MOMENTS, SAMPLES)
                and table["orientations"] in (1, 2)
                and {"latents", "num_classes", "class_names", "left_out"} <= table.keys()
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(expected, f"a damaged {TABLE} ({error})"[:200], remedy) from error
        require(right, expected, f"another content of {TABLE}", remedy)
        return table

    def __len__(self) -> int:
        return int(self.ends[-1]) * self.orientations

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "k h w"], int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        mirrored, number = divmod(index, int(self.ends[-1]))
        shard = int(torch.searchsorted(self.ends, number, right=True))
        row = number - (int(self.ends[shard - 1]) if shard else 0)
        latents, labels = self._opened(shard)
        return latents[row, mirrored], int(labels[row])

    def _opened(self, shard: int) -> tuple[Tensor, Tensor]:
        """Return latents and labels of a file; the latents are mapped, and read when they are used."""
        files, path = self.open_files(), self.files[shard]
        if shard not in files:
            try:
                with safe_open(path, framework="pt") as file:
                    latents, labels = file.get_tensor("latents"), file.get_tensor("labels")
                got = f"shape {tuple(latents.shape)}"
            except (OSError, SafetensorError) as error:
                latents, labels, got = torch.empty(0), torch.empty(0), str(error)[:200]
            expected = (self.counts[shard], *self.item)
            remedy = "copy the file again, or prepare the latents again"
            fits = tuple(latents.shape) == expected and len(labels) == expected[0]
            require(fits, f"latents of shape {expected} in {path}", got, remedy)
            files[shard] = latents, labels
        latents, labels = files[shard]
        return latents, labels

    def batch(self, indices: list[int]) -> tuple[Float[Tensor, "b k h w"], Classes]:
        items, labels = zip(*(self[index] for index in indices), strict=True)
        return torch.stack(items), torch.tensor(labels, dtype=torch.long)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, *self.sides)

    @property
    def image_shape(self) -> tuple[int, ...]:
        assert self.latents is not None
        return self.latents.channels, self.latents.image_size, self.latents.image_size

    def training_data(
        self, batch: Float[Tensor, "b k h w"], draw: Generator, share: Share = WHOLE, *, flip: bool = False
    ) -> Data:  # fmt: skip
        """Draw a latent of each item, mean + std n, and scale it. Mirror images are entries, so nothing is mirrored."""
        if self.stored == SAMPLES:
            return self.scaling.scaled(batch.float())
        mean, std = batch.float().chunk(2, dim=1)
        shape = (share.parts * len(mean), *mean.shape[1:])
        n = torch.randn(shape, generator=draw, device=draw.device)[share.rows(len(mean))]
        return self.scaling.scaled(mean + std * n)

    def decoded(self, batch: Float[Tensor, "b k i j"]) -> Images:
        """Decode the means of the items, or the stored samples, to images."""
        assert self.latents is not None
        x_0 = self.scaling.scaled(batch[:, : self.channels].float())
        return autoencoder_of(self.latents, batch.device).images(x_0)

    def name_of(self, index: int) -> str:
        return f"{self.folder}#{index}"
