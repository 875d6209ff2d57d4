"""Shards in a folder or an object store, for sets beyond one disk; format, download and reading are litdata's.

The order of litdata's own iterator depends on the number of processes and workers. Reading by index, in an order that
walks through the shards, makes the order, and so the position after a resume, the same for any number of them. It is
no slower: 28,000 images of 64x64 a second on one busy core, against 2,400.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from consistency.data.parallel import PerProcess, write_missing
from consistency.data.source import Classes, Image, Images, Source, required_path
from consistency.errors import UserError, require
from consistency.randomness import generator
from consistency.runtime.files import cache_folder, locked, path_of, write_text

INDEX = "index.json"
UNFINISHED = "unfinished.json"  # in a folder of incomplete shards: their settings
PART = "part_"  # begins the names of folders of shards that are being written
FORMATS = {"tensor", "int"}  # of litdata, in our shards; others unpickle
REMOTE = ("s3://", "gs://", "r2://", "azure://", "hf://", "local:")
WRITE = "write them with prepare to=shards"


def engine() -> ModuleType:
    """Import litdata, which is an optional extra."""
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    try:
        import litdata
    except ImportError as error:
        expected = "the package litdata, which data=stream and prepare to=shards need"
        remedy = "install the extra `streaming`: pip install -e '.[streaming]'"
        raise UserError(expected, error, remedy) from error
    logging.getLogger("litdata").setLevel(logging.WARNING)
    return litdata


class Stream(Source):
    """Images and class indices from shards that `write_shards` wrote; conf/data/stream.yaml has the arguments.

    Every machine downloads the shards that its cache lacks once an epoch, whatever the number of machines.

    path: a folder, or a URL that begins with one of `REMOTE`; local:<folder> treats a folder as an object store.
    """

    def __init__(
        self,
        *,
        path: str | None,
        mixing: int,
        cache: str | None,
        cache_gigabytes: float,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = required_path(path, "a folder or URL of shards", exists=False)
        require(mixing >= 1, "data.source.mixing >= 1", mixing, "give a number of shards")
        engine()
        self.path, self.mixing, self.budget = str(path), mixing, cache_gigabytes * 1e9
        self.storage_options = dict(storage_options or {})
        self.reader, self.downloader = PerProcess(self._reader), PerProcess(self._downloader)
        self.remote = self.path.startswith(REMOTE)
        if self.remote:
            base = path_of(cache) if cache else cache_folder() / "shards"
            self.folder = base / hashlib.blake2b(self.path.encode(), digest_size=8).hexdigest()
            self._download_index()
        shards = self._checked_shards()
        self.files, sizes, bytes_ = ([shard[n] for shard in shards] for n in range(3))
        self.sizes = torch.tensor(sizes)
        self.ends = self.sizes.cumsum(0)
        least = min(2 * (mixing + 1) * max(bytes_), sum(bytes_))
        expected = f"data.source.cache_gigabytes of at least {least / 1e9:.3g}, twice the shards read at a time"
        large = not self.remote or self.budget >= least
        require(large, expected, cache_gigabytes, "raise it, or lower data.source.mixing")

    def _require(self, file: Path, *, download: bool = False) -> None:
        """Refuse a missing file of the shards, after an attempt to download it."""
        got: object = "no such file" if file.parent.is_dir() else "no such folder"
        if download:
            try:
                self.downloader().download_file(f"{self.path.rstrip('/')}/{file.name}", str(file))
            except Exception as error:  # of the client of the store
                got = error
        remedy = "check path, connection and credentials; prepare to=shards writes shards"
        require(file.is_file(), f"shards with {file.name} at data.path={self.path}", got, remedy)

    def _download_index(self) -> None:
        """Download the table of the shards; if it differs from that in the cache, empty the cache."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / INDEX
        with locked(self.folder / "index.lock"), TemporaryDirectory(dir=self.folder) as folder:
            fresh = Path(folder) / INDEX
            self._require(fresh, download=True)
            if file.is_file() and file.read_bytes() != fresh.read_bytes():
                for shard in self.folder.glob("*.bin"):
                    shard.unlink(missing_ok=True)
            fresh.replace(file)

    def _checked_shards(self) -> list[Any]:
        """Return name, images and bytes of the shards in their table; refuse shards that run code or lie elsewhere."""
        file, at = self.folder / INDEX, f"at data.path={self.path}"
        self._require(file)
        shards: list[Any]
        try:
            index = json.loads(file.read_text())
            packed, kinds = (index["config"].get(name) for name in ("compression", "data_format"))
            sizes = ("chunk_size", "chunk_bytes")
            shards = [(str(s["filename"]), *(int(s[n]) for n in sizes)) for s in index["chunks"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            got = f"a damaged or incomplete one ({type(error).__name__}: {error})"[:200]
            raise UserError(
                f"a table of shards {file}", got, f"copy it again, or {WRITE}"
            ) from error
        names = [name for name, *_ in shards]
        inside = all(Path(name).name == name and name.endswith(".bin") for name in names)
        expected = f"uncompressed shards of {sorted(FORMATS)} {at}, each a file *.bin in it"
        got = f"{kinds} in {names[:3]}, compression {packed}"[:200]
        remedy = f"{WRITE}; other kinds can run code or write elsewhere"
        known = set(kinds or [""]) <= FORMATS and not packed
        require(bool(names) and inside and known, expected, got, remedy)
        return shards

    def _downloader(self) -> Any:
        get = engine().streaming.downloader.get_downloader
        return get(self.path, str(self.folder), [], self.storage_options)

    def _reader(self) -> Any:
        # one item is decoded at a time, not a run of them, and so many shards stay mapped
        options = {"batch_decode": 0, "max_pre_download": self.mixing + 1}
        return engine().StreamingDataset(str(self.folder.resolve()), **options)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Image, int]:
        images, classes = self.batch([index])
        return images[0], int(classes[0])

    def batch(self, indices: list[int]) -> tuple[Images, Classes]:
        """Return items `indices`, stacked, read shard by shard."""
        shards = torch.searchsorted(self.ends, torch.tensor(indices), right=True)
        for shard in shards.unique().tolist():
            self._provide(self.folder / self.files[shard])
        reader = self.reader()
        with warnings.catch_warnings():
            # litdata's tensors lie on the file itself; stacking copies them
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            items = {index: self._item(reader[index]) for index in sorted(set(indices))}
        images, classes = zip(*(items[index] for index in indices), strict=True)
        return torch.stack(images), torch.tensor(classes, dtype=torch.long)

    def _item(self, item: Any) -> tuple[Image, int]:
        image: Any = item.get("image") if isinstance(item, dict) else None
        fits = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3
        form = "{'image': uint8 tensor, channels x height x width, 'label': int}"
        require(fits, f"items of {form} at {self.path}", getattr(image, "dtype", type(item)), WRITE)
        return image, int(item["label"])

    def order(self, draw: Generator) -> Int[Tensor, "n"]:
        """Draw a random walk through all shards.

        The shards come in random order, and an image of shard number p of that order gets a uniform position between p
        and p + mixing, so that about `mixing` shards are read at a time.
        """
        number = torch.randperm(len(self.sizes), generator=draw).repeat_interleave(self.sizes)
        spread = torch.rand(len(number), generator=draw, dtype=torch.float64) * self.mixing
        return (number + spread).argsort(stable=True)

    def _provide(self, file: Path) -> None:
        """Refuse a missing shard of a folder; download one of a store."""
        if not self.remote:
            self._require(file)
            return
        with suppress(FileNotFoundError):
            os.utime(file)  # the time of last use
            return
        with locked(file.with_suffix(".lock")):
            if not file.is_file():
                self._require(file, download=True)
                self._make_room()

    def _make_room(self) -> None:
        """Delete the shards used least recently while all together are larger than allowed."""
        with locked(self.folder / "index.lock"):
            cached = [(file.stat(), file) for file in self.folder.glob("*.bin")]
            size = sum(status.st_size for status, _ in cached)
            for status, file in sorted(cached, key=lambda pair: pair[0].st_mtime_ns):
                if size > self.budget:
                    file.unlink()
                    size -= status.st_size


def write_shards(
    source: Source,
    folder: Path,
    *,
    num_workers: int | None = None,
    shard_bytes: int = 64_000_000,
    seed: int = 0,
    show: bool = True,
) -> int:
    """Write all images of a source, which must be picklable, and return their number.

    The order is drawn from `seed`, because a stream mixes only neighbouring shards, and a set may be sorted by class.
    Shards do not depend on the number of workers. Complete ones of as many images stay, and an interrupted call with the
    same settings is continued; other folders are refused. Call it under `if __name__ == "__main__"`: it starts processes.
    """
    engine()
    count, present = len(source), count_images(folder)
    require(count >= 1, "a source with images", "none", "check its path")
    if present == count:
        return count
    unfinished, settings = folder / UNFINISHED, [count, shard_bytes, seed]
    same, got = True, "interrupted shards, made otherwise"
    if unfinished.is_file():
        same = json.loads(unfinished.read_text()) == settings
    elif folder.exists() and any(folder.iterdir()):
        same, got = False, f"shards of {present} images" if present else "a folder with content"
    expected = f"output={folder} to be new, or begun from the same images with the same settings"
    require(same, expected, got, "choose another output=, or move the old one away")
    write_text(unfinished, json.dumps(settings))
    for part in folder.glob(f"{PART}*"):
        shutil.rmtree(part)
    order = torch.randperm(count, generator=generator(seed, "shards")).tolist()
    item, _ = _writer(folder, shard_bytes, 0).serialize(_stored(source, order[0]))
    each, positions = max(1, shard_bytes // len(item)), range(count)
    spans = {folder / f"{n // each}.json": positions[n : n + each] for n in positions[::each]}
    write = partial(_write_shard, source, order, shard_bytes)
    files = [*write_missing(spans, write, workers=num_workers, title="writing", show=show)]
    indices = [json.loads(file.read_text()) for file in files]
    shards = [shard for index in indices for shard in index["chunks"]]
    write_text(folder / INDEX, json.dumps({"chunks": shards, "config": indices[0]["config"]}))
    for file in [*files, unfinished]:
        file.unlink()
    return count


def count_images(folder: Path) -> int | None:
    """Return the number of images in a folder of complete shards, None for other folders."""
    file = folder / INDEX
    if (folder / UNFINISHED).exists() or not file.is_file():
        return None
    return sum(int(shard["chunk_size"]) for shard in json.loads(file.read_text())["chunks"])


def _write_shard(
    source: Source, order: Sequence[int], shard_bytes: int, span: range, file: Path
) -> None:
    """Write the images at positions `span` of the order as a shard, and then `file`, which describes it."""
    with TemporaryDirectory(dir=file.parent, prefix=PART) as part:
        writer = _writer(Path(part), shard_bytes, int(file.stem))
        for position in span:
            writer.add_item(position, _stored(source, order[position]))
        writer.done()
        (shard,), (index,) = Path(part).glob("*.bin"), Path(part).glob("*.json")
        os.replace(shard, file.with_name(shard.name))
        os.replace(index, file)


def _writer(folder: Path, shard_bytes: int, number: int) -> Any:
    writer = engine().streaming.writer.BinaryWriter
    return writer(str(folder), chunk_bytes=shard_bytes, chunk_index=number)


def _stored(source: Source, index: int) -> dict[str, Any]:
    image, label = source[index]
    return {"image": image.contiguous(), "label": int(label)}
