"""prepare.py that is killed leaves no process behind, and goes on when it is run again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import originals
from conftest import ROOT
from consistency.data.shards import count_images
from originals import encoded, noise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]
SECONDS = 60.0
"""In which all must be gone. On a busy machine a process that has just been started takes most of them to notice."""

WRITER = """
import sys, time
from pathlib import Path
from consistency.data.digits import Digits
from consistency.data.shards import write_shards

class Slow(Digits):
    def __getitem__(self, index):
        Path(sys.argv[2], str(index)).touch()
        time.sleep(0.02)
        return super().__getitem__(index)

if __name__ == "__main__":
    write_shards(Slow(split="train"), Path(sys.argv[1]), num_workers=2, shard_bytes=8000, show=False)
"""


def group(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait(condition: object, seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.05)


def start(*command: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], start_new_session=True, env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_writing_shards_ends_with_all_its_processes_and_goes_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    pytest.importorskip("litdata")
    script, read, folder = tmp_path / "writer.py", tmp_path / "read", tmp_path / "shards"
    script.write_text(WRITER)
    read.mkdir()
    running = start(str(script), str(folder), str(read))
    wait(lambda: len(list(read.iterdir())) > 100)
    os.kill(running.pid, number)  # this one alone, as a scheduler or the kernel does
    assert running.wait(SECONDS) != 0
    wait(lambda: not group(running.pid), SECONDS)
    assert len(list(read.iterdir())) < 899
    assert count_images(folder) is None
    again = start(str(script), str(folder), str(read))
    assert again.wait(180) == 0
    assert count_images(folder) == 899


def test_preparing_ends_with_all_its_processes_and_goes_on(tmp_path: Path) -> None:
    picture = encoded(Image.fromarray(noise(256, 256, 3)))
    originals.write_files(tmp_path / "set", {f"{n:04d}.png": picture for n in range(3000)})
    command = [str(ROOT / "src" / "prepare.py"), f"source={tmp_path / 'set'}", "resolution=64", "num_workers=2",
               f"output={tmp_path / 'a.zip'}"]  # fmt: skip
    running, parts = start(*command), tmp_path / ".a.zip.parts"
    wait(lambda: len(list(parts.glob("*.zip"))) >= 1)
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait(SECONDS) != 0
    wait(lambda: not group(running.pid), SECONDS)
    there = len(list(parts.glob("*.zip")))
    assert 1 <= there < 6
    assert start(*command).wait(180) == 0
    assert (tmp_path / "a.zip").is_file()
