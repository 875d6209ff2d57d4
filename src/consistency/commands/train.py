"""The command `train`."""

import math
import shlex
import sys
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from consistency.checkpoints.ours import settle
from consistency.commands.cli import called
from consistency.commands.overrides import given_options, shell_line
from consistency.commands.resume import CONFIG, RunStart, begin
from consistency.commands.sweeps import require_monitor
from consistency.errors import require
from consistency.runtime.devices import warn_of_slow
from consistency.runtime.files import ROOT, commit, write_text
from consistency.runtime.launch import one_job
from consistency.runtime.ranks import require_launched, this_launch
from consistency.runtime.redaction import masked_text
from consistency.training import build
from consistency.training.callbacks.checkpoints import RunCheckpoints
from consistency.training.callbacks.evaluation import Evaluation
from consistency.training.callbacks.periodic import Periodic, callback_of
from consistency.training.io_errors import as_user_error
from consistency.training.loggers import PatientWandbLogger
from consistency.training.module import ConsistencyModule


def train(config: DictConfig, output: Path) -> float:
    """Train as configured, write everything into the folder `output`, and return `value_of` the run."""
    if not HydraConfig.initialized():  # a configuration of Hydra's own `compose`
        config.output = str(output)
        return called(train, config, "train")
    build.quiet()
    start = begin(build.expanded(config), output)
    config, steps = start.config, start.config.trainer.max_steps
    build.require_taken(config.trainer)
    require_monitor(config)
    require(config.seed >= 0, "seed >= 0", config.seed, "give another seed")
    require(steps >= 1, "trainer.max_steps >= 1", steps, "give the number of optimizer steps")
    if start.checkpoint is not None and start.step >= steps:
        if this_launch().first:
            settle(start.checkpoint)
            print("All its steps are done; trainer.max_steps=<more> makes it longer.")
        return start.value
    L.seed_everything(config.seed, workers=True, verbose=False)
    with one_job(), as_user_error():
        loggers = build.build_loggers(config)
        data = build.build_data(config)
        module = build.build_module(config, data)
        build.try_samplers(config)
        callbacks = [*build.build_callbacks(config), losses := LastLosses()]
        trainer = build.build_trainer(config, callbacks, loggers, data)
        if str(config.trainer.precision).startswith("bf16"):
            warn_of_slow(trainer.strategy.root_device)
        require_launched(trainer.num_devices, trainer.num_nodes, "trainer.")
        if trainer.is_global_zero:
            if not (output / CONFIG).is_file():
                write_text(output / CONFIG, OmegaConf.to_yaml(OmegaConf.create(module.config)))
            _announce(start, module, output)
            print(data.summary(trainer.world_size), flush=True)
        for logger in loggers:
            if trainer.is_global_zero and hasattr(logger, "cut"):
                logger.cut(start.step)
            logger.log_hyperparams(facts(start, module))
        trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint and str(start.checkpoint))
        value, name = value_of(trainer, losses)
        if trainer.is_global_zero:
            _conclude(config, trainer, output)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                print(f"Value of this job: {value:.6g}, {name}", flush=True)
        return value


def facts(start: RunStart, module: ConsistencyModule) -> dict[str, Any]:
    """Return what loggers record of a run: its choices by name, its size, where it came from, and all its options."""
    hydra = HydraConfig.get()
    command = shlex.join(["python", "src/train.py", *given_options(hydra)])
    # The command that resumes a run need not name its choices.
    named = () if start.resumed else ("mode", "data", "model", "experiment")
    return {
        **{name: hydra.runtime.choices.get(name) for name in named},
        "parameters": sum(p.numel() for p in module.online.parameters()),
        "git_commit": commit(),
        "command": masked_text(command),
        "options": module.config,
    }


# Options that leave a run the published one: they choose it, name files, or suit it to a machine.
NEUTRAL = (
    "mode=", "data=", "experiment=", "teacher=", "output=", "logger", "data.path=", "data.num_workers=", "data.device_batch_size=",
    "trainer=", "trainer.devices=", "trainer.num_nodes=", "trainer.accelerator=",
)  # fmt: skip


class LastLosses(L.Callback):
    """The losses of the last optimizer steps of this process, up to 100 micro-batches."""

    def __init__(self) -> None:
        self.values: deque[Tensor] = deque(maxlen=100)

    def on_train_batch_end(self, trainer: L.Trainer, _: Any, outputs: Any, *__: Any) -> None:
        self.values.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)


def value_of(trainer: L.Trainer, losses: LastLosses) -> tuple[float, str]:
    """Return the value for a sweeper, NaN if there is no number, and its name.

    It is the best of the metric that the checkpoints monitor, else the evaluation's last, else the mean of the last losses.
    """
    checkpoints = callback_of(trainer, RunCheckpoints)
    if checkpoints is not None and checkpoints.monitor is not None:
        best = checkpoints.best_value
        return best if math.isfinite(best) else math.nan, f"the best {checkpoints.monitor}"
    if (evaluation := callback_of(trainer, Evaluation)) is not None:
        return float(trainer.callback_metrics[evaluation.monitor]), f"the last {evaluation.monitor}"
    mean = torch.stack(list(losses.values)).mean().item() if losses.values else math.nan
    return mean, f"the mean of the last {len(losses.values)} losses, as nothing is evaluated"


def _announce(start: RunStart, module: ConsistencyModule, output: Path) -> None:
    config, choices = start.config, HydraConfig.get().runtime.choices
    millions = sum(p.numel() for p in module.online.parameters()) / 1e6
    size = f"{millions:.2f} M parameters, {config.trainer.max_steps} optimizer steps of {config.data.batch_size} images"
    named = [f"{name}={choices[name]}" for name in ("mode", "data", "model") if name in choices]
    print(size if start.resumed or not named else f"{' '.join(named)}{_published(config)}: {size}")
    if not start.resumed:
        pair = f"{choices.get('data')}_{choices.get('mode')}"
        if named and not (ROOT / "conf" / "recipe" / f"{pair}.yaml").is_file():
            print(f"No recipe conf/recipe/{pair}.yaml: the mode's own defaults are used.")
        if config.init != config.mode.init:
            print(f"init={config.init}: the published choice for this mode is {config.mode.init}.")
    for name, source in module.sources.items():
        hints = f", {source['hints']}" if "hints" in source else ""
        print(
            f"{name}: {source['path']} ({source['weights']}, sha256 {source['sha256'][:12]}{hints})"
        )
        if (begun := start.sources.get(name, source)["sha256"]) != source["sha256"]:
            print(f"  another file than the run was begun with, sha256 {begun[:12]}")
    print(f"Run folder: {output}", flush=True)


def _published(config: DictConfig) -> str:
    """Name the published run of these settings, and the settings that the command line changes."""
    given, run = given_options(HydraConfig.get()), config.mode.published
    changed = [option for option in given if not option.lstrip("+~").startswith(NEUTRAL)]
    rest = f", but {', '.join(changed[:4])}" if changed else ""
    return f", published run {run}{rest}" if run is not None else ""


def _conclude(config: DictConfig, trainer: L.Trainer, output: Path) -> None:
    print()
    if left_out := trainer.datamodule.train_source.left_out:  # type: ignore[attr-defined]
        print(f"Left out:   {left_out:,} images that cannot be used, named at the start")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Periodic) and callback.summary:
            print(callback.summary)
    for logger in trainer.loggers:
        if isinstance(logger, PatientWandbLogger) and logger.offline_folders:
            sync = [sys.executable, "-m", "wandb", "sync", *map(str, logger.offline_folders)]
            print(f"W&B:        offline; upload with\n  {shlex.join(sync)}")
    first = next((node._target_ for node in config.mode.samplers.values()), None)
    files = sorted((ROOT / "conf" / "sampler").glob("*.yaml"))
    same = (f.stem for f in files if OmegaConf.select(OmegaConf.load(f), "_target_") == first)
    sampler, samples = f"sampler={next(same, 'onestep')}", f"output={output / 'samples_64'}"
    line = shell_line("sample", f"checkpoint={output}", sampler, "num_samples=64", samples)
    print(f"Continue with:\n  {line}")
