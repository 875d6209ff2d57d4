"""Our numbers against those of the published code, for every file in the folder $CM_GOLDEN.

The tables name the comparisons of each file, and the arrays that are never compared, with the reason. A file or array in
no table is a failure, and so is an array that is both compared and excused.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from torch import nn

import golden_augmentation as augmentation
import golden_averages as averages
import golden_dit as dit
import golden_editing as editing
import golden_edm2 as edm2
import golden_edm2_snapshots as snapshots
import golden_fastgen_time as fastgen_time
import golden_flow_sampling as flow_sampling
import golden_formulas as formulas
import golden_jcm as jcm
import golden_latents as latents
import golden_later as later
import golden_losses as losses
import golden_meanflow as meanflow
import golden_networks as networks
import golden_perceptual as perceptual
import golden_samplers as samplers
import golden_shortcuts as shortcuts
import golden_trajectories as trajectories
import golden_trigflow as trigflow
import golden_truncated as truncated
from conftest import REPORT
from golden_harness import FOLDER, Archive

ARRAYS: list[tuple[str, Callable[[Archive], None]]] = [
    ("openai_unet/*.npz", networks.compare_openai_unet),
    ("edm/*.npz", networks.compare_nvlabs),
    ("ect/loss.npz", networks.compare_ect),
    ("jcm/ncsnpp.npz", networks.compare_jcm_ncsnpp),
    ("openai_attention.npz", networks.compare_attention),
    ("openai_timestep_embedding.npz", networks.compare_timestep_embedding),
    ("openai_schedules.npz", networks.compare_scalings),
    ("openai_schedules.npz", networks.compare_smallest_times),
    ("openai_schedules.npz", formulas.compare_weights_and_grids),
    ("openai_ema_scales.npz", formulas.compare_openai_schedules),
    ("openai_sigma_samplers.npz", formulas.compare_sigma_samplers),
    ("ict_formulas.npz", formulas.compare_ict),
    ("ect/schedule.npz", formulas.compare_ect_schedule),
    ("edm/scalars.npz", formulas.compare_edm_training),
    ("jcm/schedules.npz", formulas.compare_jcm_schedules),
    ("openai_consistency_loss_*.npz", losses.compare_consistency_losses),
    ("openai_progdist_loss.npz", losses.compare_progressive_losses),
    ("openai_denoising_loss.npz", losses.compare_denoising_losses),
    ("edm/*.npz", losses.compare_nvlabs_losses),
    ("ect/loss.npz", losses.compare_ect_losses),
    ("openai_trajectory/*.npz", trajectories.compare_trajectory),
    ("jcm/losses_toy.npz", jcm.compare_losses),
    ("jcm/trajectory_toy.npz", jcm.compare_trajectory),
    ("jcm/ncsnpp.npz", jcm.compare_network_losses),
    ("openai_samplers.npz", samplers.compare_openai_samplers),
    ("openai_schedules.npz", samplers.compare_openai_levels),
    ("edm/*.npz", samplers.compare_nvlabs_sampler),
    ("ect/loss.npz", samplers.compare_ect_sampler),
    ("jcm/samplers_toy.npz", samplers.compare_jcm_samplers),
    ("openai_editing.npz", editing.compare_editing),
    ("piq_lpips_recipe.npz", perceptual.compare_lpips),
    ("later/edm2_ema.npz", averages.compare_power_averages),
    ("later/edm2_*.npz", edm2.compare_network),
    ("later/edm2_layers.npz", edm2.compare_layers),
    ("later/edm2_scalars.npz", edm2.compare_scalars),
    ("later/augment_*.npz", augmentation.compare_augmentation),
    ("later/edm2_scalars.npz", latents.compare_latents),
    ("later/fastgen_cm.npz", truncated.compare_fastgen_cm),
    ("later/fastgen_tcm.npz", truncated.compare_fastgen_tcm),
    ("later/fastgen_time.npz", fastgen_time.compare_fastgen_time),
    ("later/tcm.npz", truncated.compare_tcm),
    ("later/ect_compared.npz", truncated.compare_ect),
    ("later/fastgen_scm.npz", trigflow.compare_fastgen),
    ("later/fastgen_time.npz", trigflow.compare_fastgen_schedules),
    ("later/scm_mnist.npz", trigflow.compare_mnist),
    ("later/sct_formulas.npz", trigflow.compare_posterior_means),
    ("later/meanflow_jax.npz", meanflow.compare_jax),
    ("later/meanflow_torch.npz", meanflow.compare_torch),
    ("later/fastgen_meanflow.npz", meanflow.compare_fastgen),
    ("later/fastgen_samplers.npz", flow_sampling.compare_fastgen_samplers),
    ("later/fastgen_time.npz", flow_sampling.compare_flow_times),
    ("later/alphaflow.npz", shortcuts.compare_alphaflow),
    ("later/shortcut_jax.npz", shortcuts.compare_shortcut),
    ("later/edm2_snapshots.npz", snapshots.compare_snapshots),
    ("later/dit_dit.npz", dit.compare_network),
    ("later/dit_sit.npz", dit.compare_network),
    ("later/dit_meanflow.npz", dit.compare_meanflow),
]

WEIGHTS: list[tuple[str, Callable[[Path], nn.Module]]] = [
    ("openai_unet/*", lambda path: networks.openai_network(path.parent, path.stem)),
    ("openai_small/*", lambda path: networks.small_network(path.parent, path.stem)),
    ("edm/*", lambda path: networks.nvlabs_network(path.parent, path.stem)),
    ("ect/net.safetensors", lambda path: networks.ect_network(path.parent)),
    ("jcm/ncsnpp.safetensors", lambda path: networks.jcm_network(path.parent)),
    ("jcm/toy_*.safetensors", jcm.Toy),
    ("later/toy_student.safetensors", later.Toy),
    ("later/toy_teacher.safetensors", later.Toy),
    ("later/toy_label_*.safetensors", later.Toy),
    ("later/toy_two*.safetensors", later.Toy),
    ("later/toy_shortcut_ema.safetensors", later.Toy),
    ("later/fastgen_*.safetensors", trigflow.load_weights),
    ("later/meanflow_song.safetensors", meanflow.song),
    ("later/dit_*.safetensors", dit.transformer),
    ("later/edm2_*.safetensors", edm2.Published),
]

SHAPES: list[tuple[str, Callable[[Path], int]]] = [
    ("openai_unet/released_architectures.json", networks.compare_released_openai),
    ("edm/released_architectures.json", networks.compare_released_nvlabs),
    ("jcm/cifar10_ncsnpp_param_shapes.json", networks.compare_released_jcm),
    ("later/edm2_scalars.json", edm2.compare_presets),
    ("later/dropout.json", fastgen_time.compare_dropout),
    ("later/dropout.json", trigflow.compare_dropout),
    ("later/dropout.json", flow_sampling.compare_dropout),
    ("later/dropout.json", shortcuts.compare_dropout),
    ("later/dit_configs.json", dit.compare_configs),
]

SETTINGS = [
    "*.md",
    "*MANIFEST.json",
    "*TOLERANCES.json",
    "later/released.json",
    "openai_ema_scales.json",
    "later/augment_configs.json",
    "later/edm2_dit_augment_tolerances.json",
    "later/ect_compared.json",
    "later/edm2_configs.json",
    "later/edm2_ema.json",
    "later/edm2_snapshots.json",
    "later/files/edm2_snapshot_*.pkl",
    "later/fastgen_*.json",
    "later/meanflow_*.json",
    "later/nets.json",
    "later/rcm.json",
    "later/scm_mnist.json",
    "later/sct_formulas.json",
    "later/tcm.json",
    *(f"later/{name}.json" for name in ("alphaflow", "imeanflow_jax", "shortcut_jax", "imm")),
    "*/config.json",
    "*/configs.json",
    "*/specs.json",
    "jcm/ncsnpp_config.json",
]
"""Files that the comparisons read, or that describe the others."""

NEVER: list[tuple[str, str, str]] = [
    (
        "later/edm2_ema.npz",
        "response.*",
        "values of profiles, whose integrals and sums are compared",
    ),
    ("later/edm2_ema.npz", "run.traditional*", "EDM's ramped decay, which no recipe of ours has"),
    (
        "later/edm2_ema.npz",
        "run.official_*",
        "the same reconstructions from snapshots in half precision",
    ),
    (
        "later/edm2_snapshots.npz",
        "*_as_loaded",
        "weights used in half precision, which ours never are",
    ),
    ("later/edm2_snapshots.npz", "*_before_saving", "the network before it was rounded to half"),
    ("later/fastgen_time.npz", "law.uniform", "uniform times, which no published run uses"),
    ("later/fastgen_time.npz", "law.normal", "the draws of the next"),
    ("later/fastgen_time.npz", "schedule.[et]*.*_of_*", "conversions that nothing of ours makes"),
    ("later/fastgen_time.npz", "schedule.[et]*.sqrt_snr", "as above"),
    ("later/fastgen_time.npz", "schedule.[et]*.t_list_*", "time points, which are given to ours"),
    ("later/fastgen_time.npz", "schedule.[et]*.idx_t", "as above"),
    ("later/rcm.npz", "*", "rCM: its discrete derivatives and warm-up belong to no mode of ours"),
    (
        "later/imeanflow_jax.npz",
        "*",
        "improved MeanFlow with its head of velocities, no mode of ours",
    ),
    ("later/toy_imf.safetensors", "*", "its network"),
    (
        "later/imm.npz",
        "*",
        "inductive moment matching, no mode of ours; its training was never released",
    ),
    *(
        (
            "later/fastgen_time.npz",
            f"schedule.rf.{name}",
            "conversions that no sampler or loss of ours makes",
        )
        for name in ("sqrt_snr", "t_of_sqrt_snr", "eps_of_x", "idx_t")
    ),
]
"""(file, array, why comparing it would mean nothing)."""

FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file())
COUNTS: dict[str, int] = {}
WORST: dict[str, tuple[float, str]] = {}


def excused(file: str, array: str) -> bool:
    """Whether a table leaves out the array, `*` standing for all of the file."""
    return any(
        fnmatchcase(file, pattern) and (arrays == "*" or fnmatchcase(array, arrays))
        for pattern, arrays, _ in NEVER
    )


def test_the_golden_folder_exists() -> None:
    assert FILES, f"no golden data in {FOLDER}: set CM_GOLDEN to the folder"


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".npz")])
def test_arrays(file: str) -> None:
    archive = Archive(FOLDER / file)
    for pattern, compare in ARRAYS:
        if fnmatchcase(file, pattern):
            compare(archive)
    twice = [name for name in archive.compared if excused(file, name)]
    assert not twice, f"compared, yet listed as left out: {twice[:9]}"
    seen = archive.read | set(archive.compared)
    forgotten = [name for name in archive.arrays if name not in seen and not excused(file, name)]
    assert not forgotten, f"nothing compares {len(forgotten)} arrays: {forgotten[:9]}"
    COUNTS[file] = len(archive.compared)
    WORST[file] = max(((used, name) for name, used in archive.compared.items()), default=(0.0, ""))


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".safetensors")])
def test_weights(file: str) -> None:
    builders = [build for pattern, build in WEIGHTS if fnmatchcase(file, pattern)]
    assert bool(builders) != excused(file, "*"), (
        "expected one of: a network that loads it, a reason"
    )
    for build in builders:
        COUNTS[file] = len(build(FOLDER / file).state_dict())


@pytest.mark.parametrize("file", [f for f in FILES if not f.endswith((".npz", ".safetensors"))])
def test_descriptions(file: str) -> None:
    comparisons = [compare for pattern, compare in SHAPES if fnmatchcase(file, pattern)]
    known = any(fnmatchcase(file, pattern) for pattern in SETTINGS)
    assert comparisons or known, "nothing reads this file"
    for compare in comparisons:
        COUNTS[file] = compare(FOLDER / file)


def test_report(record_property: Callable[[str, object], None]) -> None:
    """Says, at the end of pytest's output, what was compared in this run and where it came closest to its tolerance."""
    lines = [f"golden folder {FOLDER}, {len(FILES)} files:"]
    for kind, what in ((".npz", "arrays"), (".safetensors", "weights"), (".json", "shapes")):
        counts = [n for file, n in COUNTS.items() if file.endswith(kind) and n]
        lines.append(f"  {sum(counts)} {what} compared in {len(counts)} files")
    for file, (used, name) in sorted(WORST.items(), key=lambda entry: -entry[1][0]):
        if name:
            lines.append(f"  {used:6.1%} of the tolerance at most in {file}: {name}")
    record_property(REPORT, "\n".join(lines))
