"""A part that is swapped without its arguments is told when the configuration is composed, before data are opened."""

from pathlib import Path

import pytest

import consistency
from conftest import ROOT, Run
from consistency.commands import schema
from consistency.errors import UserError

NOWHERE = ["data=folder", "data.path=/nowhere"]
SWAPS = {
    "a schedule": (
        ["mode=ct", "parts.scales.square_root._target_=consistency.schedules.constant"],
        ["parts.scales.square_root", "s_1, which it does not take", "no num_scales, which"],
    ),
    "pairs": (
        ["mode=ct", "parts.pairs.uniform._target_=consistency.pairs.RatioPairs"],
        ["parts.pairs.uniform", "grid, which it does not take", "no times"],
    ),
    "a distance": (
        ["mode=ict", "+parts.distance.l2.c=3"],
        ["parts.distance.l2", "c, which it does not take"],
    ),
    "a weighting": (
        ["mode=ct", "+parts.weighting.own={_target_: consistency.weightings.karras, _partial_: true}"],
        ["parts.weighting.own", "no sigma_data, which it needs"],
    ),
    "an optimizer": (
        ["optimizer._target_=torch.optim.SGD"],
        ["optimizer", "betas, which it does not take", "momentum"],
    ),
    "a callback": (
        ["+callbacks.samples.colour=red"],
        ["callbacks.samples", "colour, which it does not take"],
    ),
    "a source": (
        ["data.source._target_=consistency.data.cifar10.CIFAR10"],
        ["data.source", "image_size, which it does not take", "no split, which it needs"],
    ),
    "the trainer": (["+trainer.max_stepz=3"], ["trainer", "max_stepz, which it does not take"]),
    "a sampler": (
        ["mode.samplers.one_step._target_=consistency.samplers.euler"],
        ["mode.samplers.one_step", "t_max, which it does not take", "no steps"],
    ),
    "nothing of that name": (
        ["parts.distance.l2._target_=consistency.distances.L3"],
        ["parts.distance.l2._target_", "consistency.distances.L3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SWAPS)
def test_a_part_with_the_arguments_of_another_is_told_before_data_are_opened(name: str) -> None:
    given, said = SWAPS[name]
    with pytest.raises(UserError) as caught:
        consistency.compose([*NOWHERE, *given])
    for text in said:
        assert text in str(caught.value), caught.value


def test_what_the_message_proposes_mends_it() -> None:
    place = "parts.scales.square_root"
    given = ["mode=ct", f"{place}._target_=consistency.schedules.constant"]
    with pytest.raises(UserError) as caught:
        consistency.compose(given)
    for name in ("s_0", "s_1", "total_steps"):
        assert f"~{place}.{name}" in str(caught.value)
        given.append(f"~{place}.{name}")
    assert f"+{place}.num_scales=..." in str(caught.value)
    config = consistency.compose([*given, f"+{place}.num_scales=18"])
    assert config.mode.callbacks.scale_schedule.num_scales.num_scales == 18


def test_an_experiment_that_swaps_a_part_is_told(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    swap = "{scales: {square_root: {_target_: consistency.schedules.constant}}}"
    (folder / "swapped_schedule.yaml").write_text(f"parts: {swap}\n")
    real = schema.register_experiments
    monkeypatch.setattr(schema, "register_experiments", lambda given: real(given, folder))
    output = tmp_path / "run"
    outcome = verb("train", "experiment=swapped_schedule", "mode=ct", *NOWHERE, f"output={output}")
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert "parts.scales.square_root: num_scales" in outcome.err
    assert "/nowhere" not in outcome.err.split("error:")[1]


def test_an_experiment_that_replaces_a_part_is_told(
    verb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    swap = "{objective: {distance: {_target_: consistency.distances.L1}}}"
    (folder / "replaced.yaml").write_text(f"mode: {swap}\n")
    real = schema.register_experiments
    monkeypatch.setattr(schema, "register_experiments", lambda given: real(given, folder))
    outcome = verb("train", "experiment=replaced", "mode=ct", *NOWHERE)
    assert outcome.status == 2
    assert "the part at mode.objective.distance to be named by mode.distance" in outcome.err


@pytest.mark.parametrize(
    ("verb", "given"),
    [
        ("sample", ["checkpoint=x", "sampler._target_=consistency.samplers.euler"]),
        ("evaluate", ["checkpoint=x", "samplers.onestep._target_=consistency.samplers.euler"]),
        ("edit", ["checkpoint=x", "task=colorize", "task.pairing._target_=consistency.editing.inpaint"]),
        ("prepare", ["source=x", "output=y.zip", "+crop.sharp=true"]),
    ],
)  # fmt: skip
def test_every_verb_tells(verb: str, given: list[str]) -> None:
    with pytest.raises(UserError, match=r"at (sampler|samplers.onestep|task.pairing|crop):"):
        consistency.compose(given, verb)


VERBS = sorted(file.stem for file in (ROOT / "conf").glob("*.yaml"))
NEEDED = {
    "edit": ["checkpoint=x", "task=inpaint"],
    "prepare": ["source=x", "output=y.zip"],
    "convert": ["source=x"],
    "dashboard": ["entity=x"],
} | {name: ["checkpoint=x"] for name in ("sample", "evaluate", "search", "demo")}


@pytest.mark.parametrize("verb", VERBS)
def test_what_stands_in_conf_is_bound(verb: str) -> None:
    assert consistency.compose(NEEDED.get(verb, []), verb)
