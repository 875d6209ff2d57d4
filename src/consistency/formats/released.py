"""The published files by name: `openai:cd_imagenet64_lpips`, `jcm:cd-lpips`, `edm:edm-cifar10-32x32-uncond-vp`.

A name stands wherever a checkpoint may stand. The file is fetched once, into `$CONSISTENCY_CACHE` or
`~/.cache/consistency`; a download that broke off continues where it stopped; its size is compared with what the server
announces and with what the weights must take; its checksum is kept beside it and verified at each use.
"""

import fcntl
import hashlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from consistency import caches
from consistency.errors import UserError, require
from consistency.inference.card import Role

OPENAI = "https://openaipublic.blob.core.windows.net/consistency"
JCM = f"{OPENAI}/jcm_checkpoints"
EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
TIMEOUT = 30.0
CHUNK = 1 << 20


@dataclass(frozen=True)
class Released:
    """One published file; bytes_at_least: what its weights alone take in float32."""

    url: str
    role: Role
    bytes_at_least: int


def _openai(name: str) -> Released:
    parameters = 295_899_267 if "imagenet64" in name else 526_304_771
    return Released(f"{OPENAI}/{name}.pt", _role(name), 4 * parameters)


def _jcm(name: str, number: int | None) -> Released:
    path = name if number is None else f"{name}/checkpoints/checkpoint_{number}"
    return Released(f"{JCM}/{path}", _role(name), 2 * 4 * 56_395_523)


def _edm(name: str) -> Released:
    counts = {
        "imagenet": 295_899_267,
        "cifar10": 55_733_891,
        "ffhq": 61_805_571,
        "afhqv2": 61_805_571,
    }
    parameters = counts[name.split("-")[1]]
    return Released(f"{EDM}/{name}.pkl", "teacher", 4 * parameters)


def _role(name: str) -> Role:
    return "teacher" if name.startswith("edm") else "consistency"


OPENAI_NAMES = [
    f"{method}_{data}{suffix}"
    for data in ("imagenet64", "bedroom256", "cat256")
    for method, suffix in (("edm", "_ema"), ("cd", "_l2"), ("cd", "_lpips"), ("ct", ""))
]
JCM_NUMBERS: dict[str, int | None] = {
    "edm_cifar10_ema": None,
    "cd-l1": 80,
    "cd-l2": 80,
    "cd-lpips": 80,
    "ct-lpips": 74,
    "cifar10-continuous-cd-l2": 40,
    "cifar10-continuous-cd-l2-stopgrad": 40,
    "cifar10-continuous-cd-lpips-stopgrad": 40,
    "continuous-ct-l2": 80,
    "continuous-ct-lpips": 40,
}
EDM_NAMES = [
    *(f"edm-cifar10-32x32-{cond}-{kind}" for cond in ("cond", "uncond") for kind in ("vp", "ve")),
    *(f"edm-{data}-64x64-uncond-{kind}" for data in ("ffhq", "afhqv2") for kind in ("vp", "ve")),
    "edm-imagenet-64x64-cond-adm",
]
RELEASED: dict[str, Released] = {
    **{f"openai:{name}": _openai(name) for name in OPENAI_NAMES},
    **{f"jcm:{name}": _jcm(name, number) for name, number in JCM_NUMBERS.items()},
    **{f"edm:{name}": _edm(name) for name in EDM_NAMES},
}


def is_name(checkpoint: object) -> bool:
    """Whether a checkpoint is named as a published file."""
    return str(checkpoint).startswith(("openai:", "jcm:", "edm:"))


def find(name: str) -> Released:
    """The published file of that name."""
    near = get_close_matches(name, RELEASED, n=3, cutoff=0.4)
    require(
        name in RELEASED,
        "the name of a published file (docs/checkpoints.md lists all)",
        name,
        f"perhaps {' or '.join(near)}" if near else "for example openai:cd_imagenet64_lpips",
    )
    return RELEASED[name]


def fetch(name: str) -> Path:
    """Where the published file of that name stands, after fetching it if it is not there yet."""
    released = find(name)
    path = caches.own() / name.split(":")[0] / Path(released.url).name
    if released.url.startswith(JCM):
        path = path.with_name(f"{name.split(':')[1]}.flax")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_one(path):
            if not path.is_file():
                download(released.url, path, released.bytes_at_least)
    return path


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Lets one process at a time fetch the file."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download(url: str, path: Path, bytes_at_least: int) -> None:
    """Fetches `url` to `path` and writes its checksum beside it; keeps a broken part, and continues one."""
    part, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.etag")
    try:
        expected = _receive(url, part, tag)
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
        raise UserError(
            f"expected to download {url}\n"
            f"  got: {getattr(error, 'reason', None) or error or type(error).__name__}\n"
            f"  do: run it again to continue, or fetch the file on a machine with a network and put it at {path}"
        ) from error
    size = part.stat().st_size
    complete = size == expected and size >= bytes_at_least
    if size > expected or (size == expected and not complete):
        part.unlink()
    require(
        complete,
        f"{max(expected, bytes_at_least):,} bytes from {url}",
        f"{size:,} bytes",
        "run it again; what arrived so far is kept" if size < expected else "run it again",
    )
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{found}  {path.name}\n")
    part.replace(path)
    tag.unlink(missing_ok=True)


def _receive(url: str, part: Path, tag: Path) -> int:
    """Appends what is missing to `part`; the size that the whole file should have."""
    known = tag.read_text() if tag.is_file() else ""
    have = part.stat().st_size if part.is_file() and known else 0
    request = urllib.request.Request(url, headers={"User-Agent": "consistency"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", known)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is missing
            return have
        raise
    with response:
        begins = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        going_on = response.status == 206 and begins
        have = have if going_on else 0
        length = response.headers.get("Content-Length")
        if length is None:
            raise ValueError("a server that does not say how large the file is")
        total = have + int(length)
        tag.write_text(response.headers.get("ETag", ""))
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem)
        with part.open("ab" if going_on else "wb") as file, bar:
            while piece := response.read(CHUNK):
                file.write(piece)
                bar.update(len(piece))
    return total
