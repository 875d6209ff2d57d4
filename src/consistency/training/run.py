"""From a configuration to a finished run."""

import logging
import math
import shlex
import sys
import warnings
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from consistency.checkpoint import find, load_initial
from consistency.command import ROOT, called, shell_line
from consistency.data.held import kept
from consistency.data.module import DataModule
from consistency.denoiser import Denoiser
from consistency.errors import require
from consistency.inference.card import ModelCard
from consistency.masking import masked
from consistency.runtime.files import fingerprint
from consistency.runtime.ranks import is_first, require_launched
from consistency.training.arguments import plugins_of, require_taken, require_whole
from consistency.training.callbacks.checkpoints import AtomicCheckpointIO, RunCheckpoints
from consistency.training.callbacks.evaluation import Evaluation
from consistency.training.callbacks.pictures import SampleGrids
from consistency.training.faults import explained
from consistency.training.launch import one_job
from consistency.training.logging import (
    MetricsFile,
    PatientTensorBoardLogger,
    PatientWandbLogger,
)
from consistency.training.module import ConsistencyModule
from consistency.training.resuming import Start, begin, keep_config
from consistency.training.rotation import settle


def quiet() -> None:
    """Silences what Lightning says on every run and nobody acts on; everything else stays."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for known in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r"Found \d+ module\(s\) in eval mode.*",
        r".*does not have many workers.*",
        r".*torch.jit.script. is deprecated.*",
        r"You're resuming from a checkpoint that ended before the epoch ended.*",  # our order knows its place
    ):
        warnings.filterwarnings("ignore", message=known)


def build_data(config: DictConfig) -> DataModule:
    """The data module; fails where the data are not as the configuration says."""
    node = config.data
    return DataModule(
        source=kept(instantiate(node.source, _partial_=True), node.in_memory),
        held_out=instantiate(node.held_out, _partial_=True) if node.held_out else None,
        image_size=node.image_size,
        channels=node.channels,
        num_classes=node.num_classes,
        batch_size=node.batch_size,
        device_batch_size=node.device_batch_size,
        num_workers=node.num_workers,
        flip=node.flip,
        seed=config.seed,
        allow_reorder=node.allow_reorder,
    )


def describe(config: DictConfig, data: DataModule | None = None) -> ModelCard:
    """The card of the denoiser that this configuration trains, with the names of the classes in `data`."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    names = [] if data is None else list(getattr(data.train_source, "class_names", []))
    saved = {
        "role": plain["mode"]["role"],
        "network": plain["model"]["network"],
        "preconditioning": plain["mode"]["sampling_preconditioning"],
        "process": plain["mode"]["process"],
        "image": {"channels": plain["data"]["channels"], "size": plain["data"]["image_size"]},
        "num_classes": plain["data"]["num_classes"],
        "class_names": names if len(names) == plain["data"]["num_classes"] else [],
    }
    return ModelCard.parse(saved, "this configuration")


def build_module(config: DictConfig, data: DataModule | None = None) -> ConsistencyModule:
    """Network, objective and optimizer of the configuration; loads teacher and initial weights.

    Without `data` it trains on any loader of (images, labels) in a Lightning trainer of one's own, to which it brings its
    schedules and averages:

        L.Trainer(max_steps=1000).fit(build_module(config), loader)
    """
    _require_fit(config)
    network: nn.Module = instantiate(config.model.network, _convert_="all")
    optimizer = instantiate(config.optimizer, _convert_="all")
    _try_optimizer(optimizer)
    if config.init is not None:
        load_initial(
            config.init,
            network,
            weights=config.init_weights,
            c_noise_scale=config.model.c_noise_scale,
        )
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return ConsistencyModule(
        online=Denoiser(network, instantiate(config.mode.preconditioning)),
        objective=instantiate(config.mode.objective, _convert_="all"),
        sampling_preconditioning=instantiate(config.mode.sampling_preconditioning),
        optimizer=optimizer,
        card=describe(config, data),
        config=masked({str(key): value for key, value in plain.items()}),
        seed=config.seed,
        on_nonfinite=config.on_nonfinite,
        sources=_sources(config),
        callbacks=tuple if data is not None else partial(method_callbacks, config),
    )


def _sources(config: DictConfig) -> dict[str, dict[str, str]]:
    """Path, choice of weights and SHA-256 of the checkpoints that the run begins with."""
    named = {"init": config.init}
    if _holds(OmegaConf.to_container(config.mode, resolve=True), config.teacher):
        named["teacher"] = config.teacher
    return {
        name: {
            "path": str(find(path).absolute()),
            "weights": config[f"{name}_weights"],
            "sha256": fingerprint(find(path)),
        }
        for name, path in named.items()
        if path is not None
    }


def _holds(node: Any, value: object) -> bool:
    """Whether a value stands anywhere in a configuration."""
    if isinstance(node, dict | list):
        return any(
            _holds(each, value) for each in (node.values() if isinstance(node, dict) else node)
        )
    return bool(node == value)


def _require_fit(config: DictConfig) -> None:
    """Tries the network's shapes on the data's, without computing, so that a mismatch is told before anything is built."""
    data = config.data
    image = (1, data.channels, data.image_size, data.image_size)
    shape, reason = None, ""
    with torch.device("meta"):
        network = instantiate(config.model.network, _convert_="all")
        label = None if data.num_classes is None else torch.zeros(1, dtype=torch.long)
        try:
            shape = network(torch.zeros(image), torch.zeros(1), label).shape
            reason = f"one that returns shape {tuple(shape)}"
        except (ValueError, RuntimeError) as error:
            reason = str(error)
    require(
        shape == image,
        f"a network model= for data of shape {image[1:]} with {data.num_classes or 'no'} classes",
        reason,
        "choose another model=, or set data.image_size, data.channels, data.num_classes",
    )


def _try_optimizer(optimizer: Any) -> None:
    try:
        optimizer([nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError) as error:
        require(False, "settings that the optimizer takes", error, "change optimizer.*")


def _try_samplers(config: DictConfig) -> None:
    """Draws one value with every sampler and a denoiser that knows nothing, so that wrong time points are told now."""
    for node in config.mode.samplers.values():
        sampler = instantiate(node, _convert_="all")
        sampler(lambda x, t, label: 0 * x, lambda: torch.zeros(1, 1, 1, 1), None)


def build_callbacks(config: DictConfig) -> list[Callback]:
    """The mode's callbacks, then the run's; a null or empty node is switched off."""
    require(
        config.mode.total_steps >= 1,
        "mode.total_steps >= 1, the length of the schedules",
        config.mode.total_steps,
        "leave it out: it is trainer.max_steps",
    )
    named = {**config.mode.callbacks, **config.callbacks}
    for name, node in named.items():
        require(
            not node or "_target_" in node,
            f"callbacks.{name} with a _target_, or null",
            f"settings of no callback: {', '.join(map(str, node or []))}",
            f"to switch a callback off, also where a recipe sets it, say callbacks.{name}=null",
        )
    return [instantiate(node, _convert_="all") for node in named.values() if node]


def method_callbacks(config: DictConfig) -> list[Callback]:
    """What trains along with the weights: the mode's callbacks, the rate's schedule and the averages for samples."""
    names = ("learning_rate", "evaluation_ema")
    nodes = [*config.mode.callbacks.values(), *(config.callbacks.get(name) for name in names)]
    return [instantiate(node, _convert_="all") for node in nodes if node]


def build_loggers(config: DictConfig) -> list[Logger]:
    """The loggers of the configuration, those of a person's own among them; a null node is switched off."""
    loggers = [instantiate(node, _convert_="all") for node in config.logger.values() if node]
    for logger in loggers:
        require(
            isinstance(logger, Logger),
            "logger.<name> with the _target_ of one of Lightning's loggers, or null",
            f"{type(logger).__name__}",
            "choose logger=csv, wandb, tensorboard or none, or add +logger.<name>._target_=...",
        )
    return loggers


def train(config: DictConfig, output: Path) -> float:
    """Trains as the configuration says and leaves everything in the folder `output`; returns `value_of` the run."""
    if not HydraConfig.initialized():  # a configuration of Hydra's own `compose`
        config.output = str(output)
        return called(train, config, "train")
    quiet()
    start = begin(config, output)
    config = start.config
    require_taken(config.trainer)
    require(config.seed >= 0, "seed >= 0", config.seed, "give another seed")
    require(
        config.trainer.max_steps >= 1,
        "trainer.max_steps >= 1",
        config.trainer.max_steps,
        "give the number of optimizer steps",
    )
    if start.checkpoint is not None and start.step >= config.trainer.max_steps:
        if is_first():
            settle(start.checkpoint)
            print("All its steps are done; trainer.max_steps=<more> makes it longer.")
        return start.value
    L.seed_everything(config.seed, workers=True, verbose=False)
    with one_job(), explained():
        loggers = build_loggers(config)
        data = build_data(config)
        module = build_module(config, data)
        _try_samplers(config)
        callbacks = [*build_callbacks(config), losses := LastLosses()]
        trainer = build_trainer(config, callbacks, loggers, data)
        require_launched(trainer.num_devices, trainer.num_nodes, "trainer.")
        if trainer.is_global_zero:
            output.mkdir(parents=True, exist_ok=True)
            keep_config(module.config, output)
            _announce(start, module, output)
            print(data.summary(trainer.world_size), flush=True)
            for logger in loggers:
                if isinstance(logger, MetricsFile | PatientTensorBoardLogger):
                    logger.cut(start.step)
        for logger in loggers:
            logger.log_hyperparams(module.config)
        trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint and str(start.checkpoint))
        value, name = value_of(trainer, losses)
        if trainer.is_global_zero:
            _conclude(config, trainer, output)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                print(f"Value of this job: {value:.6g}, {name}", flush=True)
        return value


class LastLosses(Callback):
    """The losses of the last optimizer steps of this process, up to 100 micro-batches."""

    def __init__(self) -> None:
        self.values: deque[Tensor] = deque(maxlen=100)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *rest: Any
    ) -> None:
        self.values.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)


def value_of(trainer: L.Trainer, losses: LastLosses) -> tuple[float, str]:
    """What a sweeper minimises, and its name: the lowest value of what the checkpoints monitor, else the last one of the
    evaluation's own metric; where nothing is measured, the mean of the last losses. NaN where there is no number.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunCheckpoints) and callback.monitor is not None:
            best = callback.best_value
            return best if math.isfinite(best) else math.nan, f"the lowest {callback.monitor}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Evaluation):
            return float(trainer.callback_metrics[callback.monitor]), f"the last {callback.monitor}"
    found = torch.stack(list(losses.values)).mean().item() if losses.values else math.nan
    return found, f"the mean of the last {len(losses.values)} losses, as nothing is evaluated"


def build_trainer(
    config: DictConfig, callbacks: list[Callback], loggers: list[Any], data: DataModule
) -> L.Trainer:
    """Lightning's Trainer: one endless epoch, our own order of the data, whole checkpoints."""
    trainer: L.Trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[*plugins_of(config.trainer), AtomicCheckpointIO()],
        max_epochs=1,
        # Where a callback is switched off, Lightning would put its own in its place.
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        log_every_n_steps=min(config.trainer.log_every_n_steps, config.trainer.max_steps),
        use_distributed_sampler=False,
        _convert_="all",
    )
    require_whole(trainer.strategy)
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    return trainer


@rank_zero_only
def _announce(start: Start, module: ConsistencyModule, output: Path) -> None:
    config = start.config
    choices: Any = HydraConfig.get().runtime.choices
    millions = sum(p.numel() for p in module.online.parameters()) / 1e6
    size = f"{millions:.2f} M parameters, {config.trainer.max_steps} optimizer steps of {config.data.batch_size} images"
    if start.resumed:
        print(size)
    else:
        named = [f"{name}={choices[name]}" for name in ("mode", "data", "model") if name in choices]
        print(f"{' '.join(named)}: {size}" if named else size)
        pair = f"{choices.get('data')}_{choices.get('mode')}"
        if named and not (ROOT / "conf" / "recipe" / f"{pair}.yaml").is_file():
            print(f"No recipe conf/recipe/{pair}.yaml: the mode's own defaults are used.")
        if config.init != config.mode.init:
            print(f"init={config.init}: the published choice for this mode is {config.mode.init}.")
    for name, source in module.sources.items():
        print(f"{name}: {source['path']} ({source['weights']}, sha256 {source['sha256'][:12]})")
        if (begun := start.sources.get(name, source)["sha256"]) != source["sha256"]:
            print(f"  another file than the run was begun with, sha256 {begun[:12]}")
    print(f"Run folder: {output}", flush=True)


def _sampler_choice(config: DictConfig) -> str:
    """The option of sampler= for the mode's first sampler."""
    target = next((node._target_ for node in config.mode.samplers.values()), None)
    files = sorted((ROOT / "conf" / "sampler").glob("*.yaml"))
    named = [p.stem for p in files if OmegaConf.select(OmegaConf.load(p), "_target_") == target]
    return next(iter(named), "onestep")


def _conclude(config: DictConfig, trainer: L.Trainer, output: Path) -> None:
    print()
    source = trainer.datamodule.train_source  # type: ignore[attr-defined]
    if left_out := getattr(source, "left_out", 0):
        print(f"Left out:   {left_out:,} images that cannot be used, named at the start")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunCheckpoints):
            print(f"Checkpoint: {callback.last}")
        if isinstance(callback, SampleGrids):
            print(f"Samples:    {callback.newest}")
        if isinstance(callback, Evaluation):
            print(callback.table())
    options = [
        f"checkpoint={output}",
        f"sampler={_sampler_choice(config)}",
        "num_samples=64",
        f"output={output / 'samples_64'}",
    ]
    for logger in trainer.loggers:
        if isinstance(logger, PatientWandbLogger) and logger.offline_folders:
            sync = [sys.executable, "-m", "wandb", "sync", *map(str, logger.offline_folders)]
            print(f"W&B:        offline; upload with\n  {shlex.join(sync)}")
    print(f"Continue with:\n  {shell_line('sample', *options)}")
