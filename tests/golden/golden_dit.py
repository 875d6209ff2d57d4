"""Comparisons of the diffusion transformer with the released codes of DiT, SiT and the two-time SiT of MeanFlow in PyTorch."""

import math
import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import hydra
import torch
from torch import Tensor, nn

from consistency.average_velocity import MeanFlowObjective
from consistency.denoiser import Denoiser
from consistency.derivatives import ExactDerivative
from consistency.distances import Adaptive, SquaredNorm
from consistency.flow_pairs import LogitNormalPairs
from consistency.flow_samplers import flow_jumps
from consistency.networks.dit import DiT, position_embedding
from consistency.networks.layers import sinusoidal_features
from consistency.preconditioning import RectifiedFlow, Unscaled
from consistency.steps import FlowVelocity, Guided, SelfGuidance
from consistency.tensors import NO_CLASS, Data, Label, PerSample, Time
from golden_harness import Archive, Tolerance, read_json, read_safetensors, require_known
from golden_meanflow import Kept, Seen
from golden_networks import Watched, gradients_of, model_configurations

# ------------------------------------------------------------------------------- constructors

SAME = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
OTHER = ("input_size", "learn_sigma", "class_dropout_prob")
MEANFLOW = ("decoder_hidden_size", "qk_norm", "fused_attn")


def arguments(entry: dict[str, Any], *, two_times: bool) -> dict[str, Any]:
    """Ours from those of the released constructors."""
    require_known(entry, {*SAME, *OTHER, *MEANFLOW}, "the network's arguments")
    assert entry.get("decoder_hidden_size", entry["hidden_size"]) == entry["hidden_size"]
    assert not entry.get("qk_norm")
    ours = {name: entry[name] for name in SAME} | {"image_size": entry["input_size"]}
    ours["learn_sigma"] = entry.get("learn_sigma", not two_times)
    return ours | {"second_time": "gap" if two_times else None}


def settings(path: Path) -> dict[str, Any]:
    """The entry of a file of arrays or weights in dit_configs.json."""
    entry: dict[str, Any] = read_json(path.with_name("dit_configs.json"))[path.stem[4:]]
    return entry


def transformer(path: Path, **changes: Any) -> DiT:
    """The network of a file of arrays or weights: a later file of weights replaces or extends the ones before."""
    entry = settings(path)
    network = DiT(**arguments(entry["constructor"], two_times="meanflow" in path.stem), **changes)
    weights: dict[str, Tensor] = {}
    for file in re.findall(r"\w+\.safetensors", entry["weights"]):
        weights |= read_safetensors(path.with_name(file))
    network.load_state_dict(weights)
    names = [name for name, _ in network.named_parameters()]
    assert sorted(names) == sorted(entry["params"])
    assert counts(network) == (entry["n_parameters"], entry["n_trainable"])
    return network.eval()


def counts(network: DiT) -> tuple[int, int]:
    """Numbers of the network with its fixed position embedding, and without."""
    trained = sum(p.numel() for p in network.parameters())
    return trained + network.pos_embed.numel(), trained


def compare_configs(path: Path) -> int:
    """The first weights of every network, and the published numbers of parameters of the files in conf/model."""
    entries = read_json(path)
    for name in ("dit", "sit", "meanflow"):
        entry = entries[name]
        first = entry.get("init", {})
        ours = DiT(**arguments(entry["constructor"], two_times=name == "meanflow"))
        assert set(dict(ours.named_parameters())) == set(entry["params"])
        for parameter, law in first.items() if isinstance(first, dict) else ():
            check_first(ours.state_dict()[parameter], law)
    published = entries["published"]["counts"]
    for name, entry in published.items():
        found = re.fullmatch(r"(MeanFlow-SiT )?[DS]iT-(\w+)/\d+", name)
        assert found
        config, sizes = released(found[2].lower(), entry["patch_size"], two_times=bool(found[1]))
        assert sizes == (entry["n_parameters"], entry["n_trainable"]), name
        same = ("depth", "hidden_size", "num_heads")
        assert [config[key] for key in same] == [entry[key] for key in same], name
    return len(published)


@cache
def released(size: str, patch: int, *, two_times: bool) -> tuple[dict[str, Any], tuple[int, int]]:
    """The settings of the file in conf/model, or of the same size with other patches, and the counts of the network."""
    shipped = model_configurations()
    model = shipped.get(f"dit_{size}{patch}", shipped[f"dit_{size}2"])
    config = model["network"] | {"patch_size": patch}
    if two_times:
        config |= {"second_time": "gap", "learn_sigma": False}
    with torch.device("meta"):
        return config, counts(hydra.utils.instantiate(config))


def check_first(value: Tensor, law: str) -> None:
    """Whether a parameter is drawn by the law in words."""
    number = re.search(r"(?:std|bound) ([\d.]+)", law)
    if law.startswith("fixed") or number is None:
        assert law.startswith("fixed") or (law == "zeros" and not value.any()), law
        return
    deviation = float(number[1]) / (math.sqrt(3) if "bound" in law else 1)
    assert abs(float(value.std()) / deviation - 1) < 6 / math.sqrt(value.numel()), law
    if "bound" in law:
        assert 0.95 < float(value.abs().max()) / float(number[1]) <= 1 + 1e-6, law


# ------------------------------------------------------------------------------- outputs


def every_channel(network: DiT, x: Data, t: Time, label: Label, r: Time | None = None) -> Data:
    """The image of the last layer with the channels that the network leaves out."""
    watched = Watched(network, {"final_layer"})
    network(x, t, label, **({} if r is None else {"r": r}))
    return network.images(watched.outputs["final_layer"])


@dataclass
class Part:
    """The arrays of one network in one precision, and section 4 of the golden README for it."""

    archive: Archive
    dtype: torch.dtype

    @property
    def suffix(self) -> str:
        return ".f64" if self.dtype == torch.float64 else ""

    def given(self, name: str) -> Tensor:
        value = self.archive.tensor(name)
        return value.to(self.dtype) if value.is_floating_point() else value

    def network(self, **changes: Any) -> DiT:
        return transformer(self.archive.path, **changes).to(self.dtype)

    def label(self, name: str) -> Tensor:
        """Class indices, with ours for no class."""
        known = settings(self.archive.path)["constructor"]["num_classes"]
        label = self.archive.tensor(name)
        return torch.where(label < known, label, NO_CLASS)

    def compare(self, name: str, ours: Tensor, of_norm: float) -> None:
        """Compare the array of this precision, if the file has it."""
        if name + self.suffix in self.archive:
            bound = 1e-7 if self.suffix else of_norm
            self.archive.compare(name + self.suffix, ours, Tolerance(of_norm=bound))


def digest(values: list[Tensor]) -> Tensor:
    """The L2 norm of each tensor, and its projection on cos(0.7 n + 0.3)."""
    rows = []
    for value in values:
        v = value.double().flatten()
        line = torch.arange(len(v), dtype=torch.float64).mul(0.7).add(0.3).cos()
        rows.append(torch.stack([v.norm(), v @ line]))
    return torch.stack(rows)


def compare_network(archive: Archive) -> None:
    """Output, gradients, inner values, time and position embedding, label drop and guidance of DiT or SiT."""
    near = 2e-4 if archive.path.stem == "dit_dit" else 2e-5  # sines of t up to 999 in float32
    for dtype in (torch.float32, torch.float64):
        part = Part(archive, dtype)
        compare_pass(part, part.given("t"), None, near)
        if dtype == torch.float32:
            compare_embeddings(part, near)
            compare_labels(part, near)


def compare_pass(part: Part, t: Time, r: Time | None, near: float) -> None:
    """Output and gradients of one pass, and what stands between."""
    network, label = part.network(), part.label("y")
    x = part.given("x").requires_grad_()
    seen: list[tuple[Tensor, ...]] = []
    network.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    blocks = {f"blocks.{n}": f"inner.block{n}" for n in range(len(network.blocks))}
    watched = Watched(network, {*blocks})
    last: list[Tensor] = []
    network.final_layer.register_forward_hook(lambda module, inputs, out: last.append(out))
    output = network(x, t, label, **({} if r is None else {"r": r}))
    image, channels = network.images(last[0]), part.archive.arrays["out"].shape[1]
    assert torch.equal(image[:, : output.shape[1]], output)
    output = image[:, :channels]
    s = (part.given("R") * output).mean()
    s.backward()
    inner = {"tokens": seen[0][0], "c": seen[0][1], "final": last[0]}
    values = {"out": output, "s": s} | {f"inner.{name}": v for name, v in inner.items()}
    values |= {name: watched.outputs[block] for block, name in blocks.items()}
    for name, value in values.items():
        part.compare(name, value, near)
    gradients = gradients_of(network)
    assert x.grad is not None
    part.compare("grad_x", x.grad, 1.5 * near)
    for name, gradient in gradients.items():
        part.compare(f"s.grad.{name}", gradient, 1.5 * near)
    names = settings(part.archive.path)["params"]
    part.compare("s.grad_digest", digest([gradients[name] for name in names]), 1.5 * near)


@torch.no_grad()
def compare_embeddings(part: Part, near: float) -> None:
    network, t = part.network(), part.given("t")
    part.compare("t_embedding.mlp", network.t_embedder(t), near)
    for name in part.archive.matching("t_embedding.freq*"):
        width = int(name.removeprefix("t_embedding.freq"))
        part.compare(name, sinusoidal_features(t, width), near)
    fresh = DiT(**arguments(settings(part.archive.path)["constructor"], two_times=False))
    part.compare("pos_embed", fresh.pos_embed, 1e-7)
    for name in part.archive.matching("pos.D*"):
        width, side = map(int, re.findall(r"\d+", name))
        part.compare(name, position_embedding(width, side), 1e-14)


@torch.no_grad()
def compare_labels(part: Part, near: float) -> None:
    """Dropped labels, and guidance, which is of the first three channels in the released codes."""
    network, x, t, label = part.network(), part.given("x"), part.given("t"), part.label("y")
    constructor = settings(part.archive.path)["constructor"]
    dropped = part.given("drop.rand") < constructor["class_dropout_prob"]
    channels = part.archive.arrays["out"].shape[1]
    output = every_channel(network, x, t, torch.where(dropped, NO_CLASS, label))
    part.compare("train.out", output[:, :channels], near)
    forced = torch.where(part.given("drop.force") == 1, NO_CLASS, label)
    part.compare("drop.force_embedding", network.y_embedder(forced), near)
    label, half = part.label("cfg.y"), len(part.given("cfg.x")) // 2
    x, t = part.given("cfg.x")[:half], part.given("cfg.t")
    assert torch.equal(t[:half], t[half:])
    assert (label[half:] == NO_CLASS).all()
    unguided = every_channel(network, x.repeat(2, 1, 1, 1), t, label)[:, :channels]
    denoise = Denoiser(network, Unscaled())
    for name in part.archive.matching("cfg.out.*"):
        guided = Guided(denoise, float(name.removeprefix("cfg.out.")))(x, t[:half], label[:half])
        first = guided[:, :3].repeat(2, 1, 1, 1)
        part.compare(name, torch.cat([first, unguided[:, 3:]], dim=1), near)


# ------------------------------------------------------------------------------- MeanFlow


def compare_meanflow(archive: Archive) -> None:
    """Output, derivatives, losses with their gradients, and samples of the network with two times."""
    for dtype in (torch.float32, torch.float64):
        part = Part(archive, dtype)
        compare_pass(part, part.given("t"), part.given("r"), 2e-5)
        compare_derivatives(part)
        for name, case in settings(archive.path)["loss_cases"].items():
            case = settings(archive.path)["loss_defaults"] | case
            if {"linear": True, "cosine": False}[case["path_type"]]:
                compare_loss(part, f"loss.{name}", case)
            else:
                # No flow of ours has another path than the straight one.
                archive.read.update(archive.matching(f"loss.{name}.*"))
    compare_samples(Part(archive, torch.float32))


def compare_derivatives(part: Part) -> None:
    """Derivatives of the network with the fused kernel, and with the formula."""
    x, t, r, v, label = *map(part.given, ("x", "t", "r", "v")), part.label("y")
    online, derivative = Denoiser(part.network(), Unscaled()), ExactDerivative()
    with torch.no_grad():
        part.compare("out_diag", online(x, t, label, t), 2e-5)
        # Without labels the released network takes class 0.
        part.compare("out_no_y", online(x, t, torch.zeros_like(label), r), 2e-5)
        u, du = derivative(online, x, t, r, v, label)
        _, du_dt = derivative(online, x, t, r, torch.zeros_like(v), label)
        plain = Denoiser(part.network(attention="plain"), Unscaled())
        _, du_dr = torch.func.jvp(partial(plain, x, t, label), (r,), (torch.ones_like(r),))
    part.compare("jvp.u", u, 2e-5)
    part.compare("jvp.dudt", du, 5e-5)
    part.compare("jvp.du_dt_only", du_dt, 5e-5)
    part.compare("jvp.du_dr_only", du_dr, 5e-5)


class TwiceSquared(nn.Module):
    """The released weight, which squares the squared norm S again: S^2 / (S^2 + 1e-3)^p, that of `Adaptive` for S."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.inner = Adaptive(p=p, c=1e-3)

    def forward(self, x: Data, y: Data) -> PerSample:
        s = SquaredNorm()(x, y)[:, None, None, None]
        return self.inner(s, torch.zeros_like(s))


def compare_loss(part: Part, name: str, case: dict[str, Any]) -> None:
    law = {
        f"{n}_{x}": case[f"time_{key}"]
        for n, key in (("mean", "mu"), ("std", "sigma"))
        for x in "tr"
    }
    pairs = LogitNormalPairs(**law, equal=1 - case["ratio_r_not_equal_t"])
    uniform = {"uniform": True, "logit_normal": False}[case["time_sampler"]]
    draws = part.given(f"{name}.time_{'uniform' if uniform else 'normal'}").unbind(1)
    gate = part.given(f"{name}.equal_gate")
    t, r = (pairs.arranged if uniform else pairs.at)(*draws, gate)
    adaptive = {"uniform": False, "adaptive": True}[case["weighting"]]
    kept = Kept(TwiceSquared(case["adaptive_p"]) if adaptive else SquaredNorm())
    seen, span = Seen(ExactDerivative()), {"t_start": case["cfg_min_t"], "t_end": case["cfg_max_t"]}
    objective = MeanFlowObjective(
        pairs=pairs,
        velocity=FlowVelocity(),
        derivative=seen,
        distance=kept,
        guidance=SelfGuidance(w=case["cfg_omega"], k=case["cfg_kappa"], **span),
        label_dropout=case["label_dropout_prob"],
    )
    network = part.network()
    dropped = part.given(f"{name}.label_drop") < case["label_dropout_prob"]
    x_0, label, z = part.given("loss.images"), part.label("loss.y"), part.given(f"{name}.noise")
    losses = objective.losses_at(Denoiser(network, Unscaled()), x_0, label, t, r, dropped, z).loss
    losses.mean().backward()
    part.compare(f"{name}.loss", losses, 1e-5)
    part.compare(f"{name}.mean_sq", (seen.u - kept.y).square().mean(), 1e-5)
    gradients, names = gradients_of(network), settings(part.archive.path)["params"]
    part.compare(f"{name}.grad_digest", digest([gradients[n] for n in names]), 2e-5)


class GuidedJump(nn.Module):
    """The estimate of an average velocity that is guided at every jump."""

    def __init__(self, denoise: Denoiser, w: float) -> None:
        super().__init__()
        self.denoise, self.w = denoise, w

    def forward(self, x_t: Data, t: Time, label: Label = None, r: Time | None = None) -> Data:
        jump: Any = partial(self.denoise, r=r)
        jump.network = self.denoise.network
        return Guided(jump, self.w)(x_t, t, label)


@torch.no_grad()
def compare_samples(part: Part) -> None:
    denoise = Denoiser(part.network(), RectifiedFlow())
    z, label = part.given("sample.z"), part.label("sample.y")
    for name in part.archive.matching("sample.steps*_cfg*"):
        steps, w = name.removeprefix("sample.steps").split("_cfg")
        times = [1 - k / int(steps) for k in range(int(steps))]
        jump = GuidedJump(denoise, float(w))
        part.compare(name, flow_jumps(jump, lambda: z, label, times=times, t_max=1.0), 2e-5)
