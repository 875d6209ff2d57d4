"""A file is written whole or not at all, and never stands beside the checksum of another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from consistency.errors import UserError
from consistency.runtime import files
from consistency.runtime.files import checksum_path, move, verify_checksum, written_whole


def write(path: Path, content: bytes, *, checksum: bool = False) -> None:
    with written_whole(path, checksum=checksum) as file:
        file.write(content)


def test_a_file_is_written_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.npz"
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_body_that_fails_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "b.npz"
    write(path, b"old")
    with pytest.raises(error), written_whole(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_that_dies_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "b.npz"
    write(path, b"old")
    code = (
        "import os, sys; from pathlib import Path; from consistency.runtime.files import written_whole\n"
        "with written_whole(Path(sys.argv[1])) as file: file.write(b'half'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert path.read_bytes() == b"old"
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(number: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "b.npz", b"new")
    assert not list(tmp_path.iterdir())


def test_a_checksum_moves_with_its_file(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write(one, b"1", checksum=True)
    write(other, b"2", checksum=True)
    move(one, other)
    assert other.read_bytes() == b"1"
    verify_checksum(other)
    assert sorted(tmp_path.iterdir()) == [other, checksum_path(other)]
    assert checksum_path(other).read_text() == f"{files.fingerprint(other)}  other\n"
    other.write_bytes(b"3")
    with pytest.raises(UserError, match="changed or is damaged"):
        verify_checksum(other)
