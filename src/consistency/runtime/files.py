"""Paths as people give them, caches, and files that are written whole, with a checksum beside: last.ckpt.sha256."""

import atexit
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from consistency.errors import require

ROOT = Path(__file__).resolve().parents[3]

BASES = {
    "XDG_CACHE_HOME": ("~/.cache", "consistency"),
    "XDG_CONFIG_HOME": ("~/.config", "matplotlib"),
    "XDG_DATA_HOME": ("~/.local/share", "wandb"),
    "TRITON_HOME": ("~", ".triton"),
}
"""By variable: its default, and a folder made there. torch hub, Hugging Face, fontconfig and others read the first three."""


def commit() -> str | None:
    """Return the git commit of this code, or None for a copy without one."""
    try:
        call = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def expanded(text: str) -> str:
    """Expand ~ at the front to the home folder, unless a file has exactly this name."""
    return text if os.path.lexists(text) else os.path.expanduser(text)


def path_of(path: str | os.PathLike[str]) -> Path:
    """Return the path that a person means."""
    return Path(expanded(os.fspath(path)))


def require_fresh(
    folder: Path, remedy: str = "choose another output=, or move the old one away"
) -> None:
    """Refuse to write into a folder with content."""
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"a new or empty folder to write to at output={folder}",
        "a folder with content" if folder.is_dir() else "a file",
        remedy,
    )


def part_path(path: Path) -> Path:
    """Return the path at which a file is written before it is renamed."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def written_whole(path: Path, *, checksum: bool = False) -> Iterator[IO[bytes]]:
    """Yield a binary file, for reading and writing, that is renamed to `path` when the body ends and it is on the disk.

    If the body, the disk or the renaming fails, `path` is as it was and the unfinished file is removed. If the process
    dies, `path` is the old file or the new one, whole. Its folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(path)
    try:
        with part.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if checksum:
            move(part, path)
        else:
            part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock `file`, which one process of a machine can hold at a time."""
    from filelock import FileLock  # a part of it that another system lacks is missing until then

    with FileLock(file):
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode())


def move(old: Path, new: Path) -> None:
    """Rename a file together with its checksum, which is made if it is missing.

    At no moment a file stands beside the checksum of another, and what needs room on the disk comes first.
    """
    beside, replaced = checksum_path(old), checksum_path(new)
    digest = beside.read_text().split()[0] if beside.is_file() else fingerprint(old)
    with written_whole(replaced) as stamp:
        stamp.write(f"{digest}  {new.name}\n".encode())
        stamp.flush()
        replaced.unlink(missing_ok=True)
        old.replace(new)
    beside.unlink(missing_ok=True)


def checksum_path(path: Path) -> Path:
    """Return the path of a file's checksum."""
    return path.with_name(f"{path.name}.sha256")


def write_checksum(path: Path, digest: str) -> None:
    """Write a checksum beside its file, in the form of sha256sum."""
    write_text(checksum_path(path), f"{digest}  {path.name}\n")


def verify_checksum(path: Path) -> None:
    """Refuse a file that differs from the checksum beside it; accept one without a checksum."""
    beside = checksum_path(path)
    if path.is_file() and beside.is_file():
        require(
            beside.read_bytes().split()[:1] == [fingerprint(path).encode()],
            f"{path} as it was written (its checksum is in {beside.name})",
            "a file that has changed or is damaged",
            "take previous.ckpt or best.ckpt beside it, or fetch the file again",
        )


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file; of a folder, that of the names and digests of all its files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    lines = [f"{fingerprint(p)}  {p.relative_to(path).as_posix()}\n" for p in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def cache_folder() -> Path:
    """Return the folder of our own cache: downloads, references, shards."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "consistency")
    return Path(os.path.expanduser(os.environ.get("CONSISTENCY_CACHE") or default))


def settle_caches() -> None:
    """Point bases that cannot be written, as in a container without a home, to one temporary folder of this process."""
    variables = [name for name, base in BASES.items() if not _is_writable(name, *base)]
    if not os.path.isabs(os.path.expanduser("~")):  # an unknown user, for whom libraries fail
        variables.append("HOME")
    if not variables:
        return
    with suppress(OSError):  # without any writable folder, what needs a cache fails by itself
        folder = tempfile.mkdtemp(prefix="consistency-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ.update(dict.fromkeys(variables, folder))


def _is_writable(variable: str, default: str, inside: str) -> bool:
    """Try to write a file: permissions say little to root and of mounted folders."""
    folder = Path(os.path.expanduser(os.environ.get(variable) or default), inside)
    if folder.is_absolute():
        nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with suppress(OSError), tempfile.TemporaryFile(dir=nearest):
            return True
    return False
