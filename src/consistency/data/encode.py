"""Latents of a source of images, written once: `consistency.data.latents` reads them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image as PILImage
from safetensors.torch import save
from torch import Tensor

from consistency.data.chunks import Chunks, ChunkWriter, ImageFacts
from consistency.data.decode import to_tensor
from consistency.data.latents import MOMENTS, TABLE
from consistency.data.parallel import PerProcess
from consistency.errors import require
from consistency.inference.autoencoder import Autoencoder, opened
from consistency.inference.card import LatentSpace
from consistency.randomness import generator
from consistency.runtime.devices import share_threads
from consistency.runtime.files import write_text, written_whole

TYPES = {"float16": torch.float16, "float32": torch.float32}
AT_ONCE = 32  # images that are encoded while threads decode the next


@dataclass(frozen=True)
class LatentWriter(ChunkWriter):
    """Chunks that are .safetensors of latents, each with its facts in a .json beside it, which is written last.

    settings: `sha256`, `scaling`, `flip`, `store`, `dtype` and `seed` too.
    autoencoder: its folder or name. device: of all processes. processes: their number; `rank` is that of one.
    """

    autoencoder: str
    device: torch.device
    processes: int
    rank: PerProcess[int]
    title, suffix = "encoding", ".json"

    def encoder(self, device: torch.device) -> Autoencoder:
        """Open the autoencoder."""
        return opened(self.autoencoder, self.settings["sha256"], self.settings["scaling"], device)

    def own_device(self) -> torch.device:
        """Return the device of this process, one of several, and give it its share of the CPU."""
        if self.processes == 1:
            return self.device
        share_threads(self.device, self.processes)
        rank = self.rank()
        return self.device if self.device.type == "cpu" else torch.device(self.device.type, rank)

    def write(self, span: range, file: Path) -> None:
        images, bad, latents, labels = list[ImageFacts](), list[str](), list[Tensor](), list[int]()
        encoder, sums = self.encoder(self.own_device()), list[Tensor]()
        with ThreadPool() as pool:
            reads = pool.imap(self.read, span)
            while group := list(islice(reads, AT_ONCE)):
                bad += [read for read in group if isinstance(read, str)]
                usable = [read for read in group if not isinstance(read, str)]
                images += [facts for _, facts in usable]
                for facts in images[len(images) - len(usable) :]:
                    facts.require_alike(images[0])
                if usable:
                    stored, added = self.encoded(encoder, usable)
                    latents.append(stored)
                    labels += [facts.label for _, facts in usable]
                    sums.append(added)
        if latents:
            tensors = {"latents": torch.cat(latents), "labels": torch.tensor(labels)}
            with written_whole(file.with_suffix(".safetensors")) as whole:
                whole.write(save(tensors))
        content: dict[str, Any] = {"images": [vars(image) for image in images], "bad": bad}
        content["sums"] = torch.stack(sums).sum(0).tolist() if sums else []
        write_text(file, json.dumps(content))

    def encoded(
        self, encoder: Autoencoder, usable: Sequence[tuple[PILImage.Image, ImageFacts]]
    ) -> tuple[Float[Tensor, "n o k h w"], Float[Tensor, "2 c"]]:
        """Return what is stored of the images, and sums over pixels of x_0 and of its square, for the summary."""
        pixels = torch.stack([to_tensor(image) for image, _ in usable])
        side, factor = pixels.shape[2], encoder.factor
        expected = f"images whose side is a multiple of {factor}, by which the autoencoder divides"
        require(side % factor == 0, expected, side, "add resolution=256, for example")
        mirrored = [pixels, pixels.flip(-1)] if self.settings["flip"] else [pixels]
        parts, sums = [], torch.zeros(2, encoder.channels, dtype=torch.float64)
        for orientation, seen in enumerate(mirrored):
            mean, std = encoder.moments(encoder.scaling.from_uint8(seen.to(encoder.device)))
            x_0, spread = encoder.scaling.scaled(mean), encoder.scaling.factor.to(std) * std
            squares = x_0.double().square() + spread.double().square()
            sums += torch.stack([x_0.double().sum((0, 2, 3)), squares.sum((0, 2, 3))]).cpu()
            mean, std = mean.cpu(), std.cpu()
            if self.settings["store"] == MOMENTS:
                parts.append(torch.cat([mean, std], 1))
            else:
                numbers = [facts.index for _, facts in usable]
                parts.append(mean + std * self.noise(numbers, orientation, mean.shape[1:]))
        return torch.stack(parts, 1).to(TYPES[self.settings["dtype"]]), sums

    def noise(self, numbers: Sequence[int], orientation: int, shape: Sequence[int]) -> Tensor:
        """Draw the noise of stored samples, of each image by its number."""
        seed = self.settings["seed"]
        draws = (generator(seed, "latent", number, orientation) for number in numbers)
        return torch.stack([torch.randn(*shape, generator=draw) for draw in draws])

    def facts(self, file: Path) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(file.read_text())
        return facts

    def finish(self, chunks: Chunks, target: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the table of all chunks, and rename their folder to `target`. Return the facts with those of the latents."""
        folder, counts, sums = next(iter(chunks)).parent, [], list[Tensor]()
        for file, images in chunks.items():
            if images:
                counts.append((file.with_suffix(".safetensors").name, len(images)))
                sums.append(torch.tensor(self.facts(file)["sums"], dtype=torch.float64))
        for left in {*folder.iterdir()} - {folder / name for name, _ in counts}:
            left.unlink()
        settings, side = self.settings, facts["resolution"]
        encoder = self.encoder(torch.device("cpu"))
        orientations, latent_side = 2 if settings["flip"] else 1, side // encoder.factor
        pixels = facts["count"] * orientations * latent_side**2
        total, squares = torch.stack(sums).sum(0) / pixels
        space = LatentSpace(
            autoencoder=self.autoencoder, sha256=settings["sha256"], scaling=settings["scaling"],
            channels=facts["channels"], image_size=side,
        )  # fmt: skip
        facts = facts | {
            "latents": vars(space),
            "shape": [encoder.channels, latent_side, latent_side],
            "stored": settings["store"],
            "orientations": orientations,
            "class_names": list(self.source.class_names),
            "means": total.round(decimals=4).tolist(),
            "deviations": (squares - total.square()).sqrt().round(decimals=4).tolist(),
            "files": counts,
        }
        write_text(folder / TABLE, json.dumps(facts))
        folder.replace(target)
        return facts
