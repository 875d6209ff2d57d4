"""Paths are taken as they are, and the lines that are printed work where they are pasted."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import consistency
import originals
from configurations import options
from conftest import ROOT, TINY, Run
from consistency.commands import overrides, schema
from consistency.runtime.files import expanded, path_of

NAMES = [
    "My Photos (2024)", "été_写真", "фото 🙂", "a=b", "lr=0.001", "one,two", "it's", 'say "hi"', "both ' and \"",
    "#tag", "a&b", "x[1]", "{a}", "{a:1,b}", "50%", "a;b", "a|b", "*", "?", "!bang!", "back\\slash", "end\\", "\\'",
    "trailing ", " leading", "-dash", "--", "001", "1e5", "true", "False", "inf", "nan", "0x1f", "1_000", "$HOME", "~tilde",
    "~no.such.user/x", "a:b", "@at", "a\tb", "'quoted'", '"quoted"', "'", "choice(a,b)", "glob(*)", "str(1)", "a,", ",a", "[a,b]",
    "+plus", "^", "`id`", "<x>", "nullable", "automatic",
]  # fmt: skip
VERBS = sorted(file.stem for file in (ROOT / "conf").glob("*.yaml"))


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What Hydra makes of the overrides, through the texts that it hands to the jobs of a sweep as well."""
    parser = OverridesParser.create()
    found = {}
    for override in parser.parse_overrides(overrides.for_hydra(arguments)):
        again = parser.parse_override(
            f"{override.get_key_element()}={override.get_value_element_as_str()}"
        )
        assert again.value() == override.value()
        saved = OmegaConf.to_yaml(OmegaConf.create({"value": again.value()}))
        found[override.key_or_group] = OmegaConf.create(saved)["value"]
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sweep", [False, True])
def test_a_path_is_taken_as_it_is(
    name: str, sweep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / name
    place.mkdir(parents=True)
    mode = ["hydra.mode=MULTIRUN"] if sweep else []
    for text in (name, str(place)):
        assert parsed([*mode, f"data.path={text}", f"++output={text}"]) | {"hydra.mode": 0} == {
            "data.path": text,
            "output": text,
            "hydra.mode": 0,
        }


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("'", '"'))])
def test_so_is_one_that_is_not_there_yet(name: str, tmp_path: Path) -> None:
    assert parsed([f"output={tmp_path}/{name}", f"export={name}"]) == {
        "output": f"{tmp_path}/{name}",
        "export": name,
    }
    assert parsed(["hydra.mode=MULTIRUN", f"output={name}"])["output"] == name


def test_what_is_no_plain_path_keeps_its_meaning(tmp_path: Path) -> None:
    kept = ["data.path=null", "init=NULL", "checkpoint=", "~data.path", "~data.path=x", "seed=1,2"]
    assert overrides.for_hydra(kept) == kept
    assert parsed(["data.path='a,b'", 'checkpoint="x y"', "resume=auto"]) == {
        "data.path": "a,b",
        "checkpoint": "x y",
        "resume": "auto",
    }
    same = ["hf:cifar10", "openai:cd_imagenet64_lpips", "s3://bucket/a b"]
    for text in same:
        assert parsed([f"+data.path={text}"]) == {"data.path": text}
    config = consistency.compose(["data=folder", "data.path=${oc.env:HOME}/x (1)"])
    assert config.data.source.path == f"{os.environ['HOME']}/x (1)"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home (mine)", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for text in ("~/x", "'~/x'", '"~/x"'):
        for key in ("output", "data.path"):
            assert parsed([f"{key}={text}"]) == {key: f"{home}/x"}
    assert path_of("~/x") == home / "x"
    assert path_of("~no.such.user/x") == Path("~no.such.user/x")
    Path("~").mkdir()
    assert expanded("~") == "~"
    assert expanded("~/x") == f"{home}/x"


def test_a_sweep_takes_the_longest_paths_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one,two", "other", "a (1)", "x,y,z", "y"):
        Path(name).mkdir()

    def jobs(value: str) -> list[Any]:
        arguments = overrides.for_hydra(["-m", f"data.path={value}"])[1:]
        (override,) = OverridesParser.create().parse_overrides(arguments)
        if not override.is_sweep_override():
            return [override.value()]
        return [
            OverridesParser.create().parse_override(f"x={text}").value()
            for text in override.sweep_string_iterator()
        ]

    assert jobs("one,two") == ["one,two"]
    assert jobs("one,two,other") == ["one,two", "other"]
    assert jobs("other,one,two") == ["other", "one,two"]
    assert jobs("x,y,z") == ["x,y,z"]
    assert jobs("x,y") == ["x", "y"]
    assert jobs("a (1),new (2), b=c") == ["a (1)", "new (2)", "b=c"]
    assert jobs("'a,b','c d',null") == ["a,b", "c d", None]
    assert jobs("choice(other,y)") == ["other", "y"]
    assert jobs("${f:a,b},y") == ["${f:a,b}", "y"]
    (output,) = overrides.for_hydra(["--multirun", "output=one,b"])[1:]
    assert OverridesParser.create().parse_override(output).value() == "one,b"


def test_a_mask_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my mask (1).png", "it's.png", "a=b,c.png"):
        assert parsed([f"mask={name}"]) == {"mask": "file", "mask.path": name}
    assert overrides.for_hydra(["mask=center"]) == ["mask=center"]
    assert overrides.for_hydra(["-m", "mask=center,box"]) == ["-m", "mask=center,box"]
    two = overrides.for_hydra(["-m", "mask=a b.png,c.png"])
    assert two == ["-m", "mask=file", "mask.path='a b.png','c.png'"]


# ------------------------------------------------------------------------ every option

NO_PATHS = {
    "background", "crop", "data", "device", "extractor", "float32_matmul", "host", "metric", "on_bad", "on_nonfinite", "part", "precision", "role", "split",
    "start", "tcm", "teacher_mode", "to", "weights", "init_weights", "teacher_weights", "modes", "overrides", "monitor", "project",
    "name", "dtype", "scaling", "store", "category", "subset", "images", "labels", "attention", "accelerator", "strategy",
    "snapshots", "push", "license", "axis", "entity",
}  # fmt: skip
"""Words that options may have as texts that are no paths: what is new here is decided upon."""


def leaves(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{place}.{key}".strip("."))
    else:
        yield place, node


def every_configuration(verb: str) -> Iterator[DictConfig]:
    """The composed configurations of a verb, with each option of the groups that have paths in them."""
    needed = {"sample": "", "compare": "", "convert": "", "edit": "task=inpaint"}.get(verb, "")
    base = [needed] if needed else []
    yield composed_raw(verb, base)
    if verb == "train":
        for name in options("data"):
            yield composed_raw(verb, [f"data={name}"])
        for name in options("logger"):
            yield composed_raw(verb, [f"logger={name}"])
        for name in options("evaluation"):
            yield composed_raw(verb, [f"evaluation@callbacks.evaluation={name}"])
        yield composed_raw(verb, ["mode=cd", "trainer=ddp"])
        yield composed_raw(verb, ["mode=progdist"])
    if verb == "edit":
        yield composed_raw(verb, [*base, "mask=file"])


def composed_raw(verb: str, given: list[str]) -> DictConfig:
    from hydra import compose, initialize_config_dir

    schema.register_experiments(given)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(verb, given)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_that_takes_a_path_is_declared(verb: str) -> None:
    """A text that names a place, or an option that is named as one, is a path for `schema.is_path`."""
    undecided = set()
    for config in every_configuration(verb):
        for place, value in leaves(OmegaConf.to_container(config, resolve=False)):
            word = place.split(".")[-1]
            named = isinstance(value, str) and ("${output}" in value or "/" in value)
            named = named or any(n in word for n in ("path", "folder", "file", "dir", "cache"))
            if named and not schema.is_path(place) and word not in ("_target_", "cache_gigabytes"):
                undecided.add(place)
    typed = schema.structure(verb)
    texts = {f.name for f in fields(typed) if f.type in (str, str | None)}
    undecided |= {name for name in texts if not schema.is_path(name) and name not in NO_PATHS}
    assert not undecided


def test_no_other_word_is_a_path() -> None:
    for key in ("data", "mode", "seed", "data.image_size", "callbacks.samples", "data.source"):
        assert not schema.is_path(key)
    for key in ("callbacks.evaluation.reference_features", "trainer.max_steps", "samplers"):
        assert not schema.is_path(key)
    assert schema.is_path("logger.anything.save_dir")


# ------------------------------------------------------------------------ whole commands

RUN = 'run (2) été=b, it\'s [x] "y" #1 &'
PHOTOS = "My Photos (2024)"


def photos(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(8):
        Image.fromarray(originals.noise(16, 16, 3)).save(folder / f"{number} image.png")
    return folder


@pytest.fixture(scope="module")
def odd(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a folder of an odd name."""
    run = tmp_path_factory.mktemp("odd") / RUN
    shutil.copytree(trained["ect"], run)
    return run


@pytest.mark.slow
def test_odd_folders_are_read_and_written(verb: Run, odd: Path, tmp_path: Path) -> None:
    output = tmp_path / "out, it's (1)=[2]"
    few = ["num_samples=4", "batch_size=4"]
    outcome = verb("sample", f"checkpoint={odd}", *few, f"output={output}")
    assert outcome.status == 0, outcome.err
    assert (output / "grid.png").is_file()
    sweep = [f"checkpoint={odd}", *few, "seed=0,1", f"output={output}_s"]
    outcome = verb("sample", "-m", *sweep)
    assert outcome.status == 0, outcome.err
    assert [(tmp_path / f"{output.name}_s" / n / "grid.png").is_file() for n in "01"] == [True] * 2
    outcome = verb("train", f"resume={odd}", "trainer.max_steps=3")
    assert outcome.status == 0, outcome.err
    assert "at step 2" in outcome.out


@pytest.mark.parametrize("inside", ["checkpoints/last.ckpt", "checkpoints", "metrics.csv"])
def test_a_file_of_a_run_to_resume_names_the_run(inside: str, verb: Run, odd: Path) -> None:
    outcome = verb("train", f"resume={odd / inside}")
    assert outcome.status == 2
    assert f"do: say {shlex.quote(f'resume={odd}')}" in outcome.err


def test_what_prepare_prints_is_quoted(verb: Run, tmp_path: Path) -> None:
    source = photos(tmp_path / PHOTOS)
    target = tmp_path / "a=b, it's.zip"
    outcome = verb("prepare", f"source={source}", f"output={target}", "resolution=8")
    assert outcome.status == 0, outcome.err
    assert shlex.split(printed(outcome.out, "train on it "))[3] == f"data.path={target}"
    again = verb("prepare", f"source={source}", f"output={target}", "resolution=8")
    assert "nothing to do" in again.out


def printed(out: str, before: str) -> str:
    """The command line in what a command printed: behind a word, or on the line below it."""
    lines = out.splitlines()
    (at,) = [n for n, text in enumerate(lines) if text.startswith(before)]
    return lines[at].removeprefix(before).strip() or lines[at + 1].strip()


Pasted = Callable[[str], list[str]]


@pytest.fixture
def pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pasted:
    """pasted(line) pastes a line into bash and dash, where `python` says what it was given; script and arguments."""
    python = tmp_path / "bin (it's)" / "python"
    python.parent.mkdir()
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(python))

    def paste(line: str) -> list[str]:
        heard = []
        for shell in filter(shutil.which, ("bash", "dash")):
            done = subprocess.run([shell, "-c", line], capture_output=True, text=True, check=True)
            heard.append(json.loads(done.stdout))
        assert heard and all(words == heard[0] for words in heard)
        assert heard[0][0] == str(python)
        return [str(word) for word in heard[0][1:]]

    return paste


@pytest.mark.slow
def test_every_printed_line_works_pasted(
    verb: Run, pasted: Pasted, odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def succeeds(line: str, *more: str) -> str:
        script, *arguments = pasted(line)
        outcome = verb(Path(script).stem, *arguments, *more)
        assert outcome.status == 0, outcome.err
        return outcome.out

    monkeypatch.setenv("WANDB_MODE", "offline")
    outcome = verb("train", *TINY, "trainer.max_steps=1", f"output={RUN}", "logger=wandb")
    assert outcome.status == 0, outcome.err
    succeeds(printed(outcome.out, "Continue with:"), "num_samples=4")
    assert (Path(RUN) / "samples_64" / "grid.png").is_file()
    module, *folders = pasted(printed(outcome.out, "W&B:        offline; upload with"))[1:]
    assert (module, folders[0]) == ("wandb", "sync") and Path(folders[1]).is_dir()

    photos(Path(PHOTOS))
    outcome = verb("prepare", f"source={PHOTOS}", f"output={RUN}/a set.zip")
    assert outcome.status == 0, outcome.err
    small = [text for text in TINY if "channel_mult" not in text]
    few = ["data.num_workers=0", "trainer.max_steps=1", "output=trained"]
    succeeds(printed(outcome.out, "train on it "), *small, *few)

    refused = verb("train", f"output={RUN}")
    option = printed(
        refused.err.replace("go on with ", "go on with\n"),
        "  do: choose another output=, or go on with",
    )
    again = succeeds(f"{overrides.shell_line('train')} {option}", "trainer.max_steps=2")
    assert "at step 1" in again
    outcome = verb("convert", f"source={odd}", f"output={RUN}/model, too.safetensors")
    assert outcome.status == 0, outcome.err
    assert "verified" in succeeds(printed(outcome.out, "check it "))
    refused = verb("sample", f"checkpoint={odd}", "sampler=searched")
    script, *arguments = pasted(refused.err.splitlines()[-1].strip())
    assert (Path(script).name, arguments) == ("search.py", [f"checkpoint={odd}"])


def test_the_home_folder_of_the_documentation(
    verb: Run, pasted: Pasted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dash leaves the ~ behind = to us, and so does bash."""
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    line = next(text for text in lines if "data=folder data.path=~/pictures" in text)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    photos(tmp_path / "home" / "pictures")
    few = ["data.num_workers=0", "trainer.max_steps=1", "output=trained"]
    outcome = verb("train", *pasted(line)[1:], *TINY, *few)
    assert outcome.status == 0, outcome.err
