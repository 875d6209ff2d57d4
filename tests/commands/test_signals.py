"""Ctrl-C: the first ends a command in good order, the second at once, neither with a stack trace."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, TINY, Run
from consistency.commands import prepare
from consistency.inference import generate

WAITS = """
import os, sys, time
from consistency.runtime import signals
signals.take_over()
with signals.stoppable(lambda: os.write(1, b"last words\\n")):
    if sys.argv[1] == "noted":
        signals.call_instead(lambda: os.write(1, b"noted\\n"))
    print("begun", flush=True)
    {body}
    print("went on", flush=True)
"""
SLEEP = "time.sleep(20)"


def waiting(kind: str, body: str = SLEEP) -> subprocess.Popen[str]:
    """A small command that waits, in a group of its own."""
    started = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(body=body), kind],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "begun\n"
    return started


def test_the_first_raises_what_is_no_error() -> None:
    started = waiting("raised")
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=10) == ("", "")
    assert started.returncode == 130


def test_what_is_noted_is_not_raised_and_the_second_ends_at_once() -> None:
    started = waiting("noted")
    started.send_signal(signal.SIGINT)
    time.sleep(0.6)
    assert started.poll() is None
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=5)
    assert (started.returncode, out, err) == (
        130,
        "noted\nlast words\n",
        "stopped at once by another Ctrl-C\n",
    )


def test_what_a_launcher_passes_on_is_no_second() -> None:
    started = waiting("noted", "time.sleep(1.5)")
    for _ in range(3):
        started.send_signal(signal.SIGINT)
        time.sleep(0.02)
    out, err = started.communicate(timeout=10)
    assert (started.returncode, out, err) == (0, "noted\nwent on\n", "")


def test_a_process_stuck_in_other_code_ends_too() -> None:
    started = waiting("raised", "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)")
    time.sleep(0.5)
    begun = time.monotonic()
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=10)
    assert (started.returncode, out, err) == (130, "last words\n", "stopped by Ctrl-C\n")
    assert time.monotonic() - begun < 6


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_while_a_command_imports_it_ends_in_one_line(tmp_path: Path) -> None:
    started = subprocess.Popen(
        [sys.executable, str(ROOT / "src" / "train.py")],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "libtorch" not in Path(f"/proc/{started.pid}/maps").read_text():
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=20) == ("", "stopped by Ctrl-C\n")
    assert started.returncode == 130
    assert not list(tmp_path.iterdir())


def interrupts(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def test_before_the_first_step_a_run_ends_in_one_line_and_leaves_nothing(
    verb: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("consistency.training.build.build_data", interrupts)
    outcome = verb("train", *TINY)
    assert (outcome.status, outcome.err) == (130, "stopped by Ctrl-C\n")
    assert not list(Path.cwd().iterdir())
    assert signal.getsignal(signal.SIGINT) == before


def test_a_sweep_stops_as_a_whole(verb: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consistency.training.build.build_data", interrupts)
    outcome = verb("train", "-m", *TINY, "optimizer.lr=1e-3,2e-3")
    assert (outcome.status, outcome.err) == (130, "stopped by Ctrl-C\n")


def test_samples_say_how_they_go_on(
    verb: Run, monkeypatch: pytest.MonkeyPatch, trained: dict[str, Path], tmp_path: Path
) -> None:
    monkeypatch.setattr(generate, "SampleNoise", interrupts)
    given = [f"checkpoint={trained['ect']}", "device=cpu"]
    outcome = verb("sample", *given, f"output={tmp_path / 'samples'}")
    assert outcome.status == 130
    assert outcome.err.endswith("stopped by Ctrl-C; the same command again goes on\n")
    outcome = verb("sample", *given)
    (folder,) = (Path.cwd() / "samples").iterdir()
    assert f"the same command with output={folder} goes on" in outcome.err


def test_a_set_that_is_prepared_says_that_it_goes_on(
    verb: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prepare, "detect_source", interrupts)
    outcome = verb("prepare", "source=x", f"output={tmp_path / 'a.zip'}")
    assert outcome.status == 130
    assert outcome.err == "stopped by Ctrl-C; the same command again goes on\n"
