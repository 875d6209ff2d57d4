"""A run that is killed, at whatever moment and however often, and resumed ends with the bits of one that never was."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comparing_runs import assert_same
from conftest import BEGINS_WITH, MODES, NO_CURVES, REPORT, ROOT, TINY

DRAWING = [option for option in TINY if option != NO_CURVES]
STEPS = [
    "trainer.max_steps=7",
    "data.batch_size=288",
    "data.device_batch_size=144",
    "model.network.dropout=0.2",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.samples.every_n_train_steps=3",
    "callbacks.curves.every_n_train_steps=3",
]
"""Three batches an epoch of the 899 digits, each accumulated from two; pictures between the checkpoints."""

MEASURED = [
    "callbacks.evaluation.seeds=[0]",
    "callbacks.evaluation.batch_size=449",
    "callbacks.evaluation.every_n_train_steps=3",
]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits to train on, in shards."""
    pytest.importorskip("litdata")
    from consistency.data.digits import Digits
    from consistency.data.shards import write_shards

    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(Digits(split="train"), folder, shard_bytes=5000, show=False)
    return folder


def setting(name: str, trained: dict[str, Path], shards: Path) -> tuple[list[str], list[str]]:
    """The arguments of a run, and those added when it is resumed."""
    if name == "two processes":
        return [*DRAWING, *STEPS, "mode=ct", *TWO], []
    if name == "other workers":
        return [*DRAWING, *STEPS, "mode=ect", "data.num_workers=1"], ["data.num_workers=2"]
    if name == "shards":
        stream = ["data=stream", f"data.path={shards}", "data.image_size=8", "data.channels=1"]
        stream += ["data.num_classes=10", "data.num_workers=0", "data.source.mixing=2"]
        return [*DRAWING, *stream, *STEPS, "mode=ict"], ["data.num_workers=1"]
    if name == "measured":
        tiny = [a for a in DRAWING if "evaluation=null" not in a and "monitor=null" not in a]
        cache = f"callbacks.evaluation.cache={shards.parent}"
        return [*tiny, *STEPS, *MEASURED, cache, "mode=ct"], []
    teacher = trained[BEGINS_WITH.get(name, "edm")]
    return [*DRAWING, *STEPS, f"mode={name}", f"teacher={teacher}"], []


ALL = ["measured", *MODES, "two processes", "other workers", "shards"]


@pytest.mark.parametrize(
    ("kills", "names"),
    [
        pytest.param(3, ["measured"], id="some", marks=pytest.mark.slow),
        pytest.param(20, ALL, id="many", marks=pytest.mark.slow),
        pytest.param(100, ALL, id="a hundred", marks=pytest.mark.kill),
    ],
)
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    kills: int,
    names: list[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    shards, trained = tmp_path, dict[str, Path]()
    if names is ALL:
        trained = request.getfixturevalue("trained")
        shards = request.getfixturevalue("shards")
    settings = []
    for number, name in enumerate(names):
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        arguments, resumed = setting(name, trained, shards)
        share = kills // len(names) + (number < kills % len(names))
        settings.append(
            {"folder": str(folder), "arguments": arguments, "resumed": resumed}
            | {"seed": kills + number, "kills": share}
        )
    found = killed(settings)
    for outcome in found:
        for folder in outcome["runs"]:
            assert_same(Path(outcome["whole"]), Path(folder))
    survived = Counter({n: len(o["kills"]) for n, o in zip(names, found, strict=True)})
    assert survived.total() == kills
    each = ", ".join(f"{name} {number}" for name, number in survived.items())
    record_property(REPORT, f"kills survived: {survived.total()} of {kills} ({each})")


def killed(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What tests/support/killed.py makes of the settings."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "killed.py"), json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
