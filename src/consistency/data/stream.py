"""Shards in a folder or an object store, for sets beyond one disk; format, download and reading are litdata's.

Not litdata's own iterator: its order depends on the number of processes and workers. Reading by index, in an order
that walks through the shards, makes the order, and so the position after a resume, the same for any number of them,
and a whole batch read shard by shard came no slower (64x64, one busy core: 28,000 images a second against 2,400).
"""

import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from consistency import caches
from consistency.data.source import Classes, Image, Images
from consistency.errors import UserError, require
from consistency.paths import path_of

INDEX = "index.json"
FORMATS = {"tensor", "int"}
"""litdata's names of what our shards hold. Others of its formats unpickle."""

ELSEWHERE = ("s3://", "gs://", "r2://", "azure://", "hf://", "local:")
PATIENCE_SECONDS = 300.0


def engine() -> ModuleType:
    """litdata, which is an optional extra; UserError where it is not installed."""
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    try:
        import litdata
    except ImportError as error:
        raise UserError(
            "expected the package litdata, which data=stream and prepare to=shards need\n"
            f"  got: {error}\n  do: install the extra `streaming`: pip install -e '.[streaming]'"
        ) from error
    logging.getLogger("litdata").setLevel(logging.WARNING)  # it tells of every opening
    return litdata


class Stream:
    """Images and class indices from shards that `consistency.data.shards` wrote.

    path: a folder, or the URL of an object store (s3://, gs://, r2://, azure://, hf://; local:<folder> treats a folder
    as one). mixing: how many shards lie between two neighbours of the random order at most; the process reads about as
    many at a time. cache: where downloaded shards are kept, None for a folder in the user's cache; cache_gigabytes: how
    much they may occupy there, on every machine; the shards used least recently go first. storage_options: of
    litdata's client of the object store, such as endpoint_url.

    Every machine downloads what it does not hold of every shard once an epoch, whatever the number of machines.
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
        require(
            path is not None,
            "a folder or URL of shards in data.path",
            "data.path=null",
            "add data.path=<folder, or s3://bucket/folder>; prepare to=shards writes one",
        )
        require(mixing >= 1, "data.source.mixing >= 1", mixing, "give a number of shards")
        engine()
        self.path, self.mixing = str(path), mixing
        self.options = dict(storage_options or {})
        self.remote = self.path.startswith(ELSEWHERE)
        self.folder = self._cache_folder(cache) if self.remote else path_of(self.path)
        self._opened: tuple[int, Any, Any] | None = None
        index = self._index()
        shards = index["chunks"]
        require(
            bool(shards) and not index["config"].get("compression"),
            f"uncompressed shards at data.path={path}",
            "none" if not shards else f"compression {index['config']['compression']}",
            "write them with prepare to=shards",
        )
        self.files = [str(shard["filename"]) for shard in shards]
        inside = all(Path(name).name == name and name.endswith(".bin") for name in self.files)
        require(
            inside and set(index["config"].get("data_format") or [""]) <= FORMATS,
            f"shards of {sorted(FORMATS)} at data.path={path}, each a file *.bin in that place",
            f"{index['config'].get('data_format')} in {self.files[:3]}"[:200],
            "write them with prepare to=shards; other kinds can run code or write elsewhere",
        )
        self.sizes = torch.tensor([int(shard["chunk_size"]) for shard in shards])
        self.ends = self.sizes.cumsum(0)
        self.budget = cache_gigabytes * 1e9
        needed = 2 * (mixing + 1) * max(int(shard["chunk_bytes"]) for shard in shards)
        whole = sum(int(shard["chunk_bytes"]) for shard in shards)
        require(
            not self.remote or self.budget >= min(needed, whole),
            f"data.source.cache_gigabytes of at least {min(needed, whole) / 1e9:.3g}, twice the shards read at a time",
            cache_gigabytes,
            "raise it, or lower data.source.mixing",
        )

    def _cache_folder(self, cache: str | None) -> Path:
        base = path_of(cache) if cache else caches.own() / "shards"
        folder = base / hashlib.blake2b(self.path.encode(), digest_size=8).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _index(self) -> dict[str, Any]:
        """The table of the shards; where a URL holds another one than the cache, the cache is emptied."""
        file = self.folder / INDEX
        if self.remote:
            from filelock import FileLock

            with FileLock(self.folder / "index.lock"):
                fresh = self.folder / f"fresh_{INDEX}"
                fresh.unlink(missing_ok=True)
                try:
                    self._downloader([]).download_file(
                        f"{self.path.rstrip('/')}/{INDEX}", str(fresh)
                    )
                except Exception as error:
                    raise UserError(
                        f"expected shards at data.path={self.path}\n  got: {error}\n"
                        f"  do: check the URL, the credentials and that {INDEX} lies there"
                    ) from error
                if file.is_file() and file.read_bytes() != fresh.read_bytes():
                    for shard in self.folder.glob("*.bin"):
                        shard.unlink(missing_ok=True)
                fresh.replace(file)
        require(
            file.is_file(),
            f"shards with their {INDEX} at data.path={self.path}",
            "no such file" if self.folder.is_dir() else "no such folder",
            "check the path; prepare to=shards writes a folder of shards",
        )
        index: dict[str, Any] = json.loads(file.read_text())
        return index

    def _downloader(self, shards: list[dict[str, Any]]) -> Any:
        from litdata.streaming.downloader import get_downloader

        return get_downloader(self.path, str(self.folder), shards, self.options)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Image, int]:
        images, classes = self.batch([index])
        return images[0], int(classes[0])

    def batch(self, indices: list[int]) -> tuple[Images, Classes]:
        """Items `indices`, stacked, read shard by shard."""
        reader, downloader = self._reader()
        shards = torch.searchsorted(self.ends, torch.tensor(indices), right=True).tolist()
        for shard in sorted(set(shards)):
            if self.remote:
                self._hold(shard, downloader)
            else:
                require(
                    (self.folder / self.files[shard]).is_file(),
                    f"the shard {self.files[shard]} at data.path={self.path}",
                    "no such file",
                    "write the shards again",
                )
        with warnings.catch_warnings():
            # litdata's tensors lie on the file itself; stacking copies them
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            read = {index: self._item(reader[index]) for index in sorted(set(indices))}
        images, classes = zip(*(read[index] for index in indices), strict=True)
        return torch.stack(images), torch.tensor(classes, dtype=torch.long)

    def _item(self, item: Any) -> tuple[Image, int]:
        image = item.get("image") if isinstance(item, dict) else None
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
            return image, int(item["label"])
        raise UserError(
            f"expected items of {{'image': uint8 tensor, channels x height x width, 'label': int}} at {self.path}\n"
            f"  got: {sorted(item) if isinstance(item, dict) else type(item).__name__}\n"
            "  do: write the shards with prepare to=shards"
        )

    def order(self, draw: Generator) -> Int[Tensor, "n"]:
        """A random walk through all shards: they come in random order, and an image of the shard at place p gets a
        uniform place between p and p + mixing, so that about `mixing` shards are read at a time.
        """
        places = torch.randperm(len(self.sizes), generator=draw).repeat_interleave(self.sizes)
        spread = torch.rand(len(places), generator=draw, dtype=torch.float64) * self.mixing
        return (places + spread).argsort(stable=True)

    def _reader(self) -> tuple[Any, Any]:
        """litdata's reader of the local folder and its client, own ones in every process: files open in one process
        do not survive a fork.
        """
        if self._opened is None or self._opened[0] != os.getpid():
            reader = engine().StreamingDataset(
                str(self.folder.resolve()),
                batch_decode=0,  # by default a whole run of items is decoded to give one
                max_pre_download=self.mixing + 1,  # so many shards stay mapped
            )
            shards = [{"filename": name} for name in self.files]
            downloader = self._downloader(shards) if self.remote else None
            self._opened = (os.getpid(), reader, downloader)
        return self._opened[1], self._opened[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _hold(self, shard: int, downloader: Any) -> None:
        """Waits until a shard is in the cache, fetching it unless another process does so already."""
        file, since = self.folder / self.files[shard], time.monotonic()
        fetched = False
        while not file.is_file():
            fetched = True
            try:
                downloader.download_chunk_from_index(shard)
            except Exception as error:
                raise UserError(
                    f"expected the shard {self.files[shard]} at data.path={self.path}\n  got: {error}\n"
                    "  do: check the connection and the credentials; write the shards again if it is gone"
                ) from error
            require(
                file.is_file() or time.monotonic() - since < PATIENCE_SECONDS,
                f"the shard {file.name} within {PATIENCE_SECONDS:.0f} s from another process",
                "nothing",
                f"see whether a stale {file.name}.lock lies in {self.folder}",
            )
            if not file.is_file():
                time.sleep(0.02)
        try:
            os.utime(file)  # used just now
        except FileNotFoundError:
            return self._hold(shard, downloader)
        if fetched:
            self._make_room()
        return None

    def _make_room(self) -> None:
        """Deletes the shards used least recently while all together are larger than allowed."""
        held = []
        for file in self.folder.glob("*.bin"):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            held.append((status.st_mtime_ns, status.st_size, file))
        size = sum(bytes_ for _, bytes_, _ in held)
        for _, bytes_, file in sorted(held):
            if size <= self.budget:
                return
            file.unlink(missing_ok=True)
            size -= bytes_
