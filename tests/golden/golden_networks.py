"""Comparisons of the networks, their layers and the preconditioning with golden data.

Each function takes what the published implementation was given from the file, runs ours, and
compares. Keyword names of the published constructors are translated to ours here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
import torch
import yaml
from jaxtyping import Float
from torch import Tensor, nn

from consistency.checkpoints.jcm import song_weights
from consistency.denoiser import Denoiser
from consistency.networks.adm import ADM
from consistency.networks.dhariwal import DhariwalUNet
from consistency.networks.layers import attend, sinusoidal_features
from consistency.networks.song import SongUNet
from consistency.preconditioning import EDM, Boundary
from consistency.tensors import Data, Label, Time
from golden_harness import (
    GRADIENT,
    HALF_PRECISION,
    OUTPUT,
    SCALING,
    SCALING_FLOAT64,
    TIME_EMBEDDING,
    Archive,
    Tolerance,
    compare_gradients,
    read_json,
    read_safetensors,
    require_known,
)

MODELS = Path(__file__).parents[2] / "conf" / "model"

# Section 2 of the golden README: the defaults of all files.
SIGMA_DATA, T_MIN = 0.5, 0.002
OPENAI, NVLABS = 250.0, 0.25


# ------------------------------------------------------------------ constructors of the originals


def openai_arguments(cfg: dict[str, Any]) -> dict[str, Any]:
    """Ours from those of `UNetModel`, which counts attention in downsampling factors."""
    size, head_channels = cfg["image_size"], cfg["num_head_channels"]
    ours = dict(cfg)
    if ours.pop("num_heads_upsample", -1) != -1:
        ours["num_heads_upsample"] = cfg["num_heads_upsample"]
    ours["attention_resolutions"] = [size // factor for factor in cfg["attention_resolutions"]]
    ours["dropout"] = float(cfg["dropout"])
    ours["num_head_channels"] = None if head_channels == -1 else head_channels
    return ours


# The defaults of the published constructors.
SONG_DEFAULTS = {
    "channel_mult": [1, 2, 2, 2],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}
DHARIWAL_DEFAULTS = {
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
}


NVLABS_READ = {
    *("model_type", "img_resolution", "img_channels", "label_dim", "augment_dim", "dropout"),
    *("channel_mult_emb", "model_channels", "sigma_data"),
    *("use_fp16", "label_dropout", "sigma_min", "sigma_max"),  # change nothing in these numbers
}


def nvlabs_arguments(kwargs: dict[str, Any], *, fourier_scale: float = 16.0) -> dict[str, Any]:
    """Ours from those of an NVlabs preconditioned network."""
    song = kwargs["model_type"] == "SongUNet"
    given: dict[str, Any] = {
        "augment_dim": 0,
        "dropout": 0.1,
        "channel_mult_emb": 4,
        "model_channels": None,
    }
    given |= (SONG_DEFAULTS if song else DHARIWAL_DEFAULTS) | kwargs
    require_known(given, SONG_DEFAULTS.keys() | NVLABS_READ, "the network's arguments")
    ours = {
        "image_size": given["img_resolution"],
        "in_channels": given["img_channels"],
        "model_channels": given["model_channels"] or (128 if song else 192),
        "num_res_blocks": given["num_blocks"],
        "attention_resolutions": given["attn_resolutions"],
        "channel_mult": given["channel_mult"],
        "num_classes": given["label_dim"] or None,
        "augment_dim": given["augment_dim"],
        "dropout": float(given["dropout"]),
        "channel_mult_emb": given["channel_mult_emb"],
    }
    if song:
        ours["fourier_scale"] = fourier_scale if given["embedding_type"] == "fourier" else None
        ours["residual_input"] = given["encoder_type"] == "residual"
        ours["skip_output"] = given["decoder_type"] == "skip"
        ours["channel_mult_noise"] = given["channel_mult_noise"]
        ours["resample_filter"] = given["resample_filter"]
    return ours


def jcm_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Ours from the `model` section of a JAX configuration."""
    return {
        "image_size": config["_size"],
        "in_channels": config.get("num_channels", 3),
        "model_channels": config["nf"],
        "num_res_blocks": config["num_res_blocks"],
        "attention_resolutions": config["attn_resolutions"],
        "channel_mult": config["ch_mult"],
        "dropout": float(config["dropout"]),
        "fourier_scale": float(config["fourier_scale"]),
        "residual_input": config["progressive_input"] == "residual",
        "skip_output": False,
        "channel_mult_noise": 2,
        "resample_filter": config["fir_kernel"],
    }


def openai_network(folder: Path, name: str) -> ADM:
    entry = read_json(folder / "configs.json")[name]
    return loaded(ADM(**openai_arguments(entry["cfg"])), folder / f"{name}.safetensors", entry)


def small_network(folder: Path, name: str) -> ADM:
    entry = read_json(folder / "config.json")
    return loaded(ADM(**openai_arguments(entry["unet"])), folder / f"{name}.safetensors", entry)


def nvlabs_network(folder: Path, name: str) -> SongUNet | DhariwalUNet:
    entry = read_json(folder / "configs.json")[name]
    return loaded(nvlabs_module(entry["kwargs"]), folder / f"{name}.safetensors", entry)


def ect_network(folder: Path) -> SongUNet | DhariwalUNet:
    kwargs = read_json(folder / "config.json")["ECMPrecond_kwargs"]
    return loaded(nvlabs_module(kwargs), folder / "net.safetensors", {})


def nvlabs_sigma_data(archive: Archive) -> float:
    """sigma_data of an NVlabs denoiser, 0.5 by default."""
    entry = read_json(archive.path.parent / "configs.json")[archive.path.stem]
    return float(entry["kwargs"].get("sigma_data", SIGMA_DATA))


def ect_sigma_data(folder: Path) -> float:
    """sigma_data of the ECT network, 0.5 by default."""
    kwargs = read_json(folder / "config.json")["ECMPrecond_kwargs"]
    return float(kwargs.get("sigma_data", SIGMA_DATA))


def jcm_network(folder: Path) -> SongUNet:
    network = SongUNet(**jcm_arguments(read_json(folder / "ncsnpp_config.json")))
    network.load_state_dict(song_weights(read_safetensors(folder / "ncsnpp.safetensors"), network))
    return network.eval()


def nvlabs_module(kwargs: dict[str, Any]) -> SongUNet | DhariwalUNet:
    kind = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}[kwargs["model_type"]]
    return kind(**nvlabs_arguments(kwargs))


Module = TypeVar("Module", bound=nn.Module)


def loaded(network: Module, path: Path, entry: dict[str, Any]) -> Module:
    """Load exactly the weights of the file, and compare their number with that of the entry, if any."""
    weights = read_safetensors(path)
    network.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == entry.get("n_params", count)
    return network.eval()


# ------------------------------------------------------------------------------- whole networks


class Watched:
    """Keeps the outputs of the named submodules of a network while it runs."""

    def __init__(self, network: nn.Module, names: set[str]) -> None:
        self.outputs: dict[str, Tensor] = {}
        for name in names:
            network.get_submodule(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.outputs[name] = output.detach()

        return hook


def gradients_of(network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {
        prefix + name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in network.named_parameters()
    }


def compare_openai_unet(archive: Archive) -> None:
    """Output, gradients, statistics of blocks, and the two denoisers of one `UNetModel`."""
    network = openai_network(archive.path.parent, archive.path.stem)
    label = archive.tensor("y") if "y" in archive else None
    x = archive.tensor("x").requires_grad_()
    blocks = {n.removeprefix("inter.").rsplit(".", 1)[0] for n in archive.matching("inter.*_hw")}
    watched = Watched(network, blocks | {"time_embed"})

    output = network(x, archive.tensor("timesteps"), label)
    archive.compare("output", output, OUTPUT)
    if "inter.time_embed_out" in archive:
        archive.compare("inter.time_embed_out", watched.outputs["time_embed"], OUTPUT)
    for name in archive.matching("inter.*_hw"):
        block, statistic = name.removeprefix("inter.").rsplit(".", 1)
        h = watched.outputs[block]
        mean = h.mean((2, 3)) if statistic == "mean_hw" else h.square().mean((2, 3)).sqrt()
        archive.compare(name, mean, OUTPUT)

    (output * archive.tensor("cotangent")).sum().backward()
    assert x.grad is not None
    gradients = gradients_of(network)
    archive.compare("grad_x", x.grad, GRADIENT)
    archive.compare_names("param_names", list(gradients))
    names = [str(name) for name in archive.arrays["param_names"]]
    compare_gradients(archive, "grad_l2_all", names, gradients)
    floor = 1e-6 * float(archive.arrays["grad_l2_all"].max())
    for name in archive.matching("grad.*"):
        ours = gradients[name.removeprefix("grad.")]
        archive.compare(name, ours, Tolerance(of_norm=1e-3, absolute=floor))
    if "denoise.sigma" in archive:
        compare_openai_denoisers(archive, network, label)


def compare_openai_denoisers(archive: Archive, network: ADM, label: Label) -> None:
    t, x = archive.tensor("denoise.sigma"), archive.tensor("x")
    edm = EDM(sigma_data=SIGMA_DATA, c_noise_scale=OPENAI)
    boundary = Boundary(sigma_data=SIGMA_DATA, t_min=T_MIN, c_noise_scale=OPENAI)
    raw: list[Tensor] = []
    network.register_forward_hook(lambda module, inputs, output: raw.append(output))
    with torch.no_grad():
        archive.compare("denoise_edm.denoised", Denoiser(network, edm)(x, t, label), OUTPUT)
        archive.compare(
            "denoise_boundary.denoised", Denoiser(network, boundary)(x, t, label), OUTPUT
        )
    for output in raw:
        archive.compare("denoise.model_output", output, OUTPUT)


class Augmented(nn.Module):
    """A network with a fixed augmentation label."""

    def __init__(self, network: nn.Module, augment: Float[Tensor, "b a"]) -> None:
        super().__init__()
        self.network, self.augment = network, augment

    def forward(self, x: Data, c_noise: Time, label: Label = None) -> Data:
        return self.network(x, c_noise, label, augment=self.augment)


def class_indices(one_hot: Tensor) -> Tensor:
    """Class indices of rows with a single 1; plain indices stay what they are."""
    if one_hot.ndim == 1:
        return one_hot.long()
    assert torch.equal(one_hot.sum(1), torch.ones(len(one_hot), dtype=one_hot.dtype))
    return one_hot.argmax(1)


def no_class(network: SongUNet | DhariwalUNet, batch: int) -> Label:
    """Return the label that the published code takes for none: -1, if the network has classes."""
    return None if network.num_classes is None else torch.full((batch,), -1)


def compare_nvlabs(archive: Archive) -> None:
    """Output and gradients of one EDM denoiser, and what its network was given."""
    if archive.path.stem not in read_json(archive.path.parent / "configs.json"):
        return  # formulas of the sampler and of training
    network = nvlabs_network(archive.path.parent, archive.path.stem)
    x, t = archive.tensor("x").requires_grad_(), archive.tensor("sigma")
    label = no_class(network, len(x))
    if "class_labels" in archive:
        label = class_indices(archive.tensor("class_labels"))
    conditioned: nn.Module = network
    if "augment_labels" in archive:
        conditioned = Augmented(network, archive.tensor("augment_labels"))
    scalings = EDM(sigma_data=nvlabs_sigma_data(archive), c_noise_scale=NVLABS)
    received: list[tuple[Tensor, ...]] = []
    network.register_forward_pre_hook(lambda module, inputs: received.append(inputs))
    watched = Watched(network, {"", "map_layer1"})

    denoised = Denoiser(conditioned, scalings)(x, t, label)
    archive.compare("F_input", received[0][0], OUTPUT)
    archive.compare("c_noise", received[0][1], SCALING)
    archive.compare("F_x", watched.outputs[""], OUTPUT)
    archive.compare("map_layer1_out", watched.outputs["map_layer1"], OUTPUT)
    archive.compare("D_x", denoised, OUTPUT)
    (denoised * archive.tensor("cotangent")).sum().backward()
    assert x.grad is not None
    gradients = gradients_of(network, "model.")
    archive.compare("grad_x", x.grad, GRADIENT)
    archive.compare_names("param_names", list(gradients))
    names = [str(name) for name in archive.arrays["param_names"]]
    compare_gradients(archive, "grad_l2_all", names, gradients)
    conditional = "class_labels" in archive or "augment_labels" in archive
    if archive.has("D_x_nolabels_noaug", unless=not conditional):
        plain = Denoiser(network, scalings)(x.detach(), t, no_class(network, len(x)))
        archive.compare("D_x_nolabels_noaug", plain, OUTPUT)


@torch.no_grad()
def compare_ect(archive: Archive) -> None:
    """Denoisers of the ECT code: EDM scalings while training, boundary scalings otherwise.

    For a class-conditional network the file does not say whether the calls under `precond.` were
    given labels, so either is accepted.
    """
    folder = archive.path.parent
    network = ect_network(folder)
    archive.compare_names("param_names", list(gradients_of(network, "model.")))
    label = no_class(network, len(archive.input("images")))
    if "labels" in archive:
        label = class_indices(archive.tensor("labels"))
    sigma_data = ect_sigma_data(folder)
    train = Denoiser(network, EDM(sigma_data=sigma_data, c_noise_scale=NVLABS))
    t_min = read_json(folder / "config.json")["sigma_min"]
    boundary = Boundary(sigma_data=sigma_data, t_min=t_min, c_noise_scale=NVLABS)
    for name, denoise in (("train", train), ("eval", Denoiser(network, boundary))):
        if f"precond.{name}_mode" not in archive:
            continue
        x, t = archive.tensor("precond.x"), archive.tensor("precond.sigma")
        candidates = [denoise(x, t, no_class(network, len(x)))]
        if label is not None and len(label) >= len(x):
            candidates.append(denoise(x, t, label[: len(x)]))
        expected = torch.from_numpy(archive.arrays[f"precond.{name}_mode"])
        nearest = min(candidates, key=lambda ours: float((ours - expected).abs().max()))
        archive.compare(f"precond.{name}_mode", nearest, OUTPUT)
    shown = [name.rsplit(".", 1)[0] for name in archive.matching("*.D_y*")]
    for case in dict.fromkeys(shown):
        t, r = archive.tensor(f"{case}.t"), archive.tensor(f"{case}.r")
        # With r = 0 for the whole batch the published code makes no second pass.
        passes = {"D_yt": (t, False), "D_yr_raw": (r, not bool((r > 0).any()))}
        for output, (time, none) in passes.items():
            if archive.has(f"{case}.{output}", unless=none):
                x_t = archive.tensor("images") + time[:, None, None, None] * archive.tensor(
                    f"{case}.eps"
                )
                archive.compare(f"{case}.{output}", train(x_t, time, label), OUTPUT)


@torch.no_grad()
def compare_jcm_ncsnpp(archive: Archive) -> None:
    """Output of the JAX NCSN++, whose arrays have channels last."""
    folder = archive.path.parent
    archive.compare_names("param_names", list(read_safetensors(folder / "ncsnpp.safetensors")))
    x = archive.tensor("x").permute(0, 3, 1, 2)
    output = jcm_network(folder)(x, archive.tensor("time_cond"))
    archive.compare("output", output.permute(0, 2, 3, 1), OUTPUT)


# ------------------------------------------------------------------------ layers and scalings


def compare_timestep_embedding(archive: Archive) -> None:
    for name in archive.matching("emb.dim*"):
        width = int(name.removeprefix("emb.dim"))
        ours = sinusoidal_features(archive.tensor("timesteps"), width)
        archive.compare(name, ours, TIME_EMBEDDING)


def compare_attention(archive: Archive) -> None:
    """Both kinds of attention on inputs (batch, three * heads * width, length)."""
    for name in archive.matching("*.qkv"):
        case, qkv = name.removesuffix(".qkv"), archive.tensor(name)
        heads = int(archive.number(f"{case}.num_heads"))
        q, k, v = qkv.unflatten(1, (3, heads, -1)).transpose(-2, -1).unbind(1)
        for kind in ("plain", "sdpa"):
            ours = attend(q, k, v, kind).transpose(-2, -1).flatten(1, 2)
            for output in archive.matching(f"{case}.out_*"):
                half = output.endswith("_fp16")
                archive.compare(output, ours, HALF_PRECISION if half else OUTPUT)


def compare_scalings(archive: Archive) -> None:
    """c_skip, c_out, c_in, c_noise of both preconditionings, in float32 and float64."""
    for name in archive.matching("*.const.sigma_data"):
        case = name.removesuffix(".const.sigma_data")
        sigma_data = archive.number(name)
        t_min = archive.number(f"{case}.const.sigma_min")
        edm = EDM(sigma_data=sigma_data, c_noise_scale=OPENAI)
        boundary = Boundary(sigma_data=sigma_data, t_min=t_min, c_noise_scale=OPENAI)
        t = archive.tensor(f"{case}.sigma")
        for suffix, times, tolerance in (
            ("", t, SCALING),
            (".f64", t.double(), SCALING_FLOAT64),
        ):
            e, b = edm(times), boundary(times)
            for c in ("c_skip", "c_out", "c_in"):
                archive.compare(f"{case}.edm.{c}{suffix}", getattr(e, c), tolerance)
                archive.compare(f"{case}.boundary.{c}{suffix}", getattr(b, c), tolerance)
            zero_model = f"{case}.denoise_zero_model.distillation"
            archive.compare(f"{zero_model}_False{suffix}", e.c_skip, tolerance)
            archive.compare(f"{zero_model}_True{suffix}", b.c_skip, tolerance)
            archive.compare(f"{case}.model_input_for_x1{suffix}", b.c_in, tolerance)
            archive.compare(f"{case}.rescaled_t{suffix}", b.c_noise, tolerance)


def compare_smallest_times(archive: Archive) -> None:
    """c_noise near zero. The published code takes ln(t + 1e-44), so t of that size is left out."""
    if "edge.sigma" not in archive:
        return
    t = archive.tensor("edge.sigma")
    ours = EDM(sigma_data=SIGMA_DATA, c_noise_scale=OPENAI)(t).c_noise
    expected = torch.from_numpy(archive.arrays["edge.rescaled_t"])
    archive.compare("edge.rescaled_t", torch.where(t > 1e-41, ours, expected), SCALING)


# ------------------------------------------------------------------------ released architectures


def model_configurations() -> dict[str, dict[str, Any]]:
    """The files in conf/model of published networks; the others take sizes from the data, or are second names."""
    texts = {path.stem: path.read_text() for path in sorted(MODELS.glob("*.yaml"))}
    networks = {n: yaml.safe_load(text) for n, text in texts.items() if "${" not in text}
    return {name: config for name, config in networks.items() if "network" in config}


def shipped(arguments: dict[str, Any]) -> list[str]:
    """Model files that describe this network; what training alone decides may differ."""
    free = {"augment_dim", "dropout"}
    return [
        name
        for name, config in model_configurations().items()
        if all(
            config["network"].get(key, value) == value
            for key, value in arguments.items()
            if key not in free
        )
        and set(arguments) <= set(config["network"])
    ]


def compare_released(entry: dict[str, Any], arguments: dict[str, Any], prefix: str) -> str:
    """The model file that describes a released network, with its names, shapes and count."""
    names = shipped(arguments)
    assert names, f"no file in conf/model describes {arguments}"
    for name in names:
        config = dict(model_configurations()[name]["network"])
        config |= {key: arguments[key] for key in ("augment_dim",) if key in arguments}
        with torch.device("meta"):
            network = hydra.utils.instantiate(config)
        shapes = {prefix + key: list(value.shape) for key, value in network.state_dict().items()}
        assert shapes == entry["shapes"], name
        assert sum(p.numel() for p in network.parameters()) == entry["n_params"], name
    return names[0]


def compare_released_openai(path: Path) -> int:
    """Names and shapes of the released OpenAI networks; their flags count attention in sides."""
    entries = read_json(path)
    for entry in entries.values():
        flags, shapes = entry["flags"], entry["shapes"]
        classes = shapes["label_emb.weight"][0] if flags["class_cond"] else None
        arguments = {
            "image_size": flags["image_size"],
            "model_channels": flags["num_channels"],
            "num_res_blocks": flags["num_res_blocks"],
            "attention_resolutions": [int(n) for n in flags["attention_resolutions"].split(",")],
            "channel_mult": entry["channel_mult"],
            "num_classes": classes,
            "num_head_channels": flags["num_head_channels"],
            "use_scale_shift_norm": flags["use_scale_shift_norm"],
            "resblock_updown": flags["resblock_updown"],
        }
        name = compare_released(entry, arguments, "")
        assert model_configurations()[name]["c_noise_scale"] == OPENAI
    return sum(len(entry["shapes"]) for entry in entries.values())


def compare_released_nvlabs(path: Path) -> int:
    entries = read_json(path)
    for entry in entries.values():
        name = compare_released(entry, nvlabs_arguments(entry["kwargs"]), "model.")
        assert model_configurations()[name]["c_noise_scale"] == NVLABS
    return sum(len(entry["shapes"]) for entry in entries.values())


def compare_released_jcm(path: Path) -> int:
    """Names and shapes of the released JAX network, each moved to its place in ours."""
    entry = read_json(path)
    config = model_configurations()["ncsnpp_cifar10"]
    with torch.device("meta"):
        network = hydra.utils.instantiate(config["network"])
        params = {name: torch.empty(shape) for name, shape in entry["shapes"].items()}
        ours = {name: value.shape for name, value in song_weights(params, network).items()}
    assert ours == {name: value.shape for name, value in network.state_dict().items()}
    assert sum(value.numel() for value in params.values()) == entry["n_params"]
    assert config["c_noise_scale"] == NVLABS
    return len(entry["shapes"])
