"""Folders of diffusers, without the package: a `ConsistencyModelPipeline`, or a `UNet2DModel` alone.

The network is our `ADM` under other names, and c_noise = 250 ln t, which the pipeline's scheduler computes. The pipeline
always applies the boundary scalings, so it is a consistency model; a UNet alone may be either.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints import contents, diffusers_unet, openai, wrapped
from consistency.checkpoints.contents import Hints, StateDict, assumes, brief, card_of, check
from consistency.checkpoints.diffusers_unet import UNET, VERSION, our_weights, their_weights
from consistency.checkpoints.ours import read_card, read_sealed, write_sealed
from consistency.checkpoints.pickle_reader import read_pickle, read_zip
from consistency.inference.card import ModelCard, Process
from consistency.runtime.files import write_text

FORMAT = "diffusers"
ANCHORS = ("time_embedding.linear_1.weight", "conv_in.weight")
PIPELINE, SCHEDULER = "ConsistencyModelPipeline", "CMStochasticIterativeScheduler"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
TIME_EMBEDDING = "time_embedding.safetensors"  # original layers, see `diffusers_unet`
UNETS = {"online": "unet/", "ema": "unet_ema/"}  # in a pipeline; accelerate keeps both

WEIGHTS = "diffusion_pytorch_model"  # files of weights begin so
SHARD = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")
PREFERRED = ("", "fp32", "bf16", "fp16")  # variants of weights, the best first
VARIANTS = {"non_ema": "online", "ema": "ema"}  # names of sets; other variants keep their own

NOISE = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
UNUSED: dict[str, Any] = {"s_noise": 1, "prediction_type": None, "timestep_type": None}
"""Settings of the scheduler and their defaults: of its noise process, and those with one value."""


def is_diffusers(folder: Path) -> bool:
    """Return whether a folder is a pipeline or a model of diffusers, or a checkpoint that accelerate keeps of one."""
    names = ("model_index.json", *(f"{unet}config.json" for unet in ("", *UNETS.values())))
    return any((folder / name).is_file() for name in names)


def is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def folder_of(file: Path) -> Path:
    """Return the folder that a file of weights stands for: if it is the usual one or a part of it; else the file."""
    unet = file.parent
    if not (unet / "config.json").is_file():
        return file
    usual = next((f for v, f in weight_files(unet).items() if v in PREFERRED), None)
    if file != usual and "-of-" not in file.name:
        return file
    return unet.parent if is_pipeline(unet.parent) and unet.name == "unet" else unet


def open_path(path: Path, hints: Hints) -> contents.Checkpoint:
    """Return the model in a folder of a pipeline, of a UNet or of accelerate, or in one file of weights of such."""

    def network(unet: Path) -> dict[str, Any]:
        return diffusers_unet.settings(read_json(unet / "config.json"), hints)

    for folder in filter(is_pipeline, (path, *path.parents[:2])):
        kind = read_json(folder / "model_index.json").get("_class_name")
        check(kind == PIPELINE, f"a diffusers pipeline of class {brief(kind)}, not {PIPELINE}")
    kind = variant(path.name)
    files = sets_in(path) if path.is_dir() else {VARIANTS.get(kind, kind or "ema"): path}
    first = files.get(hints.weights) or files.get("ema") or next(iter(files.values()))
    unet = first.parent
    pipeline = path if path.is_dir() else unet.parent
    saved = read_card(first) if first.suffix == ".safetensors" else None
    if saved is not None:
        card = ModelCard.parse(saved, first)
    else:
        known: dict[str, Any] = {}
        if is_pipeline(pipeline):
            process = scheduled(read_json(pipeline / SCHEDULER_FILE))
            known = {"role": "consistency", "process": process}
        card = card_of(network(unet), contents.C_NOISE_OPENAI, **known)

    def weights(file: Path) -> StateDict:
        theirs, own = read_weights(file)
        ours = our_weights(theirs)
        if own is not None:
            return checked(card, ours, file.parent, pipeline)
        same = saved is not None or network(file.parent) == card.network
        check(same, f"a {UNET} with other settings than that of {unet.name}")
        return ours

    return contents.Checkpoint(path=path, format=FORMAT, card=card, sets=files, read=weights)


def checked(card: ModelCard, weights: StateDict, unet: Path, pipeline: Path) -> StateDict:
    """Return weights that we wrote, with the original time embedding. Refuse settings of a folder that have changed."""
    if diffusers_unet.needs_rewriting(card):
        layers = read_sealed(unet / TIME_EMBEDDING)
        same = ModelCard.parse(layers.get("card", {}), unet) == card
        check(same, f"a {TIME_EMBEDDING} that was not written with its weights")
        weights = diffusers_unet.restored(weights, layers["weights"])
    pairs = [(diffusers_unet.unet_settings(card, weights), read_json(unet / "config.json"))]
    if is_pipeline(pipeline):
        pairs.append((scheduler_settings(card), read_json(pipeline / SCHEDULER_FILE)))
    same = all(now.get(k) == v for written, now in pairs for k, v in written.items() if k[0] != "_")
    check(same, "settings that are not those which its weights were written with")
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """Return a small JSON object."""
    small = path.is_file() and path.stat().st_size <= 1 << 20
    check(small, f"a diffusers folder without its {path.name}")
    content: dict[str, Any] = json.loads(path.read_text())
    check(isinstance(content, dict), f"a {path.name} that is no object")
    return content


def variant(name: str) -> str:
    """Return the variant of a file of weights, `fp16` or `non_ema`; empty for the usual one."""
    parts = name.removeprefix(WEIGHTS).split(".")
    return ".".join(p for p in parts if p not in ("", "safetensors", "bin", "index", "json"))


def weight_files(unet: Path) -> dict[str, Path]:
    """Return the file of weights of every variant in a model's folder: safetensors before bin, whole before an index."""
    paths = [path for path in unet.glob(f"{WEIGHTS}*") if "-of-" not in path.name]
    files: dict[str, Path] = {}
    for path in sorted(paths, key=lambda p: (".safetensors" not in p.name, p.suffix == ".json", p)):
        files.setdefault(variant(path.name), path)
    return files


def sets_in(folder: Path) -> dict[str, Path]:
    """Return the files of the sets of weights in a folder by the names that `weights=` takes; variants by their own, too.

    The usual file holds the average, unless there is a `unet_ema` or a variant of that name.
    """
    alone = (folder / "config.json").is_file() and not is_pipeline(folder)
    unets = {"": folder} if alone else {name: folder / unet for name, unet in UNETS.items()}
    unets = {name: unet for name, unet in unets.items() if (unet / "config.json").is_file()}
    by_folder = not alone and (len(unets) > 1 or not is_pipeline(folder))
    sets: dict[str, Path] = {}
    for name, unet in unets.items():
        files = weight_files(unet)
        check(files, f"a diffusers folder without {WEIGHTS}.safetensors")
        usual = next((v for v in PREFERRED if v in files), next(iter(files)))
        for kind, file in sorted(files.items()):
            title = VARIANTS.get(kind, kind)
            if by_folder:
                title = name if kind == usual else f"{name}:{kind}"
            elif kind == usual and kind in PREFERRED:
                title = "online" if "ema" in files else "ema"
                sets[kind or title] = file
            sets[title] = file
    check(sets, "a diffusers folder without its unet/config.json")
    return sets


def scheduled(config: dict[str, Any]) -> Process:
    """Return the noise process of a scheduler; the second time point is that of the pipeline's own two steps."""
    kind = config.get("_class_name")
    check(kind == SCHEDULER, f"a scheduler of class {brief(kind)}, not {SCHEDULER}")
    theirs = NOISE | UNUSED | config
    for name in NOISE:
        level = type(theirs[name]) in (int, float) and 0 < theirs[name] < 1e6
        check(level, f"a {SCHEDULER} with {name}={brief(theirs[name])}, which is no noise level")
    for name, only in UNUSED.items():
        shown = f"{name}={brief(theirs[name])}, where {only} is known"
        check(theirs[name] == only, f"a {SCHEDULER} with {shown}")
    t_min, t_max, sigma_data, rho = (float(theirs[name]) for name in NOISE)
    points = config.get("num_train_timesteps", 40)
    grid = f"num_train_timesteps={brief(points)} from sigma_max={t_max} to sigma_min={t_min}"
    increasing = type(points) is int and points >= 2 and t_min < t_max
    check(increasing, f"a {SCHEDULER} with {grid}, which is no grid")
    process = Process(sigma_data=sigma_data, t_min=t_min, t_max=t_max, rho=rho)
    second = float(process.grid.at(torch.tensor(points // 2), points))
    return replace(process, times=(t_max, second))


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the weights in a file, or in the files of an index, and our card if we wrote them."""
    if file.suffix == ".json":
        return read_shards(file), None
    if file.suffix == ".safetensors":
        content = read_sealed(file)
        card = content.get("card")
        return (content["weights"], card) if isinstance(card, dict) else (content, None)
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
    content = read_zip(file) if zipped else read_pickle(file)
    flat = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
    check(flat, "weights that are no state dict")
    return content, None


def read_shards(index: Path) -> dict[str, Tensor]:
    """Return the weights that an index spreads over files of its own folder."""
    files: Any = read_json(index).get("weight_map")
    check(files and isinstance(files, dict), f"a {index.name} without a weight_map")
    read: dict[str, dict[str, Tensor]] = {}
    for name in dict.fromkeys(files.values()):
        plain = isinstance(name, str) and SHARD.fullmatch(name)
        check(plain, f"a {index.name} that names the file {brief(name)}")
        check((index.parent / name).is_file(), f"a {index.name} whose {name[:80]} is missing")
        read[name] = read_weights(index.parent / name)[0]
    for name, own in files.items():
        check(name in read[own], f"a {own} without {brief(name)}, which {index.name} has in it")
    return {parameter: read[name][parameter] for parameter, name in files.items()}


def open_state(theirs: dict[str, Tensor], hints: Hints) -> wrapped.OpenedState:
    """Return the card and assumptions for a state dict without settings."""
    heads = hints.num_head_channels or diffusers_unet.DEFAULTS["attention_head_dim"]
    network, notes = openai.settings(our_weights(theirs), replace(hints, num_head_channels=heads))
    if hints.num_head_channels is None:
        notes.append(assumes(f"attention heads of {heads} channels", "num_head_channels="))
    return card_of(network, contents.C_NOISE_OPENAI), notes, our_weights


def write_diffusers(folder: Path, card: ModelCard, weights: StateDict) -> None:
    """Write a pipeline for a consistency model, a UNet alone for a teacher, which has no pipeline in diffusers."""
    config = diffusers_unet.unet_settings(card, weights)
    student = card.role == "consistency"
    unet = folder / "unet" if student else folder
    if diffusers_unet.needs_rewriting(card):
        layers = {name: weights[name] for name in diffusers_unet.LAYERS}
        write_sealed(unet / TIME_EMBEDDING, card, layers)
        weights = diffusers_unet.rewritten(weights, card)
    files = {unet / "config.json": config}
    if student:
        index: dict[str, Any] = {"_class_name": PIPELINE, "_diffusers_version": VERSION}
        index |= {"scheduler": ["diffusers", SCHEDULER], "unet": ["diffusers", UNET]}
        files[folder / "model_index.json"] = index
        files[folder / SCHEDULER_FILE] = scheduler_settings(card)
    for path, content in files.items():
        write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
    write_sealed(unet / f"{WEIGHTS}.safetensors", card, their_weights(card.network, weights))


def scheduler_settings(card: ModelCard) -> dict[str, Any]:
    """Return the settings of the pipeline's scheduler."""
    scalings, process = card.preconditioning, card.process
    return {
        **{"_class_name": SCHEDULER, "_diffusers_version": VERSION},
        **{"sigma_min": scalings["t_min"], "sigma_max": process.t_max, "rho": process.rho},
        **{"sigma_data": scalings["sigma_data"], "num_train_timesteps": diffusers_unet.POINTS},
        **{"s_noise": 1.0, "clip_denoised": True},
    }
