"""The published files by name, such as `openai:cd_imagenet64_lpips`, `jcm:cd-lpips`, `edm2:edm2-img64-s-1073741-0.075`.

A name is accepted in place of any checkpoint. The file is downloaded once, into `$CONSISTENCY_CACHE` or
`~/.cache/consistency`; a broken download continues at its end; its size is compared with that of the server's file and
with that of the weights; its checksum is kept beside it and verified at each use.
"""

import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path

from consistency.errors import UserError, require
from consistency.inference.card import Role
from consistency.runtime.files import cache_folder, fingerprint, locked, part_path, write_checksum

OPENAI = "https://openaipublic.blob.core.windows.net/consistency"
PROGRAMS = {
    "openai:": OPENAI,
    "jcm:": f"{OPENAI}/jcm_checkpoints",
    "edm:": "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained",
    "edm2:": "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions",
}
"""Beginnings of names -> the address of the files."""
LICENCES = {
    **dict.fromkeys(("edm:", "edm2:"), "cc-by-nc-sa-4.0"),
    **{"openai:": "mit", "jcm:": "apache-2.0"},
}
"""Beginnings of names -> the licence of the weights, as the Hugging Face Hub spells it; docs/checkpoints.md has their sources."""

FILES = {
    ("openai:", "%s.pt", 295_899_267): """
        edm_imagenet64_ema cd_imagenet64_l2 cd_imagenet64_lpips ct_imagenet64""",
    ("openai:", "%s.pt", 526_304_771): """
        edm_bedroom256_ema cd_bedroom256_l2 cd_bedroom256_lpips ct_bedroom256
        edm_cat256_ema cd_cat256_l2 cd_cat256_lpips ct_cat256""",
    ("jcm:", "%s", 112_791_046): "edm_cifar10_ema",
    ("jcm:", "%s/checkpoints/checkpoint_80", 112_791_046): "cd-l1 cd-l2 cd-lpips continuous-ct-l2",
    ("jcm:", "%s/checkpoints/checkpoint_74", 112_791_046): "ct-lpips",
    ("jcm:", "%s/checkpoints/checkpoint_40", 112_791_046): """
        continuous-ct-lpips cifar10-continuous-cd-l2
        cifar10-continuous-cd-l2-stopgrad cifar10-continuous-cd-lpips-stopgrad""",
    ("edm:", "%s.pkl", 295_899_267): "edm-imagenet-64x64-cond-adm",
    ("edm:", "%s.pkl", 55_733_891): """
        edm-cifar10-32x32-cond-vp edm-cifar10-32x32-uncond-vp
        edm-cifar10-32x32-cond-ve edm-cifar10-32x32-uncond-ve""",
    ("edm:", "%s.pkl", 61_805_571): """
        edm-ffhq-64x64-uncond-vp edm-afhqv2-64x64-uncond-vp
        edm-ffhq-64x64-uncond-ve edm-afhqv2-64x64-uncond-ve""",
    ("edm2:", "%s.pkl", 280_209_381): "edm2-img64-s-1073741-0.075",
    ("edm2:", "%s.pkl", 497_803_173): "edm2-img64-m-2147483-0.060",
    ("edm2:", "%s.pkl", 777_492_325): "edm2-img64-l-1073741-0.040",
    ("edm2:", "%s.pkl", 1_119_276_837): "edm2-img64-xl-0671088-0.040",
    ("edm2:", "%s.pkl", 124_713_253): "edm2-img512-xs-2147483-0.135",
    ("edm2:", "%s.pkl", 280_212_837): "edm2-img512-s-2147483-0.130",
    ("edm2:", "%s.pkl", 497_807_781): "edm2-img512-m-2147483-0.100",
    ("edm2:", "%s.pkl", 777_498_085): "edm2-img512-l-1879048-0.085",
    ("edm2:", "%s.pkl", 1_119_283_749): "edm2-img512-xl-1342177-0.085",
    ("edm2:", "%s.pkl", 1_523_164_773): "edm2-img512-xxl-0939524-0.070",
}
"""Program, path and number of weights of the published files -> their names."""


@dataclass(frozen=True)
class Released:
    """One published file; bytes_at_least: size of its weights alone."""

    url: str
    role: Role
    bytes_at_least: int


RELEASED = {
    f"{program}{name}": Released(
        url=f"{PROGRAMS[program]}/{path % name}",
        role="teacher" if name.startswith("edm") else "consistency",
        bytes_at_least=(2 if program == "edm2:" else 4) * count,  # EDM2's are in half precision
    )
    for (program, path, count), names in FILES.items()
    for name in names.split()
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
    file = f"{title}.flax" if program == "jcm" else Path(released.url).name
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
        response = urllib.request.urlopen(request, timeout=30.0)
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
        bar = {"total": total, "initial": have, "desc": part.stem}
        with (
            part.open("ab" if continues else "wb") as file,
            tqdm.wrapattr(file, "write", **bar) as counted,
        ):
            shutil.copyfileobj(response, counted, 1 << 20)
    return total
