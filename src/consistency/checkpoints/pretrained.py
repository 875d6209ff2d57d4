"""The published files by name: `openai:cd_imagenet64_lpips`, `jcm:cd-lpips`, `edm:edm-cifar10-32x32-uncond-vp`.

A name is accepted in place of any checkpoint. The file is downloaded once, into `$CONSISTENCY_CACHE` or
`~/.cache/consistency`; a broken download continues at its end; its size is compared with that of the server's file and
with that of the weights; its checksum is kept beside it and verified at each use.
"""

import urllib.error
import urllib.request
from dataclasses import dataclass
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path

from consistency.errors import UserError, require
from consistency.inference.card import Role
from consistency.runtime.files import cache_folder, fingerprint, locked, part_path, write_checksum

PROGRAMS = ("openai:", "jcm:", "edm:")
OPENAI = "https://openaipublic.blob.core.windows.net/consistency"
JCM = f"{OPENAI}/jcm_checkpoints"
EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
TIMEOUT = 30.0
CHUNK = 1 << 20


@dataclass(frozen=True)
class Released:
    """One published file; bytes_at_least: size of its weights alone in float32."""

    url: str
    role: Role
    bytes_at_least: int


OPENAI_NAMES = [
    f"{method}_{data}{suffix}"
    for data in ("imagenet64", "bedroom256", "cat256")
    for method, suffix in (("edm", "_ema"), ("cd", "_l2"), ("cd", "_lpips"), ("ct", ""))
]
JCM_STEPS = {
    **{"cd-l1": 80, "cd-l2": 80, "cd-lpips": 80, "ct-lpips": 74, "continuous-ct-l2": 80},
    **{"continuous-ct-lpips": 40, "cifar10-continuous-cd-l2": 40},
    **{f"cifar10-continuous-cd-{d}-stopgrad": 40 for d in ("l2", "lpips")},
}
JCM_PATHS = {
    "edm_cifar10_ema": "",
    **{name: f"/checkpoints/checkpoint_{step}" for name, step in JCM_STEPS.items()},
}
EDM_NAMES = [
    *(f"edm-cifar10-32x32-{cond}-{kind}" for cond in ("cond", "uncond") for kind in ("vp", "ve")),
    *(f"edm-{data}-64x64-uncond-{kind}" for data in ("ffhq", "afhqv2") for kind in ("vp", "ve")),
    "edm-imagenet-64x64-cond-adm",
]
PARAMETERS = {
    "openai:imagenet64": 295_899_267,
    "openai:": 526_304_771,
    "jcm:": 2 * 56_395_523,
    "edm:imagenet": 295_899_267,
    "edm:cifar10": 55_733_891,
    "edm:": 61_805_571,
}
"""Numbers that a published file holds, by its program and the data in its name."""


def _released(program: str, name: str, url: str) -> Released:
    counts = {k.removeprefix(program): n for k, n in PARAMETERS.items() if k.startswith(program)}
    count = next(n for data, n in counts.items() if data in name)
    return Released(url, "teacher" if name.startswith("edm") else "consistency", 4 * count)


RELEASED: dict[str, Released] = {
    **{
        f"openai:{name}": _released("openai:", name, f"{OPENAI}/{name}.pt") for name in OPENAI_NAMES
    },
    **{f"jcm:{n}": _released("jcm:", n, f"{JCM}/{n}{path}") for n, path in JCM_PATHS.items()},
    **{f"edm:{name}": _released("edm:", name, f"{EDM}/{name}.pkl") for name in EDM_NAMES},
}


def fetch(name: str) -> Path:
    """Return the path of the published file of that name; download it, one process at a time, if it is missing."""
    near = get_close_matches(name, RELEASED, n=3, cutoff=0.4)
    require(
        name in RELEASED,
        "the name of a published file (docs/checkpoints.md lists all)",
        name,
        f"perhaps {' or '.join(near)}" if near else "for example openai:cd_imagenet64_lpips",
    )
    released, (program, title) = RELEASED[name], name.split(":")
    file = f"{title}.flax" if released.url.startswith(JCM) else Path(released.url).name
    path = cache_folder() / program / file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock")):
            if not path.is_file():
                download(released.url, path, released.bytes_at_least)
    return path


def download(url: str, path: Path, bytes_at_least: int) -> None:
    """Download `url` to `path` and write its checksum beside it; keep a broken part, and continue one."""
    part, tag = part_path(path), path.with_name(f"{path.name}.etag")
    try:
        expected = _receive(url, part, tag)
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
        raise UserError(
            f"to download {url}",
            getattr(error, "reason", None) or error or type(error).__name__,
            f"run it again to continue, or fetch the file on a machine with a network and put it at {path}",
        ) from error
    size = part.stat().st_size
    if size > expected or size == expected < bytes_at_least:
        part.unlink()
    require(
        size == expected >= bytes_at_least,
        f"{max(expected, bytes_at_least):,} bytes from {url}",
        f"{size:,} bytes",
        "run it again; what arrived so far is kept" if size < expected else "run it again",
    )
    write_checksum(path, fingerprint(part))
    part.replace(path)
    tag.unlink(missing_ok=True)


def _receive(url: str, part: Path, tag: Path) -> int:
    """Append the missing bytes to `part`; return the size of the whole file.

    tag: file with the server's name of the version that `part` is from.
    """
    from tqdm import tqdm  # not needed to load a checkpoint

    known = tag.read_text() if tag.is_file() else ""
    have = part.stat().st_size if part.is_file() and known else 0
    rest = {"Range": f"bytes={have}-", "If-Range": known} if have else {}
    request = urllib.request.Request(url, headers={"User-Agent": "consistency", **rest})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is missing
            return have
        raise
    with response:
        headers = response.headers
        begins = headers.get("Content-Range", "").startswith(f"bytes {have}-")
        continues = response.status == 206 and begins
        have = have if continues else 0
        if "Content-Length" not in headers:
            raise ValueError("a server that does not send the size of the file")
        total = have + int(headers["Content-Length"])
        tag.write_text(headers.get("ETag", ""))
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem)
        with part.open("ab" if continues else "wb") as file, bar:
            while piece := response.read(CHUNK):
                file.write(piece)
                bar.update(len(piece))
    return total
