"""Consistency models: networks that map any noisy point of a probability-flow ODE to its data point.

Every method is one formula with its parts swapped,

    loss = lambda(t, r) d( f_theta(x_t, t), stopgrad f_theta-(x_r, r) )      r < t, x_t -> x_r along the PF-ODE,

so a mode is a YAML in conf/mode that names the parts, and no code branches on a mode's name. The map; a module
imports only from floors below it, and the core (floors 1 to 4) needs torch and jaxtyping alone:

    src/train.py sample.py evaluate.py edit.py search.py demo.py compare.py convert.py prepare.py benchmark.py
                        the verbs, each with conf/<verb>.yaml
    floor 1, words      errors tensors pixels schedules grids preconditioning averaging randomness timepoints
                        networks: adm song dhariwal (with their unet and layers) mlp
    floor 2, phrases    processes solvers pairs distances weightings denoiser tangents
    floor 3, sentences  steps samplers editing
    floor 4, paragraph  objectives
    the shell           inference: card (what a model is), model (denoises, samples, edits), generate (numbered samples and edits), options (shared by commands); checkpoint (load), pictures, perceptual
                        (LPIPS with its weights), schema (the keys of a configuration), command (what all verbs share),
                        output (folders that a command makes), caches (where there is no home), paths (as people give
                        them), binding (do parts take the arguments beside them),
                        sampling, evaluating, retouching, searching, page, comparison, conversion and speed (the commands)
      commands          overrides (options of the command line), python (the commands without a command line)
      runtime           devices (device, threads, precision), ranks, rendezvous (the first decides, all know of an end), launch (DDP), signals (Ctrl-C), files
                        (written whole, with checksums), redaction (no secrets in what is written), allowlist (what a
                        configuration from elsewhere may name)
      formats           ours, sealed (ours as safetensors), openai nvlabs jcm diffusers (diffusers_names, diffusers_settings,
                        diffusers_write): files of other programs in, ours out; opened (the Checkpoint that every reader
                        returns), reading (detects the format), released (published files by name), pickles, pickle_calls,
                        messagepack, wrapped (state dicts below any keys) and timetable (the time embedding for diffusers)
      data              module (the LightningDataModule), batches (order by position), source (what one is), feed (other
                        loaders); held in memory:
                        held digits mixture cifar idx (MNIST); encoded (as image files): folder archive (NVlabs' zips) lsun
                        huggingface; listing (which files are images); stream (shards far away), shards (writes them);
                        decoding and cropping of one image, download, opening (detects a set), parallel, write_zip,
                        preparation (the command)
      evaluation        measuring (the measures), extractors (whose features), reference (what is compared with), classifier,
                        ranks, clock
      training          run (the command), build (configuration -> parts of a run), arguments (of Lightning), resuming (where a
                        run starts), module (the LightningModule), nonfinite, launch (DDP), rotation (of checkpoints), logging,
                        lightning_patches, faults (of disks and folders); callbacks: schedules averages stages periodic checkpoints preemption evaluation pictures progress
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from consistency import caches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from consistency.checkpoints.load import load as load
    from consistency.inference.model import Model as Model

caches.settle()  # before a library that has one is imported


def __getattr__(name: str) -> object:
    """Import torch only with the first use of `load` or `Model`."""
    homes = {"load": "consistency.checkpoints.load", "Model": "consistency.inference.model"}
    if name not in homes:
        raise AttributeError(f"module 'consistency' has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)


def compose(overrides: Sequence[str] = (), verb: str = "train") -> DictConfig:
    """The checked configuration of src/<verb>.py with these options, as its command line takes them.

    config = compose(["mode=ct", "data=digits", "trainer.max_steps=100"])
    config.optimizer.lr = 1e-3
    train(config)
    """
    from consistency.commands.python import composed

    return composed(overrides, verb)


def train(config: DictConfig) -> float:
    """Trains as a configuration of `compose` says, which may be changed before. Leaves the run in `config.output`: a dated
    folder that is made now where none is named.

    Returns what a sweeper minimises: the lowest value of what callbacks.checkpoint.monitor names, by default the Fréchet
    distance of the run's evaluation; without an evaluation, the mean of the last 100 losses.
    """
    from consistency.commands import train as run
    from consistency.commands.python import called

    return called(run.train, config, "train")
