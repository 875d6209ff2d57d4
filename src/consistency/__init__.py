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
    the shell           checkpoint (tensors and a plain card), pictures, perceptual
                        (LPIPS with its weights), schema (the keys of a configuration), command (what all verbs share),
                        orphans (no process outlives its parent), output (folders that a command makes), caches (where there is no home), paths (as people give
                        them), binding (do parts take the arguments beside them),
                        masking (no secrets in what is written), trusted (what a configuration from elsewhere may name),
                        sampling, evaluating, retouching, searching, page, comparison, conversion and speed (the commands)
      inference         card (what a model is), generate (numbered samples and edits), options (that commands share)
      runtime           devices (device, threads, precision), ranks (this process among others), meeting (the first decides, all know of an end), files (written whole,
                        checksums), interrupt (Ctrl-C), first (what a verb imports first)
      formats           openai nvlabs jcm diffusers sealed (ours, as safetensors): files of other programs in, ours out;
                        opened (what a file yields), released (published files by name), reading, pickles, messagepack,
                        wrapped (state dicts wherever they stand) and timetable (parts of the above)
      data              module (the LightningDataModule), batches (order by position), source (what one is), feed (other
                        loaders); held in memory:
                        held digits mixture cifar idx (MNIST); encoded (as image files): folder archive (NVlabs' zips) lsun
                        huggingface; listing (which files are images); stream (shards far away), shards (writes them);
                        decoding and cropping of one image, download, opening (what lies at a path), given (the images of
                        a person), preparation (the command)
      evaluation        measuring (the measures), extractors (whose features), reference (what is compared with), classifier,
                        ranks, clock
      training          run (configuration -> finished run), arguments (of Lightning), resuming (where it begins), module
                        (the LightningModule), nonfinite, launch (DDP), rotation (of checkpoints), logging, faults (of disks and
                        folders); callbacks: schedules averages stages periodic checkpoints preemption evaluation pictures progress
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from consistency import caches

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from omegaconf import DictConfig

    from consistency.checkpoint import Loaded

caches.settle()  # before a library that has one is imported


def load(
    path: str | PathLike[str],
    role: Literal["teacher", "consistency"] | None = None,
    *,
    weights: str = "ema",
    image_size: int | None = None,
    num_head_channels: int | None = None,
    attention_resolutions: Sequence[int] | None = None,
    num_heads: int | None = None,
    num_heads_upsample: int | None = None,
) -> Loaded:
    """Opens a checkpoint of any format; the result answers `denoise(x_t, t, label=None)` with the estimate of x_0.

        model = load("runs/my_run")
        images = model.sample(16, steps=2, seed=0)
        edited = model.edit(images, consistency.editing.colorize)

    path: a run folder, a file or folder of one of the formats in `consistency.formats`, or a published name such as
    openai:cd_imagenet64_lpips; role: what the model is, where the file does not say; weights: which ones, where the
    file holds several. The last five say what some files do not record, `consistency.formats.opened.Hints`.
    """
    from consistency import checkpoint
    from consistency.formats.opened import Hints

    hints = Hints(
        image_size, num_head_channels, attention_resolutions, num_heads, num_heads_upsample
    )
    return checkpoint.load(path, weights=weights, role=role, hints=hints)


def compose(overrides: Sequence[str] = (), verb: str = "train") -> DictConfig:
    """The checked configuration of src/<verb>.py with these options, as its command line takes them.

    config = compose(["mode=ct", "data=digits", "trainer.max_steps=100"])
    config.optimizer.lr = 1e-3
    train(config)
    """
    from consistency import command

    return command.composed(overrides, verb)


def train(config: DictConfig) -> float:
    """Trains as a configuration of `compose` says, which may be changed before. Leaves the run in `config.output`: a dated
    folder that is made now where none is named.

    Returns what a sweeper minimises: the lowest value of what callbacks.checkpoint.monitor names, by default the Fréchet
    distance of the run's evaluation; without an evaluation, the mean of the last 100 losses.
    """
    from consistency import command
    from consistency.training import run

    return command.called(run.train, config, "train")
