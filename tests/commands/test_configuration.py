"""Every YAML composes, and what it names can be built."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import originals
from configurations import composed, options
from conftest import MODES, ROOT
from consistency.checkpoints.load import NETWORKS, PRECONDITIONING, build
from consistency.errors import UserError
from consistency.training import build as training

CONF = ROOT / "conf"
PNG = originals.encoded(Image.fromarray(originals.noise(70, 80, 3)))
TRAIN_GROUPS = (
    "callbacks",
    "data",
    "evaluation",
    "logger",
    "mode",
    "model",
    "optimizer",
    "trainer",
)
PLACES = {"evaluation": "evaluation@callbacks.evaluation"}
NEEDS = {
    "teacher": "teacher=",
    "path": "data.path",
    "backbone": "weights",
}


def build_all(config: DictConfig, folder: Path, trained: dict[str, Path]) -> None:
    """Builds every node of a training configuration; big networks without memory, absent files as their own error."""
    config.output = str(folder / "run")
    config.teacher = str(trained["ect" if "first_stage" in config.mode.objective else "edm"])
    OmegaConf.resolve(config)
    with torch.device("meta"):
        network = instantiate(config.model.network, _convert_="all")
    assert sum(p.numel() for p in network.parameters()) > 0
    for node in (config.data.source, config.data.held_out):
        tolerate(node, "data.path")
    for node in (config.mode.preconditioning, config.mode.sampling_preconditioning):
        build(OmegaConf.to_container(node), PRECONDITIONING, object)
    tolerate(config.mode.objective, "weights")
    for node in config.mode.samplers.values():
        instantiate(node, _convert_="all")
    assert training.build_callbacks(config)
    instantiate(config.optimizer, _convert_="all")([torch.nn.Parameter(torch.zeros(1))])
    for node in config.logger.values():
        instantiate(node)
    assert training.describe(config).role in ("teacher", "consistency")


def tolerate(node: Any, hint: str) -> None:
    """Builds a node; the only failure let through is the project's own message about a file that is not there."""
    if not node:
        return
    try:
        instantiate(node, _convert_="all")
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None or hint not in str(cause):
            raise


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in TRAIN_GROUPS for o in options(g)])
def test_every_option_composes_and_builds(
    group: str,
    option: str,
    tmp_path: Path,
    trained: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = composed("train", f"{PLACES.get(group, group)}={option}", "data.download=false")
    build_all(config, tmp_path, trained)


def pair_of(recipe: str) -> tuple[str, str]:
    """The data set and the mode of a recipe's name."""
    return next((recipe[: -len(mode) - 1], mode) for mode in MODES if recipe.endswith(f"_{mode}"))


def slow_unless_run(names: list[str], folder: Path) -> list[Any]:
    """The names as parameters. To build a run that nobody has begun here is slow; of the published ones test_published_runs.py
    compares the leaves.
    """
    texts = {name: (folder / f"{name}.yaml").read_text() for name in names}
    begun = {name: not re.search("published:|not run", text, re.I) for name, text in texts.items()}
    return [pytest.param(name, marks=[] if begun[name] else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("recipe", slow_unless_run(options("recipe"), CONF / "recipe"))
def test_every_recipe_belongs_to_a_pair_and_builds(
    recipe: str, tmp_path: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    data, mode = pair_of(recipe)
    assert data in options("data")
    config = composed("train", f"data={data}", f"mode={mode}", "data.download=false")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        written = compose(f"recipe/{recipe}")
    assert config.trainer.max_steps == written.trainer.max_steps
    build_all(config, tmp_path, trained)


EXPERIMENTS = [
    str(p.relative_to(ROOT / "experiments").with_suffix("")) for p in (ROOT / "experiments").rglob("*.yaml")
]  # fmt: skip


@pytest.mark.parametrize("experiment", slow_unless_run(EXPERIMENTS, ROOT / "experiments"))
def test_every_experiment_builds_and_states_its_result(
    experiment: str, tmp_path: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = composed("train", f"experiment={experiment}", "data.download=false")
    build_all(config, tmp_path, trained)
    text = (ROOT / "experiments" / f"{experiment}.yaml").read_text()
    for word in ("Published:", "Command:", "Ours:"):
        assert word in text


@pytest.mark.parametrize("sampler", [s for s in options("sampler") if s != "searched"])
def test_every_sampler_builds_for_a_checkpoint(sampler: str, trained: dict[str, Path]) -> None:
    from consistency.checkpoints.load import load
    from consistency.inference.options import fill_process

    config = composed("sample", f"sampler={sampler}", f"checkpoint={trained['ect']}")
    fill_process(config, config.sampler, load(trained["ect"]))
    assert callable(instantiate(config.sampler, _convert_="all"))
    listed = composed("evaluate", f"samplers=[{sampler}]")
    assert list(listed.samplers) == [sampler]
    assert listed.samplers[sampler].keys() == config.sampler.keys()


def test_the_command_line_wins_over_recipe_and_experiment() -> None:
    assert composed("train").optimizer.lr == 2e-3
    assert composed("train", "optimizer.lr=0.5").optimizer.lr == 0.5
    assert composed("train", "experiment=lsun_bedroom_ct").trainer.precision == "16-mixed"
    config = composed("train", "experiment=lsun_bedroom_ct", "trainer.precision=32-true", "mode=cd")
    assert config.trainer.precision == "32-true"
    assert config.mode.step if "step" in config.mode else config.mode.objective.step.teacher


def test_the_benchmark_chooses_as_training_does() -> None:
    """The same groups and keys, so that a line for train.py is one for benchmark.py."""
    for overrides in ([], ["data=lsun_bedroom", "mode=ct"], ["data=stream"]):
        train, benchmark = composed("train", *overrides), composed("benchmark", *overrides)
        for key in ("model", "mode", "optimizer", "data", "trainer"):
            assert train[key] == benchmark[key], key


def test_nothing_of_one_recipe_reaches_another_pair() -> None:
    """What the default recipe sets is as the groups say for a pair without a recipe."""
    other = composed("train", "data=folder", "mode=ect")
    average = OmegaConf.load(CONF / "parts" / "average.yaml").constant
    assert other.trainer.max_steps == OmegaConf.load(CONF / "trainer" / "default.yaml").max_steps
    assert other.optimizer.lr == OmegaConf.load(CONF / "optimizer" / "radam.yaml").lr
    assert list(other.callbacks.evaluation_ema.decays) == list(average.decays)
    assert other.callbacks.checkpoint.every_n_train_steps == 5000
    assert other.mode.rate == "constant"


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (CONF / "recipe").glob("*.yaml")))
def test_no_average_reaches_over_more_than_a_quarter_of_its_run(recipe: str) -> None:
    data, mode = pair_of(recipe)
    config = composed("train", f"data={data}", f"mode={mode}", "teacher=x")
    ema, steps = config.callbacks.evaluation_ema, config.trainer.max_steps
    if ema is not None:
        assert all(4 / (1 - decay) <= steps for decay in ema.get("decays", ()))
        assert all(4 * width <= 1 for width in ema.get("widths", ()))


def test_consistency_training_on_lsun_is_as_published() -> None:
    """Song et al. 2023, launch script: network, constant rate, N(k) 2 to 150, mu_0 .95, LPIPS, batch 256."""
    config = composed("train", "mode=ct", "data=lsun_bedroom")
    assert config.model.network.model_channels == 256
    assert list(config.model.network.channel_mult) == [1, 1, 2, 2, 4, 4]
    assert config.model.c_noise_scale == 250.0
    assert config.optimizer._target_ == "consistency.training.optimizers.RAdam"
    assert config.optimizer.lr == 5e-5
    assert config.callbacks.learning_rate.factor._target_ == "consistency.schedules.constant_rate"
    assert config.data.batch_size == 256
    assert config.data.flip is True
    assert config.mode.objective.distance._target_ == "consistency.training.lpips.load_lpips"
    scales, decay = (
        config.mode.callbacks.scale_schedule.num_scales,
        config.mode.callbacks.target_ema.decay,
    )
    assert (scales.s_0, scales.s_1, scales.total_steps) == (2, 150, 1_000_000)
    assert (decay.s_0, decay.mu_0) == (2, 0.95)
    assert next(iter(config.callbacks.evaluation_ema.decays)) == 0.9999
    assert config.init == "openai:edm_bedroom256_ema"


def test_a_card_from_elsewhere_builds_nothing_but_our_networks() -> None:
    for target in (
        "os.system",
        "torch.load",
        "consistency.checkpoints.load.load",
        "consistency.networks.adm.torch",
    ):
        with pytest.raises(UserError, match="class of consistency"):
            build({"_target_": target}, NETWORKS, torch.nn.Module)
    with pytest.raises(UserError, match="plain"):
        build(
            {"_target_": "consistency.networks.mlp.MLP", "channels": {"_target_": "os.getcwd"}},
            NETWORKS,
            torch.nn.Module,
        )


@pytest.mark.parametrize("crop", options("crop"))
def test_every_crop_prepares_and_trains(crop: str) -> None:
    prepared = composed("prepare", f"crop={crop}", "source=/nowhere")
    trained = composed("train", "data=folder", f"crop@data.source.crop={crop}")
    for node in (prepared.crop, trained.data.source.crop):
        assert instantiate(node)(Image.new("RGB", (30, 20)), 8).size == (8, 8)


def test_a_published_set_may_come_from_its_prepared_zip(tmp_path: Path) -> None:
    """As docs/recipes.md says: only the class that reads is another."""
    originals.write_archive(
        tmp_path / "a.zip", [("a.png", PNG), ("b.png", PNG)], [["a.png", 0], ["b.png", 999]]
    )
    for name, classes in (("imagenet64", True), ("folder", False)):
        config = composed(
            "train", f"data={name}", f"data.path={tmp_path / 'a.zip'}",
            "data.source._target_=consistency.data.zip_or_folder.Archive",
        )  # fmt: skip
        source = instantiate(config.data.source)
        assert source[1][0].shape == (3, config.data.image_size, config.data.image_size)
        assert source[1][1] == (999 if classes else 0)
