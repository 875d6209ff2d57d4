"""Shards: what is written comes back, in an order that walks through them; the cache of a store keeps its bounds."""

import builtins
import http.server
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from conftest import REPORT
from consistency.data.digits import Digits
from consistency.data.module import DataModule, PositionedBatches
from consistency.data.shards import Stream, count_images, write_shards
from consistency.errors import UserError
from consistency.randomness import generator

pytest.importorskip("litdata")
COUNT = 899


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits for training in about 15 shards, written by two processes."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    source = Digits(split="train")
    assert write_shards(source, folder, num_workers=2, shard_bytes=8000, show=False) == COUNT
    return folder


def stream(path: Path | str | None, **changes: object) -> Stream:
    settings = dict(mixing=3, cache=None, cache_gigabytes=1.0)
    return Stream(path=path and str(path), **{**settings, **changes})


def test_the_digits_survive_the_way_through_shards(shards: Path) -> None:
    """All of them, in the order that was drawn when they were written, also in a process of its own."""
    digits, read = Digits(split="train"), stream(shards)
    order = torch.randperm(COUNT, generator=generator(0, "shards")).tolist()
    assert len(read) == COUNT
    assert len(read.sizes) > 10
    images, classes = read.batch(list(range(COUNT)))
    assert torch.equal(images, digits.images[order])
    assert torch.equal(classes, digits.labels[order])
    mixed, labels = pickle.loads(pickle.dumps(read)).batch([700, 3, 700, 450])
    assert torch.equal(mixed, images[[700, 3, 700, 450]])
    assert torch.equal(labels, classes[[700, 3, 700, 450]])
    assert torch.equal(read[5][0], images[5])


def test_writing_again_changes_nothing_and_never_mixes(shards: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in shards.iterdir()}
    assert write_shards(Digits(split="train"), shards, show=False) == COUNT
    with pytest.raises(UserError, match="899 images"):
        write_shards(Digits(split="held_out"), shards, show=False)
    assert {p.name: p.stat().st_mtime_ns for p in shards.iterdir()} == before
    assert count_images(shards) == COUNT
    assert count_images(shards.parent) is None


def test_a_folder_with_content_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="folder with content"):
        write_shards(Digits(split="train"), tmp_path, show=False)


class Breaking(Digits):
    """The digits, of which one cannot be read as long as a file is not there."""

    def __init__(self, mended: Path) -> None:
        super().__init__(split="train")
        self.mended = mended

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == self.labels.tolist().index(7) and not self.mended.exists():
            raise OSError("broken")
        return super().__getitem__(index)


@pytest.mark.slow
def test_an_interrupted_writing_goes_on(shards: Path, tmp_path: Path) -> None:
    """What was written stays; the shards end as those written in one go."""
    source, folder = Breaking(tmp_path / "mended"), tmp_path / "shards"
    with pytest.raises(OSError, match="broken"):
        write_shards(source, folder, shard_bytes=8000, show=False)
    assert count_images(folder) is None
    with pytest.raises(UserError, match="interrupted"):
        write_shards(source, folder, shard_bytes=9000, show=False)
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.bin")}
    source.mended.touch()
    assert write_shards(source, folder, shard_bytes=8000, show=False) == COUNT
    assert all((folder / name).stat().st_mtime_ns == time for name, time in kept.items())
    everything = list(range(COUNT))
    assert torch.equal(stream(folder).batch(everything)[0], stream(shards).batch(everything)[0])


def test_the_order_is_a_permutation_that_walks_through_the_shards(shards: Path) -> None:
    read = stream(shards)
    drawn = [read.order(torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert drawn[0].sort().values.tolist() == list(range(COUNT))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    shard = torch.searchsorted(read.ends, drawn[0], right=True)
    first = [int((shard == s).nonzero()[0]) for s in range(len(read.sizes))]
    last = [int((shard == s).nonzero()[-1]) for s in range(len(read.sizes))]
    at_once = max(sum(a <= t <= b for a, b in zip(first, last, strict=True)) for t in range(COUNT))
    assert 2 <= at_once <= read.mixing + 1


def test_batches_of_a_stream_are_those_of_its_order(shards: Path) -> None:
    module = DataModule(
        source=lambda: stream(shards), held_out=None, image_size=8, channels=1, num_classes=10,
        batch_size=100, device_batch_size=None, num_workers=0, flip=False, seed=3,
    )  # fmt: skip
    sampler = module.batches(split=module.split(1), total=8)
    assert isinstance(sampler, PositionedBatches)
    order = module.train_source.order(generator(3, "order", 0)).tolist()
    assert [i for indices in sampler for i in indices] == order[:800]
    loaded = torch.cat([images for images, _ in module.loader(sampler)])
    assert torch.equal(loaded, module.train_source.batch(order[:800])[0])


def test_the_cache_of_a_store_stays_small(shards: Path, tmp_path: Path) -> None:
    """Everything is read once in order with room for fewer shards than there are."""
    allowed = 9 * 8000 / 1e9
    read = stream(f"local:{shards}", cache=str(tmp_path), cache_gigabytes=allowed)
    order = read.order(torch.Generator().manual_seed(0)).tolist()
    local, fetched = stream(shards), set()
    for start in range(0, COUNT, 50):
        indices = order[start : start + 50]
        assert torch.equal(read.batch(indices)[0], local.batch(indices)[0])
        held = list(tmp_path.rglob("*.bin"))
        fetched |= {file.name for file in held}
        assert sum(file.stat().st_size for file in held) <= allowed * 1e9
    assert len(fetched) == len(read.sizes)


def test_shards_written_anew_replace_those_in_the_cache(shards: Path, tmp_path: Path) -> None:
    copy, cache = tmp_path / "copy", tmp_path / "cache"
    copy.mkdir()
    for file in shards.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    stream(f"local:{copy}", cache=str(cache)).batch([0, COUNT - 1])
    assert list(cache.rglob("*.bin"))
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps({**index, "updated_at": "later"}))
    stream(f"local:{copy}", cache=str(cache))
    assert not list(cache.rglob("*.bin"))


def test_shards_from_elsewhere_are_files_of_their_folder_and_hold_no_pickles(
    shards: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """What an index names would be written or read wherever it says, and unpickled; no shard is needed to refuse it."""
    whole = json.loads((shards / "index.json").read_text())
    changes: list[tuple[str, object]] = [
        *(("data_format", [kind, "int"]) for kind in ("pickle", "graph:pickle", "pil", "file", "video", "numpy")),
        ("data_format", None),
        *(("filename", f"{path}chunk-0-0.bin") for path in ("../", "/tmp/", "sub/", "../shards/", "./")),
        *(("filename", name) for name in ("", ".", "..", "index.json", "/etc/passwd")),
    ]  # fmt: skip
    for key, value in changes:
        index = json.loads(json.dumps(whole))
        (index["config"] if key == "data_format" else index["chunks"][0])[key] = value
        (tmp_path / "index.json").write_text(json.dumps(index))
        for place in (tmp_path, f"local:{tmp_path}"):
            with pytest.raises(UserError, match=r"shards of \['int', 'tensor'\]"):
                stream(place, cache=str(tmp_path / "cache"))
    record_property(REPORT, f"shards: {len(changes)} hostile indices refused, near and far")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"chunks": []}', '{"chunks": [{}], "config": {}}', '{"chunks": 1, "config": null}']
)  # fmt: skip
def test_a_damaged_table_of_shards_is_one_message(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"a table of shards .*index\.json"):
        stream(str(tmp_path))


class Store(http.server.SimpleHTTPRequestHandler):
    """As much of an object store as reading needs: GET and HEAD of /bucket/key, with ranges."""

    protocol_version = "HTTP/1.1"
    root = Path()

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        file = self.root / self.path.split("?")[0].lstrip("/")
        content = file.read_bytes() if file.is_file() else b""
        asked = self.headers.get("Range")
        start, end = 0, len(content)
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, end) if last else end
        self.send_response(404 if not file.is_file() else 206 if asked else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.wfile.write(content[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(shards: Path) -> Iterator[str]:
    """The address of a server that holds the shards as s3://bucket/shards."""
    root = shards.parent
    (root / "bucket").mkdir(exist_ok=True)
    if not (root / "bucket" / "shards").exists():
        (root / "bucket" / "shards").symlink_to(shards)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Held", (Store,), {"root": root})
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_object_store_gives_what_the_folder_gives(
    store: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # litdata's other client insists on https, which the store of the test has not
    monkeypatch.setattr("litdata.streaming.downloader._OBSTORE_AVAILABLE", False)
    options = {"endpoint_url": store}
    read = stream("s3://bucket/shards", cache=str(tmp_path), storage_options=options)
    indices = torch.randperm(COUNT)[:200].tolist()
    assert torch.equal(read.batch(indices)[0], stream(shards).batch(indices)[0])
    with pytest.raises(UserError, match="s3://bucket/nothing"):
        stream("s3://bucket/nothing", cache=str(tmp_path), storage_options=options)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"path": None}, "data.path"),
        ({"path": "/nowhere"}, "no such folder"),
        ({"mixing": 0}, "mixing"),
    ],
)
def test_what_is_wrong_is_told(shards: Path, change: dict[str, object], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        stream(**{"path": shards, **change})


def test_a_cache_too_small_for_its_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cache_gigabytes"):
        stream(f"local:{shards}", cache=str(tmp_path), cache_gigabytes=1e-6)


def test_a_shard_that_is_gone_is_named(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in shards.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    gone = sorted(copy.glob("*.bin"))[0]
    gone.unlink()
    read = stream(f"local:{copy}", cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=gone.name):
        read.batch(list(range(COUNT)))
    with pytest.raises(UserError, match=gone.name):
        stream(copy).batch(list(range(COUNT)))


def test_without_the_extra_its_name_is_told(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.split(".")[0] == "litdata":
            raise ImportError("No module named 'litdata'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="streaming"):
        stream(shards)


def test_reading_stays_right_after_a_fork(shards: Path) -> None:
    read = stream(shards)
    expected = read.batch([1, 800])[0]
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        same = torch.equal(read.batch([1, 800])[0], expected)
        os.write(send, b"y" if same else b"n")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(receive, 1) == b"y"
