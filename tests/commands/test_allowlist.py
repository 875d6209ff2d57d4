"""A configuration from elsewhere is data: it names listed parts of the formula, and whatever else it tries is refused."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from configurations import options
from conftest import REPORT, ROOT, Run
from consistency.checkpoints import ours
from consistency.commands import schema, search
from consistency.errors import UserError
from consistency.runtime import allowlist
from consistency.runtime.allowlist import require_trusted
from consistency.runtime.redaction import masked

GROUPS = ("callbacks", "crop", "data", "evaluation", "logger", "mode", "model", "optimizer", "recipe", "sampler", "trainer")  # fmt: skip


def composed(*overrides: str) -> dict[str, Any]:
    """A resolved configuration of a run, as it stands in its folder and in its checkpoints."""
    schema.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*overrides, "output=/somewhere/run", "teacher=/a/teacher"])
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@pytest.fixture(scope="module")
def honest() -> dict[str, Any]:
    return composed()


def test_every_target_of_our_own_configurations_is_known() -> None:
    found = set()
    for group in GROUPS:
        for file in (ROOT / "conf" / group).rglob("*.yaml"):
            found |= set(re.findall(r"_target_: *([\w.]+)", file.read_text()))
    for file in (ROOT / "experiments").rglob("*.yaml"):
        found |= set(re.findall(r"_target_: *([\w.]+)", file.read_text()))
    assert len(found) > 50
    for target in found:
        require_trusted({"_target_": target}, "conf")


@pytest.mark.parametrize(
    "choice", [f"mode={mode}" for mode in options("mode")] + [f"data={data}" for data in options("data")]
)  # fmt: skip
def test_every_run_of_ours_is_trusted_and_holds_no_secret(choice: str) -> None:
    config = composed(choice)
    require_trusted(config, choice)
    assert masked(config) == config


PARTS = [
    "consistency.distances.L1", "consistency.pairs.RatioPairs", "consistency.networks.mlp.MLP",
    "consistency.preconditioning.TrigFlow", "consistency.weightings.inverse_gap", "torch.optim.SGD", "torch.optim.AdamW",
]  # fmt: skip


@pytest.mark.parametrize("target", PARTS)
def test_parts_that_no_configuration_of_ours_names_are_known(target: str) -> None:
    require_trusted({"_target_": target}, "a run")


def test_every_network_is_known() -> None:
    for file in (ROOT / "src" / "consistency" / "networks").glob("[a-z]*.py"):
        module = f"consistency.networks.{file.stem}"
        for name, value in vars(__import__(module, fromlist=["_"])).items():
            if isinstance(value, type) and value.__module__ == module:
                assert allowlist.is_allowed(f"{module}.{name}")


def test_the_allowlist_names_definitions() -> None:
    for target in allowlist.shipped():
        module, _, name = target.rpartition(".")
        assert callable(getattr(__import__(module, fromlist=[name]), name)), target
        assert not target.startswith("consistency.") or allowlist.named(target) is not None, target


# --------------------------------------------------------------------------- hostile ones


FOREIGN_TARGETS = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "subprocess.run",
    "builtins.eval",
    "builtins.exec",
    "builtins.open",
    "builtins.__import__",
    "importlib.import_module",
    "pickle.loads",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.optim.Optimizer",
    "torch.optim.Adam.__init__",
    "shutil.rmtree",
    "pathlib.Path",
    "urllib.request.urlopen",
    "hydra.utils.get_class",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "lightning.Trainer.fit",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.callbacks.LambdaCallback",
    "lightning.pytorch.loggers.WandbLogger",
    "wandb.init",
    "numpy.load",
    "functools.partial",
    "operator.methodcaller",
]
OWN_TARGETS = [
    # of this package, but they write, download, start processes or build in their turn
    "consistency.checkpoints.ours.write",
    "consistency.checkpoints.load.load",
    "consistency.checkpoints.load.build",
    "consistency.commands.compare._train",
    "consistency.commands.cli.run",
    "consistency.commands.train.train",
    "consistency.checkpoints.pretrained.download",
    "consistency.checkpoints.pretrained.fetch",
    "consistency.data.shards.write_shards",
    "consistency.commands.prepare.prepare",
    "consistency.commands.demo.demo",
    "consistency.commands.demo.library",
    # what a module imports is not its own
    "consistency.distances.torch.load",
    "consistency.distances.torch",
    "consistency.networks.adm.torch.hub.load",
    "consistency.checkpoints.load.os.system",
    "consistency.commands.compare.subprocess.run",
    "consistency.training.lpips.torch.load",
    "consistency.objectives.Denoiser",
    "consistency.samplers.Tensor",
    # no names
    "consistency.distances.",
    "consistency.distances",
    "consistency.distances.L2.__class__",
    "consistency.distances.L2.forward.__globals__",
    "consistency.distances.__builtins__",
    "consistency.distances.__loader__",
    "consistency..distances.L2",
    "consistency.distances.L2 ",
    "consistency.distances/L2",
    "consistency.nowhere.L2",
    "consistency",
    "",
]
ODD_TARGETS: list[Any] = [None, 3, True, ["os", "system"], {"_target_": "os.system"}, ("a",)]

Change = Callable[[dict[str, Any]], None]
STEP = ("mode", "objective", "distance")


def at(config: dict[str, Any], *way: str) -> Any:
    for name in way:
        config = config[name]
    return config


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


def doubled(levels: int) -> Any:
    """A list that holds the one before twice: short to store, endless to walk."""
    value: Any = []
    for _ in range(levels):
        value = [value, value]
    return value


CHANGES: dict[str, Change] = {
    "arguments by place": lambda c: at(c, *STEP).update(_args_=["x"]),
    "recursion": lambda c: at(c, *STEP).update(_recursive_=False),
    "conversion": lambda c: at(c, *STEP).update(_convert_="object"),
    "an unknown word": lambda c: at(c, *STEP).update(_mode_="x"),
    "partial by text": lambda c: at(c, *STEP).update(_partial_="os.system"),
    "partial by node": lambda c: at(c, *STEP).update(_partial_={"_target_": "os.system"}),
    "target in a list": lambda c: at(c, *STEP).update(c=[{"_target_": "os.system"}]),
    "target in lists": lambda c: c.update(seed=[[[{"x": [{"_target_": "os.system"}]}]]]),
    "target in a tuple": lambda c: c.update(seed=({"_target_": "os.system"},)),
    "target in no node": lambda c: c["data"].update(path={"_target_": "os.system"}),
    "target at the top": lambda c: c.update(_target_="os.system"),
    "target below a good one": lambda c: c["trainer"].update(
        profiler={"_target_": "lightning.pytorch.profilers.AdvancedProfiler"}
    ),
    "target interpolated": lambda c: at(c, *STEP).update(_target_="${oc.env:HOME}"),
    "environment": lambda c: c["data"].update(path="${oc.env:HOME}"),
    "environment amid text": lambda c: c["data"].update(path="s3://x/${oc.env:WANDB_API_KEY}"),
    "decoded": lambda c: c["data"].update(path="${oc.decode:'x'}"),
    "created": lambda c: c["data"].update(path="${oc.create:{_target_: os.system}}"),
    "hydra": lambda c: c["data"].update(path="${hydra:runtime.cwd}"),
    "nested": lambda c: c["data"].update(path="${${seed}}"),
    "escaped": lambda c: c["data"].update(path="\\${oc.env:HOME}"),
    "in a list": lambda c: c["data"].update(path=["${oc.env:HOME}"]),
    "in a key": lambda c: c["data"].update({"${oc.env:HOME}": 1}),
    "a key of bytes": lambda c: c["data"].update({b"x": 1}),
    "a key of numbers": lambda c: c["data"].update({3: 1}),
    "bytes": lambda c: c["data"].update(path=b"x"),
    "a path object": lambda c: c["data"].update(path=Path("/x")),
    "a tensor": lambda c: c["data"].update(path=torch.zeros(1)),
    "a function": lambda c: c["data"].update(path=os.system),
    "a set": lambda c: c["data"].update(path={"x"}),
    "too deep": lambda c: c["data"].update(path=deep(1000)),
    "endless": lambda c: c["data"].update(path=doubled(60)),
    "itself": lambda c: c["data"].update(path=c),
    "too many": lambda c: c["data"].update(path=list(range(100_000))),
    "too long": lambda c: c["data"].update(path="x" * 100_000),
    "too long a key": lambda c: c["data"].update({"x" * 100_000: 1}),
    "metrics over a file of the person": lambda c: c["logger"]["csv"].update(path="/home/x/.bashrc"),
    "metrics above": lambda c: c["logger"]["csv"].update(path="/somewhere/run/../../etc/x"),
    "metrics where the command runs": lambda c: c["logger"]["csv"].update(path=".bashrc"),
    "checkpoints where the command runs": lambda c: c["callbacks"]["checkpoint"].update(folder="x"),
    "everything where the command runs": lambda c: (c.update(output="."), c["logger"]["csv"].update(path=".bashrc")),
    "metrics at home": lambda c: c["logger"]["csv"].update(path="~/.bashrc"),
    "checkpoints elsewhere": lambda c: c["callbacks"]["checkpoint"].update(folder="/home/x"),
    "checkpoints beside": lambda c: c["callbacks"]["checkpoint"].update(folder="/somewhere/run2"),
    "evaluation elsewhere": lambda c: c["callbacks"]["evaluation"].update(folder="/home/x"),
    "the mode's callbacks elsewhere": lambda c: c["mode"]["callbacks"].update(
        x={**c["callbacks"]["checkpoint"], "folder": "/home/x"}
    ),
    "the trainer's folder elsewhere": lambda c: c["trainer"].update(default_root_dir="/home/x"),
    "a program that W&B starts": lambda c: c["logger"]["wandb"]["settings"].update(x_executable="x"),
    "another server of W&B": lambda c: c["logger"]["wandb"].update(base_url="https://elsewhere"),
    "no output": lambda c: c.pop("output"),
}  # fmt: skip


def changed(config: dict[str, Any], change: Change) -> dict[str, Any]:
    copy = json.loads(json.dumps(config))
    change(copy)
    return copy


@pytest.fixture
def tripwires(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever the hostile configurations would call writes its name here instead."""
    called: list[str] = []
    for owner, name in ((os, "system"), (subprocess, "run"), (torch, "load"), (torch.hub, "load")):
        monkeypatch.setattr(owner, name, lambda *_, said=name, **__: called.append(said))
    return called


def test_hostile_configurations_are_refused_before_anything_is_built(
    honest: dict[str, Any],
    tripwires: list[str],
    record_property: Callable[[str, object], None],
) -> None:
    require_trusted(honest, "an honest run")
    nodes = [
        STEP,
        ("model", "network"),
        ("data", "source"),
        ("callbacks", "progress"),
        ("trainer",),
    ]
    hostile = [changed(honest, change) for change in CHANGES.values()]
    targets = [*FOREIGN_TARGETS, *OWN_TARGETS, *ODD_TARGETS]
    for target in targets:
        hostile += [
            changed(honest, lambda c, t=target, n=n: at(c, *n).update(_target_=t)) for n in nodes
        ]
    for config in hostile:
        with pytest.raises(UserError, match="expected a configuration of plain values") as error:
            require_trusted(config, "a hostile file")
        assert len(str(error.value)) < 700
    assert not tripwires
    record_property(
        REPORT,
        f"configurations: {len(hostile)} hostile ones ({len(CHANGES)} tricks; {len(targets)} targets at {len(nodes)} places) refused",
    )  # fmt: skip


# ------------------------------------------------------------------------------- files

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)  # fmt: skip
FILES = {
    "aliases of aliases": (BOMB, "stand for others"),
    "one alias": ("output: &x /o\nteacher: *x\n", "stand for others"),
    "a python call": ("x: !!python/object/apply:os.system [true]\n", "ConstructorError"),
    "a python name": ("x: !!python/name:os.system\n", "ConstructorError"),
    "a python object": ("x: !!python/object/new:os.system [true]\n", "ConstructorError"),
    "a path": ("x: !!python/object/apply:pathlib.PosixPath [/etc]\n", "PosixPath"),
    "two documents": ("a: 1\n---\nb: 2\n", "ComposerError"),
    "two of a name": ("a: 1\na: 2\n", "ConstructorError"),
    "a list": ("- a\n", "a list"),
    "deep": ("[" * 50_000, "something else"),
    "zeros": ("\0" * 100, "something else"),
    "too large": ("x: " + "y" * (1 << 19), "at most"),
    "an interpolation": ("x: ${oc.env:HOME}\n", "an interpolation"),
    "a target": ("x: {_target_: os.system, command: touch hit}\n", "os.system"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_one_error(name: str, tmp_path: Path, tripwires: list[str]) -> None:
    text, hint = FILES[name]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=hint):
        allowlist.read(tmp_path / "config.yaml")
    assert not tripwires


def test_the_configuration_of_a_run_reads_back(trained: dict[str, Path]) -> None:
    for folder in trained.values():
        config = allowlist.read(folder / "config.yaml")
        content = ours.read(folder / "checkpoints" / "last.ckpt")
        assert config == content["config"]
        assert config == yaml.safe_load((folder / "config.yaml").read_text())


# ------------------------------------------------------------------ where they are used


def test_a_search_builds_nothing_that_a_checkpoint_names_but_our_sources(
    trained: dict[str, Path], tmp_path: Path, tripwires: list[str]
) -> None:
    content = ours.read(trained["ect"] / "checkpoints" / "last.ckpt")
    content["config"]["callbacks"]["evaluation"] = composed()["callbacks"]["evaluation"]
    content["config"]["callbacks"]["evaluation"]["folder"] = content["config"]["output"]
    for number, node in enumerate(
        [
            {"_target_": "os.system", "command": "true"},
            {"_target_": "consistency.checkpoints.pretrained.download", "url": "x", "path": "y"},
            {"_target_": "consistency.data.digits.Digits", "split": {"_target_": "torch.hub.load"}},
        ]
    ):
        content["config"]["data"]["held_out"] = node
        ours.write(content, tmp_path / f"{number}.ckpt")
        with pytest.raises(UserError, match=r"the target"):
            search.measure_of(OmegaConf.create({}), tmp_path / f"{number}.ckpt")
    assert not tripwires


@pytest.mark.parametrize(
    "times",
    [{"_target_": "os.system", "command": "true"}, "${oc.env:HOME}", [80.0, {"_target_": "os.system"}], [80.0, "1"], [True], None],
    ids=str,
)  # fmt: skip
def test_time_points_found_elsewhere_are_numbers(
    times: object, verb: Run, trained: dict[str, Path], tmp_path: Path, tripwires: list[str]
) -> None:
    weights = tmp_path / "model.ckpt"
    weights.write_bytes((trained["ect"] / "checkpoints" / "last.ckpt").read_bytes())
    (tmp_path / "model.ckpt.searched.json").write_text(json.dumps({"times": times}))
    outcome = verb(
        "sample", f"checkpoint={weights}", "sampler=searched", f"output={tmp_path / 'out'}"
    )
    assert outcome.status == 2
    assert "expected time points" in outcome.err
    assert not tripwires
