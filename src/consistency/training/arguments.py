"""Which arguments of Lightning's Trainer a run accepts, and the alternative to each that it sets itself."""

import os
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import strategies
from omegaconf import DictConfig, ListConfig

from consistency.errors import require

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
