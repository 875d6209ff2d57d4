"""The parts of a run, built from its configuration: data, module, callbacks, loggers, trainer."""

import json
import logging
import warnings
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from consistency.checkpoints.load import find, load_initial
from consistency.data.module import DataModule
from consistency.denoiser import Denoiser
from consistency.errors import UserError, require
from consistency.inference.card import ModelCard
from consistency.runtime.files import fingerprint
from consistency.runtime.redaction import masked
from consistency.training.arguments import plugins_of, require_whole
from consistency.training.lightning_patches import AtomicCheckpointIO
from consistency.training.module import ConsistencyModule


def quiet() -> None:
    """Silence the messages that Lightning prints on every run and that call for no action."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r"Found \d+ module\(s\) in eval mode.*",
        r".*does not have many workers.*",
        r".*torch.jit.script. is deprecated.*",
        r"You're resuming from a checkpoint that ended before the epoch ended.*",  # our order has positions
    ):
        warnings.filterwarnings("ignore", message=message)


def build_data(config: DictConfig) -> DataModule:
    """Build the data module; raises `UserError` if the data contradict the configuration."""
    node = config.data
    names = "image_size channels num_classes batch_size device_batch_size num_workers flip in_memory allow_reorder"
    return DataModule(
        source=instantiate(node.source, _partial_=True),
        held_out=instantiate(node.held_out, _partial_=True) if node.held_out else None,
        seed=config.seed,
        **{name: node[name] for name in names.split()},
    )


def describe(config: DictConfig, data: DataModule | None = None) -> ModelCard:
    """Return the card of the denoiser, with the names of the classes of `data`."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    mode, shape = plain["mode"], plain["data"]
    names = [] if data is None else list(data.train_source.class_names)
    saved = {
        "role": mode["role"],
        "network": plain["model"]["network"],
        "preconditioning": mode["sampling_preconditioning"],
        "process": mode["process"],
        "image": {"channels": shape["channels"], "size": shape["image_size"]},
        "num_classes": shape["num_classes"],
        "class_names": names if len(names) == shape["num_classes"] else [],
    }
    return ModelCard.parse(saved, "this configuration")


def build_module(config: DictConfig, data: DataModule | None = None) -> ConsistencyModule:
    """Build network, objective and optimizer, and load teacher and initial weights.

    Without `data` the module brings its schedules and averages itself, and trains on any loader of (images, labels):

        L.Trainer(max_steps=1000).fit(build_module(config), loader)
    """
    _require_fit(config)
    network: nn.Module = instantiate(config.model.network, _convert_="all")
    optimizer = instantiate(config.optimizer, _convert_="all")
    try:
        optimizer([nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError) as error:
        remedy = "change optimizer.*"
        raise UserError("settings that the optimizer takes", error, remedy) from error
    if config.init is not None:
        scale = config.model.c_noise_scale
        load_initial(config.init, network, weights=config.init_weights, c_noise_scale=scale)
    shared = (config.callbacks.get(name) for name in ("learning_rate", "evaluation_ema"))
    method = [*config.mode.callbacks.values(), *shared]
    return ConsistencyModule(
        online=Denoiser(network, instantiate(config.mode.preconditioning)),
        objective=instantiate(config.mode.objective, _convert_="all"),
        sampling_preconditioning=instantiate(config.mode.sampling_preconditioning),
        optimizer=optimizer,
        card=describe(config, data),
        config=masked(OmegaConf.to_container(config, resolve=True)),
        seed=config.seed,
        on_nonfinite=config.on_nonfinite,
        sources=_sources(config),
        callbacks=tuple if data is not None else lambda: _built(*method),
    )


def _sources(config: DictConfig) -> dict[str, dict[str, str]]:
    """Return path, weights and SHA-256 of the checkpoints that the run begins with; a teacher is part of the mode."""
    mode = json.dumps(OmegaConf.to_container(config.mode, resolve=True))
    sources = {}
    for name in ("init", "teacher") if json.dumps(config.teacher) in mode else ("init",):
        if config[name] is not None:
            path, weights = find(config[name]).absolute(), config[f"{name}_weights"]
            sources[name] = {"path": str(path), "weights": weights, "sha256": fingerprint(path)}
    return sources


def _require_fit(config: DictConfig) -> None:
    """Compare the network's shapes with the data's, on the meta device, before anything is built."""
    data, shape = config.data, None
    image = (1, data.channels, data.image_size, data.image_size)
    with torch.device("meta"):
        network = instantiate(config.model.network, _convert_="all")
        label = None if data.num_classes is None else torch.zeros(1, dtype=torch.long)
        try:
            shape = network(torch.zeros(image), torch.zeros(1), label).shape
            got = f"one that returns shape {tuple(shape)}"
        except (ValueError, RuntimeError) as error:
            got = str(error)
    expected = f"a network for data of shape {image[1:]} with {data.num_classes or 'no'} classes"
    remedy = "choose another model=, or set data.image_size, data.channels, data.num_classes"
    require(shape == image, expected, got, remedy)


def try_samplers(config: DictConfig) -> None:
    """Draw one value with every sampler and a denoiser of zeros, so that wrong time points are refused at the start."""
    for node in config.mode.samplers.values():
        sampler = instantiate(node, _convert_="all")
        sampler(lambda x, t, label: 0 * x, lambda: torch.zeros(1, 1, 1, 1), None)


def build_callbacks(config: DictConfig) -> list[L.Callback]:
    """Build the mode's callbacks, then the run's, except null or empty ones."""
    steps, expected = config.mode.total_steps, "mode.total_steps >= 1, the length of the schedules"
    require(steps >= 1, expected, steps, "leave it out: it is trainer.max_steps")
    named = {**config.mode.callbacks, **config.callbacks}
    for name, node in named.items():
        got = f"settings of no callback: {', '.join(map(str, node or []))}"
        remedy = f"to switch off a callback of a recipe too, say callbacks.{name}=null"
        whole = not node or "_target_" in node
        require(whole, f"callbacks.{name} with a _target_, or null", got, remedy)
    return _built(*named.values())


def build_loggers(config: DictConfig) -> list[Logger]:
    """Build the loggers, the user's own included, except null ones."""
    loggers = _built(*config.logger.values())
    wrong = [type(logger).__name__ for logger in loggers if not isinstance(logger, Logger)]
    expected = "logger.<name> with the _target_ of one of Lightning's loggers, or null"
    remedy = "choose logger=csv, wandb, tensorboard or none, or add +logger.<name>._target_=..."
    require(not wrong, expected, ", ".join(wrong), remedy)
    return loggers


def _built(*nodes: Any) -> list[Any]:
    return [instantiate(node, _convert_="all") for node in nodes if node]


def build_trainer(
    config: DictConfig, callbacks: list[L.Callback], loggers: list[Any], data: DataModule
) -> L.Trainer:
    """Build Lightning's Trainer: one endless epoch, our own order of the data, whole checkpoints."""
    trainer: L.Trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[*plugins_of(config.trainer), AtomicCheckpointIO()],
        max_epochs=1,
        # Lightning would replace a callback that is switched off by its own.
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        log_every_n_steps=min(config.trainer.log_every_n_steps, config.trainer.max_steps),
        use_distributed_sampler=False,
        _convert_="all",
    )
    require_whole(trainer.strategy)
    trainer.accumulate_grad_batches = data.split(trainer.world_size).accumulated
    return trainer
