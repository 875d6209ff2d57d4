"""resume=: the same run goes on, in the same folder, with the settings it was begun with."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from comparing_runs import assert_equal, assert_same, content, rows
from conftest import TINY, Run
from consistency.checkpoints import ours
from consistency.checkpoints.load import load
from consistency.checkpoints.ours import LAST, NEXT, PREVIOUS, newest, promote, settle
from consistency.commands import cli, resume, train
from consistency.errors import UserError
from consistency.runtime import files
from consistency.training.loggers import MetricsFile
from wandb_files import records

STEPS = 4
BEGUN = [
    *TINY,
    "mode=ct",
    "callbacks.checkpoint.every_n_train_steps=2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that has ended."""
    output = tmp_path_factory.mktemp("finished") / "run"
    before = sys.argv
    sys.argv = ["train.py", *BEGUN, f"trainer.max_steps={STEPS}", f"output={output}"]
    try:
        cli.run("train", train.train)
    finally:
        sys.argv = before
    return output


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Path:
    """The same run as it was killed between its last checkpoint but one and its end, in a folder of another name."""
    run = tmp_path / "begun"
    shutil.copytree(finished, run)
    for suffix in ("", ".sha256"):
        (run / "checkpoints" / f"{PREVIOUS}{suffix}").replace(
            run / "checkpoints" / f"{LAST}{suffix}"
        )
    digest = files.fingerprint(run / "checkpoints" / LAST)
    files.write_checksum(run / "checkpoints" / LAST, digest)
    return run


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def at_step(run: Path) -> int:
    return int(torch.load(run / "checkpoints" / LAST, weights_only=True)["global_step"])


CONTRADICTIONS = {
    "a leaf": (["optimizer.lr=0.5"], ["optimizer.lr=0.5", "optimizer.lr=0.0"]),
    "a choice": (["mode=ect"], ["mode.distance=norm", "mode.distance=l2"]),
    "another batch": (["data.batch_size=16"], ["data.batch_size=16", "data.batch_size=8"]),
    "another seed": (["seed=1"], ["seed=1", "seed=0"]),
    "precision": (["trainer.precision=bf16-mixed"], ["bf16-mixed", "32-true"]),
    "something new": (["+mode.objective.stop_gradient=false"], ["stop_gradient=False", "nothing"]),
    "a choice of the trainer": (["trainer=ddp", "trainer.precision=64-true"], ["64-true"]),
    "an experiment": (["experiment=lsun_bedroom_ct"], ["lsun_bedroom_ct"]),
}


QUICK = ("a leaf", "a choice", "another batch", "an experiment")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CONTRADICTIONS]
)
def test_a_setting_that_contradicts_the_run_is_refused(
    name: str, verb: Run, begun: Path, tmp_path: Path
) -> None:
    given, said = CONTRADICTIONS[name]
    before = stamps(begun)
    for where in ([f"resume={begun}"], [f"output={begun}", "resume=auto"]):
        outcome = verb("train", *given, *where)
        assert outcome.status == 2
        assert "Traceback" not in outcome.err
        if name != "an experiment":
            assert str(begun / "config.yaml") in outcome.err
            for text in said:
                assert text in outcome.err, outcome.err
    assert stamps(begun) == before


def test_the_same_command_with_more_steps_is_the_longer_run(
    verb: Run, finished: Path, tmp_path: Path
) -> None:
    """The schedules keep the length that the run was begun with; the bar and the clock go on where they stood."""
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    shutil.copytree(finished, longer)
    saved = (longer / "config.yaml").read_text()
    outcome = verb(
        "train", *BEGUN, f"trainer.max_steps={STEPS + 3}", f"output={longer}", "resume=auto"
    )
    assert outcome.status == 0, outcome.err
    assert (longer / "config.yaml").read_text() == saved
    assert f"at step {STEPS}" in outcome.out
    assert f" {STEPS}/{STEPS + 3} " in outcome.out
    assert f" {STEPS + 3}/{STEPS + 3} " in outcome.out
    outcome = verb(
        "train",
        *BEGUN,
        f"trainer.max_steps={STEPS + 3}",
        f"mode.total_steps={STEPS}",
        f"output={whole}",
    )
    assert outcome.status == 0, outcome.err
    assert rows(longer) == rows(whole)
    one, other = (content(f / "checkpoints" / LAST) for f in (longer, whole))
    assert_equal(one, other, LAST)
    seconds = [float(row["speed/hours"]) for row in csv_rows(longer)]
    assert seconds == sorted(seconds)


def csv_rows(run: Path) -> list[dict[str, str]]:
    import csv

    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_in_a_folder_that_was_moved_goes_on_there(
    verb: Run, finished: Path, begun: Path
) -> None:
    before = stamps(finished)
    outcome = verb("train", f"resume={begun}", "mode=ct", f"trainer.max_steps={STEPS}")
    assert outcome.status == 0, outcome.err
    assert "warn" not in outcome.err.lower(), outcome.err
    assert stamps(finished) == before
    one, other = (content(f / "checkpoints" / LAST) for f in (begun, finished))
    assert_equal(one, other, LAST)
    assert rows(begun) == rows(finished)


def test_a_run_that_has_ended_is_left_alone(verb: Run, finished: Path, tmp_path: Path) -> None:
    before = stamps(finished)
    again = [*BEGUN, f"trainer.max_steps={STEPS}", f"output={finished}", "resume=auto"]
    for arguments in ([f"resume={finished}"], again):
        outcome = verb("train", *arguments)
        assert outcome.status == 0, outcome.err
        assert "trainer.max_steps=" in outcome.out
    assert stamps(finished) == before


@pytest.mark.parametrize("state", ["damaged", pytest.param("missing", marks=pytest.mark.slow)])
def test_where_last_is_no_good_previous_is_taken(
    state: str, verb: Run, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    last = run / "checkpoints" / LAST
    damage(last) if state == "damaged" else last.unlink()
    outcome = verb("train", f"resume={run}")
    assert outcome.status == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if f"is {state}" in line]
    assert LAST in line and PREVIOUS in line
    assert "at step 2" in outcome.out
    assert_equal(content(last), content(finished / "checkpoints" / LAST), LAST)
    kept = content(run / "checkpoints" / PREVIOUS)
    assert_equal(kept, content(finished / "checkpoints" / PREVIOUS), PREVIOUS)


def test_where_no_checkpoint_is_whole_the_run_is_refused(verb: Run, begun: Path) -> None:
    shutil.copytree(begun / "checkpoints", begun / "kept")
    for name in (LAST, PREVIOUS):
        shutil.copy(begun / "kept" / LAST, begun / "checkpoints" / name)
        damage(begun / "checkpoints" / name)
    outcome = verb("train", f"resume={begun}")
    assert outcome.status == 2
    assert f"{LAST} and {PREVIOUS}, damaged" in outcome.err


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_again(verb: Run, finished: Path, begun: Path) -> None:
    shutil.rmtree(begun / "checkpoints")
    saved = (begun / "config.yaml").read_bytes()
    outcome = verb("train", f"resume={begun}")
    assert outcome.status == 0, outcome.err
    assert "no checkpoint" in outcome.out
    assert (begun / "config.yaml").read_bytes() == saved
    assert rows(begun) == rows(finished)


NO_RUNS: dict[str, Callable[[Path], Any]] = {
    "no folder": lambda folder: None,
    "an empty folder": lambda folder: folder.mkdir(),
    "a folder of something else": lambda folder: (folder / "some").mkdir(parents=True),
    "a file": lambda folder: folder.write_text("text"),
    "a broken configuration": lambda folder: (
        folder.mkdir() or (folder / "config.yaml").write_text("seed: [")
    ),
    "the configuration of something else": lambda folder: (
        folder.mkdir() or (folder / "config.yaml").write_text("colour: red\noutput: x\n")
    ),
}


@pytest.mark.parametrize("name", NO_RUNS)
def test_a_folder_that_is_no_run_is_refused(name: str, verb: Run, tmp_path: Path) -> None:
    folder = tmp_path / "somewhere"
    NO_RUNS[name](folder)
    before = sorted(tmp_path.rglob("*"))
    outcome = verb("train", f"resume={folder}")
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert "somewhere" in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_another_output_than_the_run_is_refused(verb: Run, begun: Path, tmp_path: Path) -> None:
    outcome = verb("train", f"resume={begun}", f"output={tmp_path / 'other'}")
    assert outcome.status == 2
    assert str(begun) in outcome.err
    assert "other" in outcome.err


def test_a_used_folder_says_how_to_go_on(verb: Run, begun: Path) -> None:
    outcome = verb("train", *BEGUN, f"output={begun}")
    assert outcome.status == 2
    assert f"resume={begun}" in outcome.err


@pytest.mark.slow
def test_auto_begins_where_nothing_is_and_goes_on_in_every_folder_of_a_sweep(
    verb: Run, tmp_path: Path
) -> None:
    tiny = TINY
    sweep = ["-m", "mode=ct,ect", *tiny, f"output={tmp_path / 'sweep'}", "resume=auto"]
    for steps, begins in ((1, 2), (2, 0)):
        outcome = verb("train", *sweep, f"trainer.max_steps={steps}", "mode.total_steps=9")
        assert outcome.status == 0, outcome.err
        assert outcome.out.count("it begins there") == begins
        for folder in ("0_mode-ct", "1_mode-ect"):
            assert at_step(tmp_path / "sweep" / folder) == steps
            assert [row["step"] for row in rows(tmp_path / "sweep" / folder)] == [
                str(step) for step in range(steps)
            ]


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, tiny = tmp_path / "run", [a for a in TINY if a != "logger=csv"]
    begin = [*tiny, "trainer.max_steps=1", f"output={run}"]
    outcome = verb("train", *begin)
    assert outcome.status == 0, outcome.err
    outcome = verb("train", f"resume={run}", "trainer.max_steps=2")
    assert outcome.status == 0, outcome.err
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    ids, steps = set(), []
    for file in files:
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                row = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
                if "train/loss" in row:
                    steps.append(json.loads(row["trainer/global_step"]))
        assert str(file.parent) in outcome.out
    assert ids == {(run / "wandb_id.txt").read_text().strip()}
    assert steps == [0, 1]


def test_a_row_is_one_step_whenever_its_metrics_come(tmp_path: Path) -> None:
    file = MetricsFile(path=str(tmp_path / "metrics.csv"))
    file.log_metrics({"quality": 0.5}, step=0)
    file.save()
    file.log_metrics({"loss": 1.0}, step=0)
    file.save()
    file.log_metrics({"loss": 2.0, "quality": 0.25}, step=1)
    file.log_metrics({"loss": 3.0}, step=2)
    file.finalize("success")
    kept = [("0", "0.5", "1.0"), ("1", "0.25", "2.0"), ("2", "", "3.0")]
    assert [(r["step"], r["quality"], r["loss"]) for r in csv_rows(tmp_path)] == kept
    with file.path.open("a") as torn:
        torn.write("1")
    again = MetricsFile(path=str(file.path))
    again.cut(2)
    again.log_metrics({"loss": 4.0, "new": 5.0}, step=2)
    again.save()
    kept[2:] = [("2", "", "4.0")]
    assert [(r["step"], r["quality"], r["loss"]) for r in csv_rows(tmp_path)] == kept
    assert [r["new"] for r in csv_rows(tmp_path)] == ["", "", "5.0"]


def test_a_checkpoint_comes_after_the_row_of_its_step(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that dies between the two goes on behind a gap."""
    run, seen = tmp_path / "run", []

    def watched(folder: Path) -> None:
        k = torch.load(folder / NEXT, weights_only=True)["k"]
        seen.append((k, [int(row["step"]) for row in rows(run)]))
        promote(folder)

    monkeypatch.setattr("consistency.checkpoints.ours.promote", watched)
    given = ["data.device_batch_size=4", f"trainer.max_steps={STEPS}", f"output={run}"]
    outcome = verb("train", *BEGUN, *given)
    assert outcome.status == 0, outcome.err
    assert seen == [(2, [0, 1]), (4, [0, 1, 2, 3])]


class Died(BaseException):
    """Stands for SIGKILL."""


def test_whenever_a_process_dies_the_newest_but_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A death before each touch of a file while a third checkpoint is kept, and once more while that is mended."""
    left = [10**9]

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Died
            return function(*arguments, **settings)

        return call

    for name in ("replace", "unlink", "write_text", "open"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    monkeypatch.setattr(torch, "save", dying(torch.save))

    def keep(folder: Path, k: int) -> None:
        ours.write({"k": k}, folder / NEXT)
        promote(folder)

    def survives(folder: Path, touches: int, action: Callable[[], None]) -> bool:
        left[0] = touches
        try:
            action()
        except Died:
            return False
        finally:
            left[0] = 10**9
        return True

    deaths = 0
    for first in range(100):
        for second in range(100):
            folder = tmp_path / f"{first}_{second}"
            keep(folder, 1)
            keep(folder, 2)
            done = survives(folder, first, lambda folder=folder: keep(folder, 3))
            found = newest(folder)
            assert found is not None and found[1]["k"] in ((3,) if done else (2, 3))
            mended = survives(folder, second, lambda found=found: settle(found[0]))
            deaths += (not done) + (not mended)
            again = newest(folder)
            assert again is not None and again[1]["k"] == found[1]["k"]
            settle(again[0])
            keep(folder, again[1]["k"] + 1)
            after = [torch.load(folder / n, weights_only=True)["k"] for n in (LAST, PREVIOUS)]
            assert after == [again[1]["k"] + 1, again[1]["k"]]
            for name in (LAST, PREVIOUS):
                assert files.checksum_path(folder / name).is_file()
                files.verify_checksum(folder / name)
            assert len(list(folder.iterdir())) == 4
            if mended:
                break
        if done:
            break
    assert deaths > 30


def test_damaged_checkpoints_are_no_run(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    ours.write({"k": 1}, tmp_path / LAST)
    (tmp_path / LAST).write_bytes(b"something else")
    with pytest.raises(UserError, match="damaged"):
        newest(tmp_path)


def test_the_bits_are_compared(finished: Path, tmp_path: Path) -> None:
    """The comparison of these tests notices one bit of one weight."""
    one = content(finished / "checkpoints" / LAST)
    other = content(finished / "checkpoints" / LAST)
    assert_equal(one, other, LAST)
    weight = next(iter(other["optimizer_states"][0]["state"].values()))["exp_avg"].flatten()
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    with pytest.raises(AssertionError, match="exp_avg"):
        assert_equal(one, other, LAST)
    other_run = tmp_path / "run"
    shutil.copytree(finished, other_run)
    (other_run / "samples" / "latest.png").write_bytes(b"")
    with pytest.raises(AssertionError, match="latest"):
        assert_same(finished, other_run)


def test_what_may_change_is_what_changes(
    verb: Run, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice of the trainer brings its devices and nothing else; what is not named stays as it was."""
    seen: list[Any] = []

    def stop(config: Any) -> None:
        seen.append(config)
        raise UserError("stopped by the test")

    monkeypatch.setattr("consistency.training.build.build_data", stop)
    given = ["trainer=ddp", "trainer.devices=2", "trainer.log_every_n_steps=1"]
    given += ["data.num_workers=3", "logger=wandb", "mode=ct"]
    assert "stopped by" in verb("train", f"resume={begun}", *given).err
    config = seen[0]
    assert config.trainer.strategy._target_.endswith("DDPStrategy")
    assert config.trainer.devices == 2
    assert config.trainer.accelerator == "auto"
    assert config.data.num_workers == 3
    assert config.trainer.max_steps == STEPS
    assert list(config.logger) == ["csv", "wandb"]
    assert config.logger.csv.path == str(begun / "metrics.csv")
    assert "stopped by" in verb("train", f"resume={begun}").err
    plain = seen[1]
    assert (plain.trainer.strategy, plain.trainer.accelerator) == ("auto", "cpu")
    assert list(plain.logger) == ["csv"]
    assert plain.data.num_workers == 0


HOSTILE = {
    "a command": {"_target_": "os.system", "command": "true"},
    "a function of ours that fetches": {"_target_": "consistency.checkpoints.pretrained.download"},
    "a class that the command line does not name": {"_target_": "probe.RankProbe"},
    "an interpolation": {"_target_": "${oc.env:HOME}"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_folder_is_data_and_names_only_what_is_listed(
    name: str, verb: Run, begun: Path
) -> None:
    path = begun / "config.yaml"
    config = OmegaConf.load(path)
    OmegaConf.update(config, "callbacks.planted", HOSTILE[name], force_add=True)
    OmegaConf.save(config, path)
    before = stamps(begun)
    outcome = verb("train", f"resume={begun}")
    assert outcome.status == 2
    assert "callbacks.planted" in outcome.err
    assert stamps(begun) == before


@pytest.mark.slow
def test_a_callback_of_ones_own_is_named_again(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    own = ["+callbacks.probe._target_=probe.RankProbe", f"+callbacks.probe.folder={run}"]
    assert verb("train", *BEGUN, *own, "trainer.max_steps=1", f"output={run}").status == 0
    outcome = verb("train", f"resume={run}", "trainer.max_steps=2")
    assert outcome.status == 2
    assert "probe.RankProbe" in outcome.err
    outcome = verb("train", f"resume={run}", "trainer.max_steps=2", *own)
    assert outcome.status == 0, outcome.err
    assert at_step(run) == 2


def test_a_secret_is_stored_nowhere_and_given_again(verb: Run, begun: Path) -> None:
    """A path with a password is masked in the folder; the same one, given anew, is no contradiction."""
    path = begun / "config.yaml"
    config = OmegaConf.load(path)
    config.data.path = "https://***@host/set"
    OmegaConf.save(config, path)
    given = OmegaConf.merge(config, {"data": {"path": "https://me:word@host/set"}, "resume": None})
    hydra = OmegaConf.create({"overrides": {"task": ["data.path=x"]}, "runtime": {"choices": {}}})
    assert isinstance(given, DictConfig)
    with mock.patch.object(resume.HydraConfig, "get", return_value=hydra):
        assert resume.resumed_config(given, begun).data.path == "https://me:word@host/set"
        given.data.path = "https://me:word@elsewhere/set"
        with pytest.raises(UserError, match="elsewhere"):
            resume.resumed_config(given, begun)


def test_an_option_younger_than_the_run_is_no_contradiction_while_it_is_null(
    verb: Run, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = begun / "config.yaml"
    config = OmegaConf.load(path)
    del config.trainer["gradient_clip_val"]
    OmegaConf.save(config, path)
    monkeypatch.setattr(
        "consistency.training.build.build_data", mock.Mock(side_effect=UserError("reached"))
    )
    outcome = verb("train", f"resume={begun}", "trainer.gradient_clip_val=null")
    assert "reached" in outcome.err
    outcome = verb("train", f"resume={begun}", "trainer.gradient_clip_val=1.5")
    assert outcome.status == 2
    assert "clip_val=1.5, where the run has trainer.gradient_clip_val=nothing" in outcome.err


@pytest.mark.parametrize("gone", ["consistency.data.sets.Digits", "consistency.nowhere.Part"])
def test_a_run_of_another_version_is_refused_and_its_checkpoint_opens(
    gone: str, verb: Run, begun: Path
) -> None:
    """Its configuration names a class that has moved since."""
    path = begun / "config.yaml"
    config = OmegaConf.load(path)
    config.data.source._target_ = gone
    OmegaConf.save(config, path)
    before = stamps(begun)
    for where in ([f"resume={begun}"], [f"output={begun}", "resume=auto", "data=digits"]):
        outcome = verb("train", *where)
        assert outcome.status == 2
        assert f"it names {gone}" in outcome.err
        assert "Traceback" not in outcome.err
        assert len(outcome.err.partition("error:")[2].strip().splitlines()) == 3
    assert stamps(begun) == before
    assert load(begun).sample(1).shape == (1, 1, 8, 8)
