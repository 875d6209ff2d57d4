"""Comparisons of EDM2, its layers, its learned weighting and its training with the published code.

A network is evaluated as stored ("eval"), or after the forced normalisation that comes before each training step ("train").
Runs in float64 are compared with the arrays `*.f64`.
"""

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from consistency.denoiser import Denoiser
from consistency.distances import L2
from consistency.networks import edm2
from consistency.networks.edm2 import EDM2, MPConv, MPFourier, forced_normalisation
from consistency.networks.unet import fir_filter, resample
from consistency.objectives import DenoisingObjective
from consistency.pairs import LognormalTimes
from consistency.pixels import quantised, to_unit
from consistency.preconditioning import EDM
from consistency.schedules import inverse_root_rate
from consistency.tensors import NO_CLASS, Data, Label, PerSample
from consistency.weightings import FourierWeighting, karras
from golden_harness import Archive, Tolerance, read_json, read_safetensors, require_known
from golden_networks import MODELS, NVLABS, class_indices

# Section 4 of the README of these files.
OUTPUT, LOSS, STATE = Tolerance(of_norm=1e-5), Tolerance(of_norm=2e-5), Tolerance(of_norm=1e-5)
GRADIENT, GAIN = Tolerance(of_norm=1e-4), Tolerance(of_norm=1e-4, absolute=1e-6)
DIGESTS, FLOAT64 = Tolerance(of_norm=1e-5), Tolerance(of_norm=1e-9)
RATE = Tolerance(of_each=1e-12)

ARGUMENTS = {
    **{
        "img_resolution": "image_size",
        "img_channels": "in_channels",
        "num_blocks": "num_res_blocks",
    },
    **{"attn_resolutions": "attention_resolutions", "channels_per_head": "num_head_channels"},
}
"""Of the published constructor, and ours."""
SAME = {
    *("model_channels", "channel_mult", "channel_mult_noise", "channel_mult_emb", "dropout"),
    *(
        "resample_filter",
        "label_balance",
        "concat_balance",
        "res_balance",
        "attn_balance",
        "clip_act",
    ),
}
OTHER = {"label_dim", "logvar_channels", "sigma_data", "use_fp16"}
"""The last changes nothing on a CPU."""


def arguments(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of our network from those of the published preconditioned one."""
    require_known(theirs, {*ARGUMENTS, *SAME, *OTHER}, "the network's arguments")
    ours = {ARGUMENTS.get(name, name): v for name, v in theirs.items() if name not in OTHER}
    return ours | {"num_classes": theirs["label_dim"] or None}


def network(theirs: dict[str, Any]) -> EDM2:
    return EDM2(**arguments(theirs))


class Published(nn.Module):
    """Our denoiser and learned weighting with the weights of a file, under the published names."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.entry = read_json(path.with_name("edm2_configs.json"))[path.stem.removeprefix("edm2_")]
        given = self.entry["constructor"]
        self.sigma_data = float(given.get("sigma_data", 0.5))
        scalings = EDM(sigma_data=self.sigma_data, c_noise_scale=NVLABS)
        self.denoise = Denoiser(network(given), scalings)
        width = given.get("logvar_channels", 128)
        self.head = FourierWeighting(preconditioning=scalings, width=width)
        weights = read_safetensors(path)
        assert sorted(self.named()) == sorted(weights) == sorted(self.entry["state"])
        with torch.no_grad():
            for name, tensor in self.named().items():
                tensor.copy_(weights[name])
        self.to(dtype)
        self.normalise = forced_normalisation(self)

    def named(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        ours = self.state_dict(keep_vars=True).items()
        return {
            name.replace("denoise.network.", "unet.").replace("head.", "logvar_"): tensor
            for name, tensor in ours
        }

    def digests(self, names: list[str], gradients: bool = False) -> Tensor:
        """Norm of each tensor or gradient, and its sum weighted by cos(0.7 n + 0.3) at the flat index n."""
        tensors = self.named()
        rows = []
        for name in names:
            v = tensors[name].grad if gradients else tensors[name]
            assert v is not None, name
            v = v.detach().double().contiguous().flatten()
            n = torch.arange(len(v), dtype=torch.float64)
            rows.append(torch.stack([v.norm(), (v * (0.7 * n + 0.3).cos()).sum()]))
        return torch.stack(rows)

    def log_variance(self, t: Tensor) -> Tensor:
        """l(t) in the published shape."""
        return self.head.log_variance(t)[:, None, None, None]


class Case:
    """A network with its inputs; `init` is the published start, whose gains are 0, `rand` the file as it is."""

    def __init__(self, archive: Archive, kind: str, dtype: torch.dtype = torch.float32) -> None:
        self.archive, self.kind, self.dtype = archive, kind, dtype
        self.model = Published(archive.path.with_suffix(".safetensors"), dtype)
        self.names, self.state = self.model.entry["params"], self.model.entry["state"]
        self.gains = [name for name in self.state if name.endswith("_gain")]
        if kind == "init":
            for name in self.gains:
                self.model.named()[name].data.zero_()
        self.x, self.t, self.R = (self.tensor(name) for name in ("x", "sigma", "R"))
        self.label: Label = None
        if "labels" in archive:
            self.label = class_indices(archive.tensor("labels"))

    def tensor(self, name: str) -> Tensor:
        values = self.archive.tensor(name)
        return values.to(self.dtype) if values.is_floating_point() else values

    def denoised(self, t: Tensor | None = None) -> Data:
        return self.model.denoise(self.x, self.t if t is None else t, self.label)

    def loss(self) -> Tensor:
        return (self.R * self.denoised()).mean() + self.model.log_variance(self.t).mean()

    def compare(self, name: str, ours: Tensor, tolerance: Tolerance) -> None:
        """Compare with an array of the file that has this precision; it may be absent."""
        double = self.dtype == torch.float64
        name = f"{name}.f64" if double else name
        if name in self.archive:
            self.archive.compare(name, ours, FLOAT64 if double else tolerance)

    def compare_outputs(self, prefix: str) -> None:
        with torch.no_grad():
            self.compare(f"{prefix}.D", self.denoised(), OUTPUT)
            self.compare(f"{prefix}.logvar", self.model.log_variance(self.t), OUTPUT)

    def compare_gradients(self, prefix: str) -> None:
        """Digests of all gradients of the loss, and some gradients in full."""
        self.model.zero_grad()
        self.loss().backward()
        digests = self.model.digests(self.names, gradients=True)
        self.compare(f"{prefix}.grad_digest", digests, DIGESTS)
        for name in self.archive.matching(f"{prefix}.grad.*"):
            ours = self.model.named()[name.removeprefix(f"{prefix}.grad.")].grad
            assert ours is not None, name
            self.archive.compare(name, ours, GRADIENT if ours.ndim else GAIN)

    def compare_state(self, digests: str, prefix: str) -> None:
        """Digests of the whole state, and the tensors that stand in full under the prefix."""
        self.compare(digests, self.model.digests(self.state), STATE)
        weights = self.model.named()
        for name in self.archive.matching(f"{prefix}*"):
            if (weight := name.removeprefix(prefix)) in weights:
                self.archive.compare(name, weights[weight], STATE)


def compare_network(archive: Archive) -> None:
    """Outputs, gradients, forced normalisation, one step and a run of three of one network."""
    name = archive.path.stem.removeprefix("edm2_")
    if name not in read_json(archive.path.with_name("edm2_configs.json")):
        return  # layers, schedules, averages, snapshots
    for kind in (kind for kind in ("init", "rand") if f"{kind}.D" in archive):
        compare_evaluation(archive, kind)
        compare_forced(archive, kind)
        compare_step(archive, kind)
        double = Case(archive, kind, torch.float64)
        double.compare_outputs(kind)
        double.compare(f"{kind}.s", double.loss(), LOSS)
    if "traj.images" in archive:
        compare_training(archive, torch.float32)
        compare_training(archive, torch.float64)


def compare_evaluation(archive: Archive, kind: str) -> None:
    """The network as it is stored, with and without classes, and all its gradients."""
    case = Case(archive, kind)
    heads = {
        name.replace("network.", "unet."): block.heads
        for name, block in case.model.denoise.named_modules()
        if isinstance(block, edm2.Block)
    }
    assert heads == case.model.entry["heads"]
    count = sum(p.numel() for p in case.model.parameters())
    assert count == case.model.entry["n_parameters"]
    case.compare_outputs(kind)
    case.compare(f"{kind}.s", case.loss(), LOSS)
    case.compare_gradients(kind)
    case.x.requires_grad_()
    (case.R * case.denoised()).mean().backward()
    assert case.x.grad is not None
    case.compare(f"{kind}.grad_x", case.x.grad, GRADIENT)
    with torch.no_grad():
        t = torch.full_like(case.t, told(archive.path, r"sigma = ([\d.]+) given as a 0-dim", 0.75))
        case.compare(f"{kind}.D_sigma0d", case.denoised(t), OUTPUT)
        if case.label is not None:
            case.label = torch.full_like(case.label, NO_CLASS)
            case.compare(f"{kind}.D_nolabel", case.denoised(), OUTPUT)


def compare_forced(archive: Archive, kind: str) -> None:
    """The network and its weights after one and after two normalisations, and its gradients."""
    case = Case(archive, kind)
    case.model.normalise()
    case.compare_outputs(f"{kind}.train")
    case.compare_gradients(f"{kind}.train")
    case.compare_state(f"{kind}.state_after_digest", f"{kind}.state_after.")
    case.model.normalise()
    with torch.no_grad():
        case.compare(f"{kind}.train.D_second", case.denoised(), OUTPUT)
    case.compare_state(f"{kind}.state_after2_digest", f"{kind}.state_after2.")


def compare_step(archive: Archive, kind: str) -> None:
    """The network after one step of Adam on the loss of the case."""
    for dtype in (torch.float32, torch.float64):
        case = Case(archive, kind, dtype)
        optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
        case.model.normalise()
        case.loss().backward()
        optimizer.step()
        case.compare_outputs(f"{kind}_step1")
        if dtype == torch.float32:
            case.compare_state(f"{kind}_step1.state_digest", f"{kind}_step1.")


class Squares(L2):
    """The distance of training, which keeps (x - y)^2."""

    def forward(self, x: Data, y: Data) -> PerSample:
        self.squares = (x - y).square()
        return super().forward(x, y)


def compare_training(archive: Archive, dtype: torch.dtype) -> None:
    """Steps of the released training: sum of the loss over pixels, Adam, its learning rate.

    Our loss is the mean over the pixels, so that the released one is it times their number.
    """
    case = Case(archive, "rand", dtype)
    model, spec = case.model, case.model.entry["traj"]
    known = {"batch_size", "cur_nimg", "lr_kwargs", "P_mean", "P_std", "sigma_data", "adam"}
    require_known(spec, known, "the run's settings")
    distance, sigma_data = Squares(), float(spec["sigma_data"])
    objective = DenoisingObjective(
        times=LognormalTimes(p_mean=float(spec["P_mean"]), p_std=float(spec["P_std"])),
        distance=distance,
        weighting=lambda t, r: karras(t, r, sigma_data=sigma_data),
        head=model.head,
    )
    rates = [rate(spec["lr_kwargs"], spec["batch_size"], images) for images in spec["cur_nimg"]]
    if dtype == torch.float32:
        archive.compare("traj.lr", torch.tensor(rates, dtype=torch.float64), RATE)
    settings = spec["adam"] | {"betas": tuple(spec["adam"]["betas"])}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, **settings)
    x_0, z, normal = (case.tensor(f"traj.{n}") for n in ("images", "noise", "rnd_normal"))
    labels = archive.tensor("traj.labels") if "traj.labels" in archive else [None] * len(x_0)
    rows: dict[str, list[Tensor]] = {}

    def note(**numbers: Tensor) -> None:
        for name, value in numbers.items():
            rows.setdefault(name, []).append(value.detach().clone())

    for s, now in enumerate(rates):
        optimizer.param_groups[0]["lr"] = now
        optimizer.zero_grad()
        model.normalise()
        label = None if labels[s] is None else class_indices(labels[s])
        t = objective.times.at(normal[s].flatten())
        losses = objective.losses_at(model.denoise, x_0[s], label, t, z[s]).loss
        total = losses.mean() * x_0[s][0].numel()
        total.backward()
        weight = objective.weighting(t, t)[:, None, None, None]
        log_variance = model.log_variance(t)
        loss = weight / log_variance.exp() * distance.squares + log_variance
        note(loss=loss, loss_sum_over_B=total)
        note(grad_digest=model.digests(case.names, gradients=True))
        optimizer.step()
        note(state_digest=model.digests(case.state))
        note(gains=torch.stack([model.named()[name] for name in case.gains]))
        with torch.no_grad():
            note(D=case.denoised(), logvar=model.log_variance(case.t))
    tolerances = {"loss": LOSS, "loss_sum_over_B": LOSS, "grad_digest": DIGESTS, "gains": STATE}
    for name, values in rows.items():
        case.compare(f"traj.{name}", torch.stack(values), tolerances.get(name, OUTPUT))


def rate(given: dict[str, Any], batch: int, images: float) -> float:
    """The released learning rate after so many images, from ours, which counts steps."""
    require_known(given, {"batch_size", "ref_lr", "ref_batches", "rampup_Mimg"}, "learning rate")
    ramp = given["rampup_Mimg"] * 1e6 / batch
    factor = inverse_root_rate(images / batch, ref_steps=given["ref_batches"], ramp_steps=ramp)
    return float(given["ref_lr"]) * factor


def told(path: Path, pattern: str, default: float) -> float:
    """A number that only the descriptions of the arrays have."""
    for text in path.parent.glob("ARRAYS*.md"):
        if found := re.search(pattern, text.read_text()):
            return float(found[1])
    return default


@torch.no_grad()
def compare_layers(archive: Archive) -> None:
    """Sums, concatenations, normalisation, resampling, convolutions and Fourier features alone."""
    a, b, bb = (archive.tensor(name) for name in ("a", "b", "bb"))
    for name in archive.matching("mp_sum.t*"):
        archive.compare(name, edm2.mp_sum(a, bb, float(name.partition(".t")[2])), OUTPUT)
    for name in archive.matching("mp_cat.t*"):
        archive.compare(name, edm2.mp_cat(a, b, float(name.partition(".t")[2])), OUTPUT)
    archive.compare("mp_silu", edm2.mp_silu(a), OUTPUT)
    archive.compare("normalize", edm2.normalise(a), OUTPUT)
    archive.compare("normalize.dim1", edm2.normalise(a, dims=(1,)), OUTPUT)
    archive.compare("normalize.small_dim1", edm2.normalise(1e-4 * a, dims=(1,)), OUTPUT)
    for name in archive.matching("resample.*"):
        _, direction, digits = name.split(".")
        taps = fir_filter([int(tap) for tap in digits])
        padding = (len(digits) - 1) // 2
        archive.compare(name, resample(a, taps, up=direction == "up", padding=padding), OUTPUT)
    compare_convolutions(archive)
    fourier = MPFourier(archive.input("fourier.freqs").size)
    fourier.freqs, fourier.phases = (archive.tensor(f"fourier.{n}") for n in ("freqs", "phases"))
    archive.compare("fourier.out", fourier(archive.tensor("fourier.c_noise")), OUTPUT)


def compare_convolutions(archive: Archive) -> None:
    gain = told(archive.path, r"MPConv\(gain=([\d.]+)\)", 0.7)
    given = {"conv": (archive.tensor("a"), "w4"), "linear": (archive.tensor("linear.in"), "w2")}
    for name in archive.matching("*.train[01].out"):
        case = name.removesuffix(".out")
        x, weight = given["linear" if case.startswith("linear") else "conv"]
        values = archive.tensor(weight)
        layer = MPConv(values.shape[1], values.shape[0], values.shape[2] if values.ndim > 2 else 0)
        layer.weight.copy_(values)
        if case.endswith("train1"):
            forced_normalisation(layer)()
        archive.compare(name, layer(x, gain=gain), OUTPUT)
        archive.compare(f"{case}.weight_after", layer.weight, OUTPUT)


def compare_scalars(archive: Archive) -> None:
    """Learning rates, and pixels of images that are not latents."""
    for i, given in enumerate(read_json(archive.path.with_suffix(".json"))["lr_cases"]):
        images = archive.input(f"lr{i}.cur_nimg").tolist()
        ours = [rate(given, given["batch_size"], n) for n in images]
        archive.compare(f"lr{i}.lr", torch.tensor(ours, dtype=torch.float64), RATE)
    shape = archive.arrays["rgb.latents_of_0_255"].shape
    grey = torch.arange(256, dtype=torch.uint8).reshape(shape)
    archive.compare("rgb.latents_of_0_255", to_unit(grey), Tolerance(absolute=1e-6))
    # The released code rounds halves up, ours to even.
    archive.compare("rgb.decoded", quantised(archive.tensor("rgb.x")), Tolerance(absolute=1.0))


def compare_presets(path: Path) -> int:
    """Numbers of parameters of every published preset, and the arguments of conf/model where it has the preset."""
    content, count = read_json(path), 0
    defaults = content["precond_defaults"]
    ours = arguments({"label_dim": 0} | defaults)
    for name, preset in content["presets"].items():
        for kind in ("cond", "uncond"):
            with torch.device("meta"):
                net = network(preset[kind]["precond_args"])
            found = sum(p.numel() for p in net.parameters())
            assert found == preset[kind]["n_unet_parameters"], (name, kind)
            head = preset[kind]["n_parameters"] - preset[kind]["n_unet_parameters"]
            assert head == defaults["logvar_channels"]
            count += 1
        _, size, letter = name.split("-")
        ending = {"img64": "imagenet64", "img512": "latents64"}[size]
        if (path := MODELS / f"edm2_{letter}_{ending}.yaml").is_file():
            expected = ours | arguments(preset["cond"]["precond_args"])
            node = model_node(path)
            assert {name: node[name] for name in expected} == expected, name
    return count


def model_node(path: Path) -> dict[str, Any]:
    """The network of a file of conf/model, whose defaults list may name another."""
    content = yaml.safe_load(path.read_text())
    bases = [name for name in content.get("defaults", ()) if name != "_self_"]
    node: dict[str, Any] = {}
    for base in bases:
        node |= model_node(path.with_name(f"{base}.yaml"))
    return node | content["network"]
