"""The benchmark runs and its table says what it compares."""

import json
from pathlib import Path

import pytest

from conftest import TINY, Run
from consistency.commands.benchmark import figure, rate, table
from consistency.data.memory import noise

SMALL = [a for a in TINY if a.split("=")[0] not in ("logger", "data.batch_size")]


@pytest.mark.parametrize(("given", "kind"), [([], "images of"), (["images=64"], "random images")])
def test_data_are_measured_beside_the_training(
    given: list[str], kind: str, verb: Run, tmp_path: Path
) -> None:
    short = ["seconds=0.2", "train_steps=1", "train_batch=2", "data.batch_size=16"]
    outcome = verb("benchmark", *SMALL, *short, *given, f"output={tmp_path / 'out'}")
    assert outcome.status == 0, outcome.err
    assert kind in outcome.out
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())["images_per_second"]
    assert len(found) == 4
    assert all(speed > 0 for speed in found.values())
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("wrong", ["part=all", "seconds=0", "train_steps=0", "images=0"])
def test_what_cannot_be_measured_is_told(wrong: str, verb: Run, tmp_path: Path) -> None:
    outcome = verb("benchmark", wrong, f"output={tmp_path / 'out'}")
    assert outcome.status == 2
    assert wrong.split("=")[0] in outcome.err


def test_a_rate_is_counts_over_time() -> None:
    ticks = iter([5] * 1000)
    assert rate(lambda: ticks, 0.0) > 0
    assert next(ticks) == 5  # stops in time


def test_the_table_compares_with_its_last_row() -> None:
    text = table("title", {"loader": 5000.0, "training": 4.0})
    assert [line.split()[-1] for line in text.splitlines()[2:]] == ["1,250", "1"]
    assert [figure(v) for v in (0.0123, 1.234, 1_234_567)] == ["0.0123", "1.23", "1,230,000"]


def test_noise_fills_the_shape() -> None:
    held = noise(count=7, channels=3, image_size=4, num_classes=5)
    images, classes = held.batch([6, 1])
    assert images.shape == (2, 3, 4, 4)
    assert bool((held.labels < 5).all())
    assert held[6][1] == int(classes[0])
