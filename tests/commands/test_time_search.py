"""The search for time points: exact where the curve has one valley, frank where it has not, and going on where it stopped."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from conftest import TINY, Run
from consistency.checkpoints import ours
from consistency.commands.search import is_unimodal, ternary_search
from consistency.errors import UserError
from consistency.inference.options import searched_path
from consistency.runtime.files import fingerprint

SHORT_RUN = [
    *(a for a in TINY if a not in ("callbacks.evaluation=null",)),
    "callbacks.evaluation.seeds=[0]",
    "callbacks.evaluation.batch_size=449",
    "trainer.max_steps=1",
]


@pytest.mark.parametrize("lowest", [0, 1, 17, 36, 37])
@pytest.mark.parametrize("seed", range(4))
def test_the_minimum_of_a_valley_is_found_exactly(lowest: int, seed: int) -> None:
    """Of any slopes on its two sides, with few measurements, each made once."""
    draw = random.Random(seed)
    steps = [draw.choice([1e-6, 1, 1e6]) for _ in range(38)]
    valley = [sum(steps[min(i, lowest) : max(i, lowest)]) for i in range(38)]
    asked: list[int] = []

    def measure(index: int) -> float:
        asked.append(index)
        return valley[index]

    found = ternary_search(measure, 0, 37)
    assert min(found, key=found.__getitem__) == lowest
    assert is_unimodal(found)
    assert len(asked) == len(set(asked)) <= 18
    assert found == {i: valley[i] for i in sorted(asked)}


def test_two_valleys_are_told() -> None:
    waves = [np.cos(i / 1.3) + i / 100 for i in range(40)]
    assert not is_unimodal(ternary_search(lambda i: float(waves[i]), 0, 39))
    assert is_unimodal({0: 3.0, 4: 1.0, 9: 2.0})
    assert not is_unimodal({0: 1.0, 4: 3.0, 9: 2.0})
    assert not is_unimodal({0: 1.0, 4: 1.0})


def test_small_ranges() -> None:
    for size in range(1, 6):
        for lowest in range(size):
            found = ternary_search(lambda i, low=lowest: abs(i - low), 0, size - 1)
            assert min(found, key=found.__getitem__) == lowest
    with pytest.raises(UserError, match="at least one index"):
        ternary_search(float, 3, 2)


@pytest.mark.slow
def test_a_search_ends_in_samples_and_goes_on_where_it_stopped(verb: Run, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "search"
    assert verb("train", *SHORT_RUN, f"output={run}").status == 0
    early = verb("sample", f"checkpoint={run}", "sampler=searched", f"output={tmp_path / 's'}")
    assert early.status == 2
    assert "src/search.py" in early.err
    options = [f"checkpoint={run}", "num_scales=6", "points=2", f"output={output}"]
    done = verb("search", *options, "batch_size=449")
    assert done.status == 0, done.err
    result = json.loads((run / "checkpoints" / "last.ckpt.searched.json").read_text())
    assert result["times"][0] == 80.0
    assert len(result["times"]) == 3
    assert result["times"] == sorted(result["times"], reverse=True)
    measured = json.loads((output / "measured.json").read_text())["values"]
    assert result["value"] == measured[" ".join(f"{t:.9g}" for t in result["times"])]
    assert (output / "curve.png").stat().st_size > 0

    kept = dict(list(measured.items())[:2])
    state = json.loads((output / "measured.json").read_text())
    (output / "measured.json").write_text(json.dumps(state | {"values": kept}))
    again = verb("search", *options, "batch_size=300")
    assert again.status == 0, again.err
    assert "has 2 measured values" in again.out
    assert json.loads((output / "measured.json").read_text())["values"] == pytest.approx(
        measured, rel=1e-3
    )
    other = verb("search", *options, "seed=1")
    assert other.status == 2
    assert "seed" in other.err
    sampled = verb("sample", f"checkpoint={run}", "sampler=searched", "num_samples=2", f"output={tmp_path / 'out'}")  # fmt: skip
    assert sampled.status == 0, sampled.err


@pytest.mark.slow
def test_two_processes_measure_the_same(process: Run, verb: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert verb("train", *SHORT_RUN, f"output={run}").status == 0
    values = []
    for devices, search in ((1, verb), (2, process)):
        output = tmp_path / f"search_{devices}"
        done = search("search", f"checkpoint={run}", "num_scales=4", f"devices={devices}", f"output={output}")  # fmt: skip
        assert done.status == 0, done.err
        values.append(json.loads((output / "measured.json").read_text())["values"])
    assert values[1] == pytest.approx(values[0], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [("metric=fid", "metric among"), ("points=0", "points >= 1"), ("num_scales=2", "points + 2")],
)
def test_wrong_options_are_told(
    change: str, said: str, verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    done = verb("search", f"checkpoint={trained['ect']}", change, f"output={tmp_path / 'out'}")
    assert done.status == 2
    assert said in done.err


def test_a_checkpoint_that_says_nothing_of_its_data_is_told(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    content = ours.read(trained["ect"] / "checkpoints" / "last.ckpt")
    content["config"] = {}
    ours.write(content, tmp_path / "bare.ckpt")
    done = verb("search", f"checkpoint={tmp_path / 'bare.ckpt'}", f"output={tmp_path / 'out'}")
    assert done.status == 2
    assert "nothing of its data" in done.err


def test_time_points_serve_only_the_weights_they_were_found_for(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    """The same set of weights of the same file; not another set, not the file of a longer run, not unknown ones."""
    model, output = tmp_path / "model.ckpt", tmp_path / "out"
    content = ours.read(trained["ect"] / "checkpoints" / "last.ckpt")
    ours.write(content, model)
    options = [f"checkpoint={model}", "sampler=searched", "num_samples=2"]
    record = {"times": [80.0, 0.9], "weights": "ema", "checkpoint": fingerprint(model)}
    searched_path(model).write_text(json.dumps(record))
    same = verb("sample", *options, f"output={output}")
    assert same.status == 0, same.err
    assert OmegaConf.load(output / "sample.yaml").sampler.times == [80.0, 0.9]

    other = verb("sample", *options, "weights=online", f"output={tmp_path / 'other'}")
    assert other.status == 2
    assert "found for weights=online" in other.err
    assert "found for weights=ema" in other.err
    assert f"search.py checkpoint={model} weights=online" in other.err
    measured = verb("evaluate", f"checkpoint={model}", "samplers=[searched]", "weights=[ema,online]", f"output={tmp_path / 'e'}")  # fmt: skip
    assert measured.status == 2
    assert "found for weights=ema" in measured.err

    searched_path(model).write_text(json.dumps({"times": record["times"]}))
    unknown = verb("sample", *options, f"output={tmp_path / 'unknown'}")
    assert unknown.status == 2
    assert "weights that it does not name" in unknown.err
    searched_path(model).write_text(json.dumps(record))
    ours.write(content | {"global_step": 3}, model)
    longer = verb("sample", *options, f"output={tmp_path / 'longer'}")
    assert longer.status == 2
    assert "another training step or file" in longer.err
    assert not (tmp_path / "longer").exists()
