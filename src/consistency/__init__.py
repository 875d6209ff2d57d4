"""Consistency models: networks that map any noisy point of a probability-flow ODE to its data point.

Every method is one formula with its parts swapped,

    loss = lambda(t, r) d( f_theta(x_t, t), stopgrad f_theta-(x_r, r) )      r < t, x_t -> x_r along the PF-ODE,

so a mode is a YAML file in conf/mode that names the parts, and no code branches on a mode's name. A module of the method
imports only from its floor and those below it, and torch and jaxtyping:

    floor 1, words      errors tensors pixels latents schedules grids preconditioning averaging randomness
                        networks: adm song dhariwal (with unet and layers) dit edm2 mlp
    floor 2, phrases    processes solvers pairs flow_pairs distances weightings denoiser tangents derivatives augmentation
    floor 3, sentences  steps samplers flow_samplers editing
    floor 4, paragraph  objectives trigflow (sCT and sCD) average_velocity (MeanFlow) shortcuts (alpha-Flow and shortcut models)

The shell stands in rooms:

    runtime             devices files ranks rendezvous (of the processes of a job) launch signals redaction (of secrets)
                        allowlist (of what a configuration from elsewhere may name)
    inference           card (what a model is) model (what `load` returns) generate (numbered samples) options plots
                        figures (of several panels) autoencoder (of latents)
    checkpoints         load contents; ours (posthoc: averages of any width) openai nvlabs edm2 jcm diffusers (folders; diffusers_unet,
                        diffusers_time_embedding) dit; wrapped (state dicts below any keys), pickle_reader, pretrained (published
                        files) hub (names on the Hugging Face Hub) hub_folder (what is pushed there)
    data                module (the LightningDataModule, order by position, foreign loaders) source; memory: digits
                        mixture mnist cifar10; image_files: zip_or_folder lsun huggingface; shards; latents; decode crop
                        listing parallel; chunks and encode (of sets that are prepared)
    evaluation          metrics extractors (with the small classifier) reference; results (their files) timing (windows, memory, peak rates)
                        sampling_speed
    training            build (configuration -> parts) module (the LightningModule) optimizers nonfinite loggers lpips
                        lightning_patches io_errors; callbacks: schedules ema progressive_distillation periodic
                        checkpoints preemption evaluation sample_grids progress overfit; speed (of the step, in its parts)
                        length (of a run: its steps at a fraction) plain (the published loop)
    commands            cli schema overrides resume page (of demo), and one file a verb, which src/<verb>.py starts: train.py
                        sample.py evaluate.py edit.py search.py demo.py compare.py plot.py convert.py prepare.py benchmark.py
                        dashboard.py; sweeps (their folders and tables)

`python -m consistency --version` is __main__.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from consistency.runtime.files import settle_caches

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from consistency.checkpoints.load import load as load
    from consistency.commands.cli import compose as compose
    from consistency.inference.model import Model as Model

settle_caches()  # before a library that has one is imported


def __getattr__(name: str) -> object:
    """Import torch only with the first use of `load`, `compose` or `Model`."""
    homes = {"load": "checkpoints.load", "compose": "commands.cli", "Model": "inference.model"}
    if name not in homes:
        raise AttributeError(f"module 'consistency' has no attribute {name!r}")
    return getattr(import_module(f"consistency.{homes[name]}"), name)


def train(config: DictConfig) -> float:
    """Train with a configuration of `compose`, changed or not; `config.output` is the run folder afterwards.

    Return the number for a sweeper: the best value of callbacks.checkpoint.monitor, by default the Fréchet distance of
    the run's evaluation; without an evaluation, the mean of the last 100 losses.
    """
    from consistency.commands import train as command
    from consistency.commands.cli import called

    return called(command.train, config, "train")
