"""The command `convert`: it converts a checkpoint to another format, or checks one."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from consistency.checkpoints import hub, hub_folder, ours
from consistency.checkpoints.contents import HINTS
from consistency.checkpoints.diffusers import write_diffusers
from consistency.checkpoints.load import load
from consistency.checkpoints.openai import require_openai, write_openai
from consistency.checkpoints.ours import SEALED, write_sealed
from consistency.checkpoints.pretrained import LICENCES
from consistency.commands.overrides import shell_line
from consistency.errors import require
from consistency.evaluation.results import FILE, Results, read_results
from consistency.inference.model import Model
from consistency.pixels import to_uint8
from consistency.randomness import generator
from consistency.runtime.files import fingerprint, path_of, require_fresh

TORCH = (".pt", ".pth", ".ckpt")
FOLDERS = ("diffusers", hub_folder.FORMAT)
CHOICES = {"to": (ours.FORMAT, "openai", *FOLDERS), "role": ("teacher", "consistency", None)}
LEVELS = 9  # noise levels at which `verify` checks the outputs


def convert(config: DictConfig, target: Path) -> None:
    """Convert `source` to the format `to` at `output`, or check `verify`."""
    require(
        (config.source is None) != (config.verify is None),
        "source=<checkpoint> to convert, or verify=<checkpoint> to check",
        f"source={config.source} and verify={config.verify}",
        "give one of the two",
    )
    for name, choices in CHOICES.items():
        expected = f"{name}= among {', '.join(filter(None, choices))}"
        require(config[name] in choices, expected, config[name], "choose one")
    if config.source is not None:
        require_fresh(target)
        folder = config.to not in FOLDERS or target.suffix not in (".safetensors", *TORCH)
        expected = f"a folder at output=, because {config.to} is one"
        require(folder, expected, target.name, "leave the suffix out")
    _require_hub(config)
    hints: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, HINTS), resolve=True)
    source = config.verify if config.source is None else config.source
    model = load(source, config.role, weights=config.weights, **hints)
    print_facts(model)
    if config.source is None:
        verify(model)
    elif config.to == hub_folder.FORMAT:
        publish(config, model, target)
    else:
        print(f"written     {write(model, config.to, target)} ({config.to})")
        print(f"check it    {shell_line('convert', f'verify={target}')}")


def _require_hub(config: DictConfig) -> None:
    """Refuse options of to=hub without it, and a name or a package that would fail after the work."""
    given = [n for n in ("push", "license", "results") if config[n] is not None]
    expected = "to=hub with push=, license= and results="
    to_hub = config.source is not None and config.to == hub_folder.FORMAT
    require(to_hub or not given, expected, f"to={config.to}, and {', '.join(given)}", "add to=hub")
    if config.push is not None:
        hub.require_name(config.push)


def publish(config: DictConfig, model: Model, target: Path) -> None:
    """Write the folder for the Hub, and upload it if push= names a repository."""
    content = run_content(model.path)
    given = [config.source, *(content.get("config", {}).get(n) for n in ("teacher", "init"))]
    origins = list(dict.fromkeys(str(name) for name in given if is_public(name)))
    known = [name for name in origins if not name.startswith(hub.PREFIX)]
    facts = hub_folder.Facts(
        repository=config.push or f"<user>/{target.name}",
        license=config.license or (hub_folder.licence_of(known[0]) if known else None),
        recipe=recipe_of(content),
        origins=origins,
        results=results_of(config.results, model, content.get("k")),
    )
    missing = hub_folder.write_hub(target, model, facts)
    if missing:
        print(f"diffusers   no pipeline, because diffusers does not have {missing}")
    if facts.license is None:
        print("license     not stated; license=<its name on the Hub> states one in the card")
    print(f"written     {target} (hub); the card is {target / hub_folder.CARD}")
    if config.push is None:
        print(f"check it    {shell_line('convert', f'verify={target}')}")
        print(
            "The card was read back by huggingface_hub; the Hub's own check runs with push=<user>/<name>."
        )
    else:
        print(f"pushed      {hub.push(target, config.push, private=config.private)}")


def run_content(path: Path) -> dict[str, Any]:
    """Return what a checkpoint of a run holds beside its tensors; nothing for other files, which have no recipe."""
    content: Any = {}
    if path.suffix == ".ckpt":  # `load` has checked the file
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return content if isinstance(content, dict) and "config" in content else {}


def is_public(name: object) -> bool:
    """Return whether a checkpoint is given by the name of a published file or of a model on the Hub."""
    return str(name).startswith((*LICENCES, hub.PREFIX))


def recipe_of(content: dict[str, Any]) -> dict[str, str]:
    """Return the settings of a run for its card: its data, length and the parts of its mode; no path of this machine."""
    if not content:
        return {}
    config = content["config"]
    mode, data, optimizer = config["mode"], config["data"], config["optimizer"]
    kinds = {"data": data["source"], "objective": mode["objective"], "optimizer": optimizer}
    named = {name: str(node["_target_"]).rpartition(".")[2] for name, node in kinds.items()}
    named |= {"optimizer steps": f"{content['k']:,} of {mode['total_steps']:,}"}
    named |= {"images a step": str(data["batch_size"]), "learning rate": f"{optimizer['lr']:g}"}
    named |= {"precision": str(config["trainer"]["precision"]), "seed": str(config["seed"])}
    left_out = ("role", "init")
    named |= {n: v for n, v in mode.items() if isinstance(v, str) and n not in left_out}
    for name, source in content["sources"].items():
        given, digest = str(config.get(name)), source["sha256"][:16]
        named[name] = given if is_public(given) else f"a checkpoint of SHA-256 {digest}"
    return named


def results_of(given: str | None, model: Model, k: int | None) -> Results | None:
    """Return the results for the card, of this very checkpoint: those at results=, or those of the end of its run, if any.

    k: the step of the checkpoint of a run.
    """
    own = model.path.resolve().parent.parent / FILE
    file = own if given is None else path_of(given)
    file = file / FILE if file.is_dir() else file
    if given is None and not file.is_file():
        return None
    results = read_results(file)
    # A run's own file holds the step of the checkpoint in place of its hash.
    of_run = file.resolve() == own.resolve() and {row.step for row in results.rows} == {k}
    same = of_run or results.sha256 == fingerprint(model.path)
    expected, got = f"results= of {model.path}", "those of another file, by its hash"
    remedy = "measure this checkpoint with src/evaluate.py, and give its folder"
    require(same or given is None, expected, got, remedy)
    return results if same else None


def write(model: Model, to: str, target: Path) -> Path:
    """Write a model in a format, together with its card; return the file or folder."""
    card, weights = model.card, model.denoiser.network.state_dict()
    if to == "diffusers":
        write_diffusers(target, card, weights)
        return target
    if to == "openai":
        require_openai(card)
    if target.suffix not in TORCH:
        target = target if target.suffix == ".safetensors" else target / SEALED
        write_sealed(target, card, weights)
    elif to == "openai":
        write_openai(target, card, weights)
    else:
        ours.write({"card": card.saved(), "weights": dict(weights)}, target)
    return target


def print_facts(model: Model) -> None:
    """Print format, role, network, keys and parameters."""
    card, network = model.card, model.denoiser.network
    shape, classes = " x ".join(map(str, card.shape)), card.num_classes or "no"
    print(f"source      {model.path}")
    print(f"format      {model.format}")
    print(f"role        {card.role} ({type(model.denoiser.preconditioning).__name__} scalings)")
    print(f"network     {type(network).__name__}, images {shape}, {classes} classes")
    print(f"keys        {len(network.state_dict())}, all finite and of the right shapes")
    print(f"parameters  {sum(p.numel() for p in network.parameters()):,}")


@torch.no_grad()
def verify(model: Model) -> None:
    """Print the error of the boundary condition, finite outputs and a hash of one sample. Refuse a broken model."""
    card, student = model.card, model.card.role == "consistency"
    t_0 = getattr(model.denoiser.preconditioning, "t_min", 0.0) if student else card.process.t_min
    x, f = estimate(model, float(t_0))
    error, scale = float((f - x).abs().max()), float(x.abs().max())
    levels = card.process.grid.points(LEVELS).flip(0).tolist()
    bad = [f"{t:.4g}" for t in levels if not estimate(model, t)[1].isfinite().all()]
    sample = to_uint8(estimate(model, card.process.t_max)[1])
    digest = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]
    note = "" if student else " (a denoiser has no boundary condition)"
    print(f"boundary    max |f(x, t_min) - x| = {error:.3g}{note}")
    print(f"outputs     finite at {len(levels) - len(bad)} of {len(levels)} noise levels")
    print(f"sample      {digest} (hash of one fixed sample)")
    expected = f"a {card.role} model that keeps its definition at {model.path}"
    remedy = "check role=, and that the file is the one you mean"
    require(not bad, expected, f"outputs that are not finite at t = {', '.join(bad)}", remedy)
    exact = not student or error <= 1e-6 * scale
    require(exact, expected, f"|f(x, t_min) - x| = {error:.3g} for |x| = {scale:.3g}", remedy)
    print("verified")


def estimate(model: Model, t: float) -> tuple[Tensor, Tensor]:
    """Return one fixed noisy image at noise level t, and the model's estimate from it."""
    card = model.card
    deviation = (t**2 + card.process.sigma_data**2) ** 0.5
    x_t = deviation * torch.randn(1, *card.shape, generator=generator(0, "verify", 0))
    label = None if card.num_classes is None else torch.zeros(1, dtype=torch.long)
    return x_t, model.denoise(x_t, torch.full((1,), t), label)
