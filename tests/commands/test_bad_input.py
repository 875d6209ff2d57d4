"""Bad input: one message of a few lines, status 2, no trace, nothing overwritten."""

from pathlib import Path

import pytest

from conftest import ROOT, TINY, Run
from consistency.commands import schema

TRAIN_MISTAKES = {
    "unknown key": (["trainer.max_stepz=3"], "max_stepz"),
    "unknown root key": (["colour=red"], "colour"),
    "unknown option": (["mode=xyz"], "mode/xyz"),
    "unknown data": (["data=nothing"], "data/nothing"),
    "wrong type": (["data.batch_size=many"], "batch_size"),
    "no teacher": (["mode=cd"], "teacher="),
    "missing teacher": (["mode=cd", "teacher=/nowhere"], "/nowhere"),
    "missing init": (["init=/nowhere"], "/nowhere"),
    "missing folder": (["data=folder", "data.path=/nowhere"], "/nowhere"),
    "no folder": (["data=folder"], "data.path"),
    "no lsun": (
        ["mode=ct", "data=lsun_bedroom", "trainer.precision=32-true", "scaler=null"],
        "bedroom_train_lmdb/data.mdb",
    ),
    "zero batch": (["data.batch_size=0"], "data.batch_size"),
    "huge batch": (["data.batch_size=100000"], "data.batch_size"),
    "negative batch": (["data.batch_size=-4"], "data.batch_size"),
    "empty device batch": (["data.device_batch_size=0"], "data.device_batch_size"),
    "no shards": (["data=stream"], "data.path"),
    "missing shards": (["data=stream", "data.path=/nowhere"], "/nowhere"),
    "negative workers": (["data.num_workers=-1"], "data.num_workers"),
    "no steps": (["trainer.max_steps=0"], "trainer.max_steps"),
    "negative rate": (["optimizer.lr=-1"], "optimizer"),
    "rate of the wrong type": (["optimizer.lr=fast"], "optimizer"),
    "average of one": (["parts.average.power.decays=[1.5]"], "decays"),
    "no averages": (["parts.average.power.widths=[]"], "decays"),
    "negative spread": (["parts.pairs.ratio.times.p_std=-1"], "p_std"),
    "negative t_min": (["mode.process.t_min=-1"], "t_min"),
    "times of no sampler": (["mode.process.times=[3.0]"], "t_max"),
    "negative seed": (["seed=-1"], "seed"),
    "network for other images": (["model.network.in_channels=3"], "model="),
    "other images": (["data.channels=3"], "data.channels"),
    "misspelt part": (["parts.distance.norm._target_=consistency.distances.L3"], "L3"),
    "argument of no part": (["+parts.pairs.ratio.p_meen=1"], "p_meen"),
    "trainer option of no kind": (["trainer.precision=17"], "17"),
    "half precision on a CPU": (["trainer.precision=16-mixed"], "bf16-mixed"),
    "settings of no callback": (["+callbacks.sampels.num_samples=3"], "callbacks.sampels"),
    "no average to sample with": (["callbacks.evaluation_ema=null"], "weights among"),
    "never a checkpoint": (["callbacks.checkpoint.every_n_train_steps=0"], "every_n_train_steps"),
    "no value": (["mode"], "mode"),
}


@pytest.mark.parametrize("name", TRAIN_MISTAKES)
def test_a_mistake_in_training_is_one_message(name: str, verb: Run, tmp_path: Path) -> None:
    arguments, hint = TRAIN_MISTAKES[name]
    output = tmp_path / "run"
    outcome = verb("train", *TINY, "trainer.max_steps=1", f"output={output}", *arguments)
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    message = outcome.err[outcome.err.index("error:") :].strip().splitlines()
    assert len(message) <= 10
    assert any(hint in line for line in message), message
    assert not (output / "checkpoints").exists()


def test_a_used_folder_is_left_alone(verb: Run, trained: dict[str, Path]) -> None:
    before = {p: p.stat().st_mtime_ns for p in trained["ect"].rglob("*")}
    outcome = verb("train", *TINY, "trainer.max_steps=1", f"output={trained['ect']}")
    assert outcome.status == 2
    assert "output=" in outcome.err
    assert {p: p.stat().st_mtime_ns for p in trained["ect"].rglob("*")} == before


def test_a_misspelt_key_inside_a_file_is_an_error(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "misspelt_inside_a_file.yaml").write_text("mode: {proces: {t_min: 0.1}}\n")
    real = schema.register_experiments
    monkeypatch.setattr(schema, "register_experiments", lambda given: real(given, folder))
    outcome = verb("train", "experiment=misspelt_inside_a_file", f"output={tmp_path / 'run'}")
    assert outcome.status == 2
    assert "proces" in outcome.err


def test_hydra_full_error_prints_the_traceback(process: Run) -> None:
    outcome = process("convert", "source=missing", HYDRA_FULL_ERROR="1")
    assert outcome.status == 1
    assert "Traceback" in outcome.err
    assert "UserError" in outcome.err


def test_a_teacher_must_be_a_teacher(verb: Run, trained: dict[str, Path], tmp_path: Path) -> None:
    outcome = verb(
        "train", "mode=cd", f"teacher={trained['ect']}", *TINY, f"output={tmp_path / 'r'}"
    )
    assert outcome.status == 2
    assert "teacher checkpoint" in outcome.err


SAMPLE_MISTAKES = {
    "no samples": (["num_samples=0"], "num_samples"),
    "no batch": (["batch_size=0"], "batch_size"),
    "times from elsewhere": (["sampler=multistep", "sampler.times=[3.0]"], "t_max"),
    "rising times": (["sampler=multistep", "sampler.times=[80.0,1.0,2.0]"], "fall"),
    "class out of range": (["labels=10"], "labels"),
    "weights that are not there": (["weights=target"], "weights"),
    "an average that is not there": (["weights='ema:0.5'"], "weights"),
    "unknown sampler": (["sampler=magic"], "sampler/magic"),
    "another role": (["role=teacher"], "teacher"),
    "no such device": (["device=quantum"], "device"),
    "no devices": (["devices=0"], "devices"),
    "precision of no kind": (["precision=8"], "precision"),
    "half precision on a CPU": (["precision=16-mixed", "device=cpu"], "bf16-mixed"),
    "class of no name": (["labels=cat"], "labels"),
    "steps of a grid": (["sampler=heun", "sampler.steps=1", "force=true"], "grid"),
    "sampler of a denoiser": (["sampler=heun"], "force=true"),
    "sampler of another process": (["sampler=trigflow_onestep"], "TrigFlow"),
    "indices that do not end": (
        ["sampler=multistep", "sampler.indices=[0,22]", "sampler.num_scales=40"],
        "39",
    ),
    "indices of no grid": (["sampler=multistep", "sampler.indices=[0,39]"], "num_scales"),
}


@pytest.mark.parametrize("name", SAMPLE_MISTAKES)
def test_a_mistake_in_sampling_is_one_message(
    name: str, verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    arguments, hint = SAMPLE_MISTAKES[name]
    output = tmp_path / "samples"
    outcome = verb("sample", f"checkpoint={trained['ect']}", f"output={output}", *arguments)
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert hint in outcome.err
    assert not output.exists() or not any(output.iterdir())


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "flipped"])
def test_an_unreadable_checkpoint_is_one_message(
    damage: str, verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    good = trained["ect"] / "checkpoints" / "last.ckpt"
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 0x10
    written = {
        "empty": b"",
        "text": b"not a checkpoint",
        "truncated": good.read_bytes()[:-1000],
        "flipped": bytes(content),
    }
    file = tmp_path / "some.ckpt"
    if damage != "missing":
        file.write_bytes(written[damage])
        digest = (good.parent / "last.ckpt.sha256").read_text()
        (tmp_path / "some.ckpt.sha256").write_text(digest)
    outcome = verb("sample", f"checkpoint={file}", f"output={tmp_path / 'samples'}")
    assert outcome.status == 2
    assert "some.ckpt" in outcome.err
    assert "Traceback" not in outcome.err


def test_commands_work_from_any_folder(verb: Run, tmp_path: Path) -> None:
    outcome = verb("train", *TINY, "trainer.max_steps=1", "output=here")
    assert outcome.status == 0, outcome.err
    written = tmp_path / "cwd" / "here" / "checkpoints" / "last.ckpt"
    assert written.is_file()
    assert ROOT not in written.parents


@pytest.mark.slow
def test_the_line_to_continue_with_works_when_pasted(process: Run, tmp_path: Path) -> None:
    import shlex
    import subprocess

    outcome = process("train", *TINY, "trainer.max_steps=1", f"output={tmp_path / 'a run'}")
    assert outcome.status == 0, outcome.err
    line = outcome.out.strip().splitlines()[-1]
    assert subprocess.run(shlex.split(line), cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "a run" / "samples_64" / "grid.png").is_file()
