"""The parts of a run, built from its configuration: data, module, callbacks, loggers, and Lightning's Trainer with its options."""

import json
import logging
import os
import warnings
from collections.abc import Iterable
from copy import deepcopy
from functools import cache, partial
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from torch import nn

from consistency.augmentation import EDMAugmentation
from consistency.checkpoints.load import find, load_initial
from consistency.data.module import DataModule
from consistency.denoiser import Denoiser
from consistency.errors import UserError, require
from consistency.inference.card import ModelCard
from consistency.networks.layers import attends_fused
from consistency.objectives import Objective
from consistency.runtime.devices import CUDA_GRAPHS, require_compiling, set_float32_matmul
from consistency.runtime.files import fingerprint
from consistency.runtime.ranks import this_launch
from consistency.runtime.redaction import masked
from consistency.training.length import shorten
from consistency.training.lightning_patches import AtomicCheckpointIO
from consistency.training.module import ConsistencyModule

LENGTH = "trainer.max_steps=<optimizer steps>: a run has one length, and no epochs"
MEASURED = "callbacks.evaluation.every_n_train_steps: samples are measured, there is no validation"

# The arguments that the run sets itself or has no use for, with the alternative.
REFUSED = {
    **dict.fromkeys(("limit_train_batches", "max_epochs", "min_epochs", "min_steps"), LENGTH),
    **dict.fromkeys(("check_val_every_n_epoch", "inference_mode"), MEASURED),
    **dict.fromkeys(("num_sanity_val_steps", "val_check_interval"), MEASURED),
    "accumulate_grad_batches": "data.device_batch_size=<images that a device holds at once>",
    "barebones": "python src/benchmark.py part=train, which measures the speed of the training",
    "callbacks": "+callbacks.<name>={_target_: ...}",
    "enable_autolog_hparams": "nothing: loggers get the run's configuration; logger=none has none",
    "enable_checkpointing": "callbacks.checkpoint=null for a run without checkpoints",
    "enable_progress_bar": "callbacks.progress=null for a run without a bar",
    "fast_dev_run": "trainer.max_steps=1",
    "limit_predict_batches": "num_samples= of sample.py",
    "limit_test_batches": "num_samples= of evaluate.py",
    "limit_val_batches": "callbacks.evaluation.num_samples=<samples>",
    "logger": "logger=csv, wandb, tensorboard or none, or +logger.<name>={_target_: ...}",
    "max_time": "trainer.max_steps, or `timeout <time> python src/train.py ...`: its SIGTERM keeps last.ckpt",
    "model_registry": "nothing: checkpoints are files below output=",
    "overfit_batches": "a small data set, for example data=folder data.path=<a few images>",
    "reload_dataloaders_every_n_epochs": "nothing: the images have one order, that of data.* and seed=",
    "use_distributed_sampler": "nothing: every process gets its share of each batch of data.batch_size",
}

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
DDP = "say trainer=ddp, whose arguments are trainer.strategy.<name>, or one of those names"


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


def expanded(config: DictConfig) -> DictConfig:
    """Return the configuration with each part of the menu, conf/parts, in its place, without the menu, and of the length
    that `scale` asks for. One that is expanded already, as a run saves it, stays as it is.
    """
    if "parts" not in config:
        return config
    config = deepcopy(config)
    with read_write(config), open_dict(config):
        _fill(config, ("mode", "callbacks", "augmentation"))
        if config.parts:  # which is empty in a run that is resumed: its numbers are short already
            shorten(config)
        del config["parts"]
    return config


def _fill(node: Any, keys: Iterable[str]) -> None:
    plain: Any = OmegaConf.to_container(node, resolve=False)
    for key in keys:
        if isinstance(plain[key], str) and plain[key].startswith("${parts."):
            part: Any = node[key]
            node[key] = OmegaConf.to_container(part) if OmegaConf.is_config(part) else part
        if isinstance(node[key], DictConfig):
            _fill(node[key], list(node[key]))


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
    """Return the card of the denoiser, with the names of the classes of `data` and the autoencoder of its latents."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    mode, shape = plain["mode"], plain["data"]
    names = [] if data is None else list(data.train_source.class_names)
    latents = None if data is None else data.train_source.latents
    saved = {
        "role": mode["role"],
        "network": plain["model"]["network"],
        "preconditioning": mode["sampling_preconditioning"],
        "process": mode["process"],
        "image": {"channels": shape["channels"], "size": shape["image_size"]},
        "num_classes": shape["num_classes"],
        "class_names": names if len(names) == shape["num_classes"] else [],
        "latents": latents and vars(latents),
    }
    return ModelCard.parse(saved, "this configuration")


def build_module(config: DictConfig, data: DataModule | None = None) -> ConsistencyModule:
    """Build network, objective and optimizer, and load teacher and initial weights.

    Without `data` the module brings its schedules and averages itself, and trains on any loader of (images, labels):

        L.Trainer(max_steps=1000).fit(build_module(config), loader)
    """
    config = expanded(config)
    require_fit(config)
    require_compiling(config.compile)
    network: nn.Module = instantiate(config.model.network, _convert_="all")
    optimizer = instantiate(config.optimizer, _convert_="all")
    try:
        optimizer([nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError) as error:
        remedy = "change optimizer.*"
        raise UserError("settings that the optimizer takes", error, remedy) from error
    if config.init is not None:
        scale = config.model.c_noise_scale
        given = {"weights": config.init_weights, "hints": config.init_hints}
        load_initial(config.init, network, c_noise_scale=scale, **given)
    shared = (config.callbacks.get(name) for name in ("learning_rate", "evaluation_ema"))
    method = [*config.mode.callbacks.values(), *shared]
    objective = _plain(instantiate(config.mode.objective, _convert_="all"))
    if isinstance(objective, Objective):
        objective.require_suited(network)
        if objective.forward_mode and attends_fused(network):
            tell_of_plain_attention()
    return ConsistencyModule(
        online=Denoiser(network, instantiate(config.mode.preconditioning)),
        objective=objective,
        sampling_preconditioning=instantiate(config.mode.sampling_preconditioning),
        optimizer=optimizer,
        card=describe(config, data),
        config=masked(OmegaConf.to_container(config, resolve=True)),
        seed=config.seed,
        on_nonfinite=config.on_nonfinite,
        compilation=config.compile,
        augmentation=_augmentation(config),
        sources=_sources(config),
        callbacks=tuple if data is not None else lambda: _built(*method),
    )


@cache
def tell_of_plain_attention() -> None:
    """Print, once a process and on the first rank, that the derivative takes more memory than the fused kernel."""
    if this_launch().first:
        print(
            "Attention takes its plain formula in the derivative of the loss: PyTorch's fused kernels have no "
            "forward-mode derivative.",
            flush=True,
        )


def _augmentation(config: DictConfig) -> EDMAugmentation | None:
    """Build the augmentation of the training images; refuse it for a network that is not told of it."""
    if not config.get("augmentation"):
        return None
    augmentation: EDMAugmentation = instantiate(config.augmentation)
    labels, name = augmentation.num_labels, f"mode.augmentation={config.mode.augmentation}"
    got = config.model.network.get("augment_dim", 0)
    expected, remedy = (
        f"model.network.augment_dim={labels} for {name}",
        "say so; ADM has no such input",
    )
    require(got == labels, expected, f"augment_dim={got}", remedy)
    remedy = "say data.flip=false"
    require(
        not config.data.flip,
        f"{name}, which flips, without a second flip",
        "data.flip=true",
        remedy,
    )
    return augmentation


def _sources(config: DictConfig) -> dict[str, dict[str, str]]:
    """Return path, weights, SHA-256 and hints of the checkpoints that the run begins with; a teacher is part of the mode."""
    mode = json.dumps(OmegaConf.to_container(config.mode, resolve=True))
    sources, digest = {}, cache(fingerprint)  # init is often the teacher
    for name in ("init", "teacher") if json.dumps(config.teacher) in mode else ("init",):
        if config[name] is not None:
            path, weights = find(config[name]).absolute(), config[f"{name}_weights"]
            sources[name] = {"path": str(path), "weights": weights, "sha256": digest(path)}
            if hints := config[f"{name}_hints"]:
                sources[name]["hints"] = " ".join(f"{n}={value}" for n, value in hints.items())
    return sources


def require_fit(config: DictConfig) -> None:
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
        sampler(lambda x, t, label, r=None: 0 * x, lambda: torch.zeros(1, 1, 1, 1), None)


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
    return [_plain(instantiate(node, _convert_="all")) for node in nodes if node]


def _plain(part: Any) -> Any:
    """Replace Hydra's partials of our functions, which check its policy for 0.2 ms in every call, by plain ones."""
    for owner in part.modules() if isinstance(part, nn.Module) else [part]:
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, partial) and value.func.__module__.startswith("consistency."):
                vars(owner)[name] = partial(value.func, *value.args, **value.keywords)
    return part


def require_taken(trainer: DictConfig) -> None:
    """Refuse settings of `trainer` that a run cannot follow, before anything is opened or written."""
    for name, remedy in REFUSED.items():
        got = f"trainer.{name}={trainer.get(name)}"
        expected = f"no trainer.{name}, which the run sets itself"
        require(trainer.get(name) is None, expected, got, f"say {remedy}")
    for variable, value in sorted(os.environ.items()):
        name = variable.removeprefix("PL_TRAINER_").lower()
        expected = "Lightning's arguments as options of the command, which config.yaml records"
        remedy = f"unset {variable}; say {REFUSED.get(name, f'trainer.{name}=<value>')}"
        wrong = variable.startswith("PL_TRAINER_") and value
        require(not wrong, expected, f"{variable}={value} in the environment", remedy)
    strategy = trainer.get("strategy")
    if isinstance(strategy, DictConfig):
        require_whole(instantiate(strategy, _convert_="all"))
    else:
        names = f"trainer.strategy among {', '.join(STRATEGIES)}"
        require(strategy in STRATEGIES, names, f"trainer.strategy={strategy}", DDP)
    steps, clip = trainer.get("log_every_n_steps"), trainer.get("gradient_clip_val")
    remedy = "give the number of optimizer steps between two rows; logger=none logs nothing"
    positive = isinstance(steps, int) and steps >= 1
    require(positive, "trainer.log_every_n_steps >= 1", steps, remedy)
    algorithm = trainer.get("gradient_clip_algorithm")
    expected = "trainer.gradient_clip_val >= 0 with trainer.gradient_clip_algorithm, or neither"
    got = f"trainer.gradient_clip_val={clip} and trainer.gradient_clip_algorithm={algorithm}"
    remedy = "give trainer.gradient_clip_val=<largest norm of a gradient>, or neither"
    require(algorithm is None if clip is None else clip >= 0, expected, got, remedy)
    precision, accelerator = str(trainer.get("precision")), trainer.get("accelerator")
    cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    expected = "trainer.precision=32-true or bf16-mixed on a CPU"
    got = f"trainer.precision={precision}, which a CPU run would silently replace"
    half = precision in ("16-mixed", "16-true", "16")
    require(not (cpu and half), expected, got, "change trainer.precision")
    plugins_of(trainer)


def plugins_of(trainer: DictConfig) -> list[Any]:
    """Build the plugins of the user; raises `UserError` for one that writes checkpoints."""
    given = trainer.get("plugins")
    nodes = given if isinstance(given, ListConfig) else [given] if given else []
    plugins = [instantiate(p, _convert_="all") if isinstance(p, DictConfig) else p for p in nodes]
    writers = [type(plugin).__name__ for plugin in plugins if isinstance(plugin, CheckpointIO)]
    expected = "trainer.plugins without one that writes checkpoints"
    remedy = (
        "leave it out: the run writes whole checkpoints, with a checksum, and keeps the one before"
    )
    require(not writers, expected, ", ".join(writers), remedy)
    return plugins


def scaled(config: DictConfig, device: str = "cuda") -> MixedPrecision:
    """Return the precision 16-mixed with the gradient scaler of `scaler=`."""
    precision, remedy = config.trainer.precision, "say trainer.precision=16-mixed, or scaler=null"
    require(precision == "16-mixed", "half precision for scaler=", precision, remedy)
    try:
        scaler = torch.amp.GradScaler(device, **OmegaConf.to_container(config.scaler))  # type: ignore[arg-type]
    except (TypeError, AssertionError) as error:
        expected = "scaler: {init_scale: 65536, growth_factor: 2, growth_interval: 2000, backoff_factor: 0.5} or some of it"
        raise UserError(expected, str(error), "change scaler.*") from error
    return MixedPrecision("16-mixed", device, scaler)


def require_whole(strategy: strategies.Strategy) -> None:
    """Refuse a strategy that shards the weights, or that spawns or forks processes, as Lightning does in a notebook."""
    start = getattr(strategy, "_start_method", None) or "popen"
    whole = isinstance(strategy, strategies.DDPStrategy | strategies.SingleDeviceStrategy)
    shards = isinstance(strategy, strategies.DeepSpeedStrategy | strategies.XLAStrategy)
    expected = (
        "processes with the whole network each, started by the command: Lightning's DDPStrategy"
    )
    got = type(strategy).__name__ + ("" if start == "popen" else f" with start_method={start}")
    remedy = f"{DDP}; in a notebook trainer.devices=1"
    require(whole and not shards and start == "popen", expected, got, remedy)


def build_trainer(
    config: DictConfig, callbacks: list[L.Callback], loggers: list[Any], data: DataModule
) -> L.Trainer:
    """Build Lightning's Trainer: one endless epoch, our own order of the data, whole checkpoints."""
    precision = [] if config.scaler is None else [scaled(config)]
    trainer: L.Trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[*plugins_of(config.trainer), *precision, AtomicCheckpointIO()],
        precision=None if precision else config.trainer.precision,
        max_epochs=1,
        # Lightning would replace a callback that is switched off by its own.
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        log_every_n_steps=min(config.trainer.log_every_n_steps, config.trainer.max_steps),
        use_distributed_sampler=False,
        _convert_="all",
    )
    require_whole(trainer.strategy)
    trainer.accumulate_grad_batches = accumulated = data.split(trainer.world_size).accumulated
    # A later replay of a graph would overwrite the gradients of the micro-batches before.
    expected = (
        f"with compile={config.compile} and its CUDA graphs a batch that a device holds at once"
    )
    remedy = "compile=true, or a data.device_batch_size that fits the batch"
    graphs = config.compile in CUDA_GRAPHS and accumulated > 1
    require(not graphs, expected, f"{accumulated} micro-batches", remedy)
    if trainer.strategy.root_device.type == "cuda":
        set_float32_matmul(config.float32_matmul)
        if config.trainer.benchmark is None:
            torch.backends.cudnn.benchmark = not config.trainer.deterministic
    return trainer
