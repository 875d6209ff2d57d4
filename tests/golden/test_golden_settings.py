"""The golden comparisons read every setting of their files: folders with other settings, computed here by plain formulas."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import golden_editing
import golden_formulas
import golden_jcm
import golden_losses
import golden_networks
import golden_samplers
import golden_trajectories
from golden_harness import FOLDER, Archive, read_json

SD, T_MIN, T_MAX, RHO = 0.5, 0.002, 80.0, 7.0


def small(folder: Path, name: str) -> nn.Module:
    """One of the small networks, copied to the folder, as a black box."""
    if not (folder / "openai_small").is_dir():
        shutil.copytree(FOLDER / "openai_small", folder / "openai_small")
    return golden_networks.small_network(folder / "openai_small", name)


def boundary(
    network: nn.Module, x: Tensor, t: Tensor, y: Tensor | None, scale: float = 250.0
) -> Tensor:
    """f(x, t) by the formula."""
    s = t[:, None, None, None]
    skip = SD**2 / ((s - T_MIN) ** 2 + SD**2)
    out = (s - T_MIN) * SD / (s**2 + SD**2) ** 0.5
    inside = network(x / (s**2 + SD**2) ** 0.5, scale * t.log(), y)
    result: Tensor = skip * x + out * inside
    return result


def denoiser(network: nn.Module, x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
    """D(x, t) by the formula."""
    s = t[:, None, None, None]
    skip, out = SD**2 / (s**2 + SD**2), s * SD / (s**2 + SD**2) ** 0.5
    result: Tensor = skip * x + out * network(x / (s**2 + SD**2) ** 0.5, scale * t.log(), y)
    return result


def level(i: Tensor, n: int) -> Tensor:
    low, high = T_MIN ** (1 / RHO), T_MAX ** (1 / RHO)
    return (high + i.double() / (n - 1) * (low - high)) ** RHO


def averaged(average: nn.Module, online: nn.Module, rate: float) -> None:
    for mean, now in zip(average.parameters(), online.parameters(), strict=True):
        mean.data.mul_(rate).add_(now.data, alpha=1 - rate)


def write(path: Path, arrays: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v.numpy() if isinstance(v, Tensor) else v for k, v in arrays.items()})
    return path


def compared(path: Path, compare: Callable[[Archive], None]) -> Archive:
    """Runs a comparison; every array of the file was read or compared, as `test_golden.py` demands."""
    archive = Archive(path)
    compare(archive)
    forgotten = set(archive.arrays) - archive.read - set(archive.compared)
    assert not forgotten
    return archive


# ------------------------------------------------------------------------------ trajectories

STEPS, BATCH = 4, 2


def draws() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS, BATCH, 3, 16, 16)
    return {
        "x_start": torch.rand(shape, generator=generator) * 2 - 1,
        "y": torch.randint(10, (STEPS, BATCH), generator=generator),
        "noise": torch.randn(shape, generator=generator),
    }


def training(folder: Path, spec: dict[str, Any]) -> Path:
    """Consistency training (N = 18) or training of a denoiser, by hand, in float64."""
    denoising = "schedule_sampler" in spec
    name = "teacher" if denoising else "online"
    online, target, *means = (
        small(folder, name).double().train()
        for _ in range(2 + len(str(spec["ema_rate"]).split(",")))
    )
    kind = getattr(torch.optim, spec.get("optimizer", "RAdam"))
    options = {k: spec[k] for k in ("weight_decay", "eps", "betas") if k in spec}
    optimizer = kind(online.parameters(), lr=spec["lr"], **options)
    given = draws()
    arrays: dict[str, Any] = dict(given)
    indices = torch.randint(17, (STEPS, BATCH), generator=torch.Generator().manual_seed(1))
    normal = torch.randn(STEPS, BATCH, generator=torch.Generator().manual_seed(2))
    roles = {"online": online} | {f"ema{j}": mean for j, mean in enumerate(means)}
    roles |= {} if denoising else {"target": target}
    tracked = "middle_block.1.proj_out.bias"
    rows: dict[str, list[Tensor]] = {
        role: [dict(module.named_parameters())[tracked].detach().clone()]
        for role, module in roles.items()
    }
    losses, after = [], []
    for s in range(STEPS):
        x, z, y = given["x_start"][s].double(), given["noise"][s].double(), given["y"][s]
        if denoising:
            p_mean, p_std = (float(n) for n in spec["schedule_sampler"][10:-1].split(","))
            t = (p_mean + p_std * normal[s].double()).exp()
            x_t = x + t[:, None, None, None] * z
            error = (denoiser(online, x_t, t, y, 250.0) - x).square().mean((1, 2, 3))
        else:
            t, r = level(indices[s], 18), level(indices[s] + 1, 18)
            f = boundary(online, x + t[:, None, None, None] * z, t, y)
            with torch.no_grad():
                g = boundary(target, x + r[:, None, None, None] * z, r, y)
            error = (f - g).square().mean((1, 2, 3))
        weight = {"uniform": 1.0, "karras": t**-2 + SD**-2, "snr": t**-2}
        loss = weight[spec.get("weight_schedule", "uniform")] * error
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.detach())
        rates = [float(rate) for rate in str(spec["ema_rate"]).split(",")]
        for mean, rate in zip(means, rates, strict=True):
            averaged(mean, online, rate)
        averaged(target, online, 0.8)
        anneal = spec.get("lr_anneal_steps", 0)
        after.append(spec["lr"] * (1 - (s + 1) / anneal) if anneal else spec["lr"])
        optimizer.param_groups[0]["lr"] = after[-1]
        for role, module in roles.items():
            rows[role].append(dict(module.named_parameters())[tracked].detach().clone())
    arrays["param_names"] = np.array([name for name, _ in online.named_parameters()])
    arrays["loss_per_sample"] = torch.stack(losses).float()
    arrays["loss_per_sample.f64"] = torch.stack(losses)
    arrays["lr_after"] = np.array(after)
    for role, values in rows.items():
        arrays[f"dw64.{role}.{tracked}"] = torch.stack(values) - values[0]
    if denoising:
        arrays["sigma_normal"] = normal
    else:
        arrays["indices"] = indices
        arrays["num_scales"] = np.full(STEPS, 18)
        arrays["target_ema"] = np.full(STEPS, 0.8)
        arrays["global_step"] = np.arange(STEPS)
    path = write(folder / "openai_trajectory" / "run.npz", arrays)
    (path.parent / "specs.json").write_text(json.dumps({"run": spec}))
    return path


CT = {
    "mode": "consistency_training",
    "ema": "fixed",
    "start_ema": 0.8,
    "scale": "fixed",
    "s0": 18,
    "lr": 0.05,
    "norm": "l2",
    "ema_rate": "0.5,0.9",
    "start_global_step": 0,
    "init": "online.safetensors (online=target)",
}
EDM = {
    "mode": "TrainLoop/edm_train.py",
    "lr": 0.02,
    "ema_rate": "0.9",
    "weight_schedule": "karras",
    "schedule_sampler": "lognormal(-0.8,1.1)",
    "init": "teacher.safetensors",
}


@pytest.mark.parametrize(
    ("base", "change", "decides"),
    [
        pytest.param(CT, {"weight_decay": 0.1}, "weight_decay", marks=pytest.mark.slow),
        (CT, {"lr_anneal_steps": 6, "weight_schedule": "karras"}, "lr_anneal_steps"),
        pytest.param(
            EDM, {"weight_decay": 0.2, "lr_anneal_steps": 9}, "weight_decay", marks=pytest.mark.slow
        ),
        (EDM, {"optimizer": "AdamW", "weight_decay": 0.3, "eps": 1e-3}, "eps"),
        (EDM, {"betas": [0.5, 0.9], "ema_rate": 0.7}, "betas"),
    ],
)
def test_every_option_of_the_optimizer_is_read(
    base: dict[str, Any], change: dict[str, Any], decides: str, tmp_path: Path
) -> None:
    """A run with options of its own agrees with ours, and no longer does when the file loses one of them."""
    spec = base | change
    path = training(tmp_path, spec)
    compared(path, golden_trajectories.compare_trajectory)
    lost = {key: value for key, value in spec.items() if key != decides}
    (path.parent / "specs.json").write_text(json.dumps({"run": lost}))
    with pytest.raises(AssertionError, match="times the tolerance"):
        golden_trajectories.compare_trajectory(Archive(path))


def test_an_unread_setting_is_a_failure(tmp_path: Path) -> None:
    folder = tmp_path / "openai_trajectory"
    path = write(folder / "run.npz", {"a": np.zeros(1)})
    (folder / "specs.json").write_text(json.dumps({"run": CT | {"lookahead": 5}}))
    with pytest.raises(AssertionError, match="lookahead"):
        golden_trajectories.compare_trajectory(Archive(path))


def test_the_jax_trajectories_read_their_optimizer(tmp_path: Path) -> None:
    """Weight decay and other moments, by hand; the same arrays without them disagree."""
    source = Archive(FOLDER / "jcm" / "trajectory_toy.npz")
    case = source.matching("*.image")[0].removesuffix(".image")
    for role in ("online", "target"):
        (tmp_path / "jcm").mkdir(exist_ok=True)
        shutil.copy(FOLDER / "jcm" / f"toy_{role}.safetensors", tmp_path / "jcm")
    online, target, mean = (
        golden_jcm.Toy(tmp_path / "jcm" / f"toy_{role}.safetensors")
        for role in ("online", "target", "online")
    )
    kept = ("image", "indices", "z", "step", "num_scales", "target_ema", "lr", "ema_rate")
    kept += ("start_ema", "start_scales", "end_scales", "n_iters")
    arrays: dict[str, Any] = {f"{case}.{name}": source.arrays[f"{case}.{name}"] for name in kept}
    options = {"weight_decay": 0.3, "beta1": 0.8, "eps": 1e-4}
    optimizer = torch.optim.RAdam(
        online.parameters(),
        lr=source.number(f"{case}.lr"),
        weight_decay=0.3,
        betas=(0.8, 0.999),
        eps=1e-4,
    )
    rows, losses = [online.named("data")["conv_in.bias"]], []
    for s, (image, z, i) in enumerate(
        zip(*(source.tensor(f"{case}.{n}") for n in ("image", "z", "indices")), strict=True)
    ):
        x, noise = image.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2)
        n = int(source.arrays[f"{case}.num_scales"][s])
        t, r = level(i, n).float(), level(i + 1, n).float()
        f = boundary(online, x + t[:, None, None, None] * noise, t, None, 0.25)
        with torch.no_grad():
            g = boundary(target, x + r[:, None, None, None] * noise, r, None, 0.25)
        loss = (f - g).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged(mean, online, source.number(f"{case}.ema_rate"))
        averaged(target, online, float(source.arrays[f"{case}.target_ema"][s]))
        losses.append(loss.detach())
        rows.append(online.named("data")["conv_in.bias"])
    arrays |= {f"{case}.loss": torch.stack(losses)}
    arrays |= {f"{case}.w.params.conv_in.bias": torch.stack(rows)}
    given = {f"{case}.{name}": np.array(value) for name, value in options.items()}
    path = tmp_path / "jcm" / "trajectory_toy.npz"
    compared(write(path, arrays | given), golden_jcm.compare_trajectory)
    for lost in given:
        rest = {name: value for name, value in given.items() if name != lost}
        with pytest.raises(AssertionError, match="times the tolerance"):
            golden_jcm.compare_trajectory(Archive(write(path, arrays | rest)))


# --------------------------------------------------------------------------------------- ECT


def ect(folder: Path, q: float, stage: int, p_mean: float, *, second: bool) -> Path:
    """One case of the ECT loss by hand; `second`: with what the second pass gives."""
    source = Archive(FOLDER / "ect" / "loss.npz")
    (folder / "ect").mkdir(exist_ok=True)
    for name in ("config.json", "net.safetensors"):
        shutil.copy(FOLDER / "ect" / name, folder / "ect")
    network = golden_networks.ect_network(folder / "ect")
    first = source.matching("*.P_mean_P_std_q_k_b")[0].split(".")[0]
    x = source.tensor("images")
    normal, eps = (source.tensor(f"{first}.{name}") for name in ("rnd_normal", "eps"))
    label = golden_networks.no_class(network, len(x))
    if "labels" in source:
        label = golden_networks.class_indices(source.tensor("labels"))
    k, b, c = 8.0, 1.0, 0.03
    t = (p_mean + 0.4 * normal.flatten()).exp()
    r = (t * (1 - (1 + k * torch.sigmoid(-b * t)) / q ** (stage + 1))).clamp_min(0)
    d_t = denoiser(network, x + t[:, None, None, None] * eps, t, label, 0.25)
    with torch.no_grad():
        below = r.clamp_min(1e-30)
        d_r = denoiser(network, x + r[:, None, None, None] * eps, below, label, 0.25)
        d_r = torch.where((r > 0)[:, None, None, None], d_r, x)
    loss = ((d_t - d_r).square().sum((1, 2, 3)) + c**2).sqrt() - c
    loss = loss / (t - r)
    loss.mean().backward()
    norms = [p.grad.double().norm() if p.grad is not None else -1 for p in network.parameters()]
    shared = [*source.matching("precond.*"), "images", "param_names"]
    shared += ["labels"] if "labels" in source else []
    arrays: dict[str, Any] = {name: source.arrays[name] for name in shared}
    own: dict[str, Any] = {
        "rnd_normal": normal,
        "eps": eps,
        "t": t,
        "r": r,
        "stage": np.array(stage),
        "c": np.array(c),
        "P_mean_P_std_q_k_b": np.array([p_mean, 0.4, q, k, b]),
        "adj_const": np.array(False),
        "teacher_pass_ran": np.array(second),
        "loss": loss.detach(),
        "D_yt": d_t.detach(),
        "grad_l2_all": np.array([float(n) for n in norms]),
    }
    own |= {"D_yr_raw": d_r} if second else {}
    arrays |= {f"mine.{name}": value for name, value in own.items()}
    return write(folder / "ect" / "loss.npz", arrays)


def compare_ect(archive: Archive) -> None:
    golden_networks.compare_ect(archive)
    golden_losses.compare_ect_losses(archive)


@pytest.mark.parametrize(
    ("q", "stage", "p_mean", "second"),
    [(1.5, 2, 1.5, True), (4.0, 1, 1.5, True), (1.5, 0, -2.0, False)],
)
def test_any_q_and_a_batch_with_one_pass(
    q: float, stage: int, p_mean: float, second: bool, tmp_path: Path
) -> None:
    path = ect(tmp_path, q, stage, p_mean, second=second)
    archive = compared(path, compare_ect)
    assert bool((archive.arrays["mine.r"] > 0).all()) == second
    assert ("mine.D_yr_raw" in archive.compared) == second


def without(path: Path, name: str) -> Archive:
    """A file that lacks an array."""
    archive = Archive(path)
    del archive.arrays[name]
    return archive


def test_a_missing_array_of_a_case_is_a_failure(tmp_path: Path) -> None:
    """The output of a second pass that ran, a plain call of a network with classes, the noise of a sampler that churns."""
    path = ect(tmp_path, 1.5, 2, 1.5, second=True)
    for name in ("mine.D_yr_raw", "mine.D_yt"):
        with pytest.raises(AssertionError, match=f"{name}: missing"):
            golden_networks.compare_ect(without(path, name))
    for path in (FOLDER / "edm").glob("*.npz"):
        for pattern, compare in (
            ("D_x_nolabels_noaug", golden_networks.compare_nvlabs),
            ("sampler.*.noise_float64", golden_samplers.compare_nvlabs_sampler),
        ):
            for name in Archive(path).matching(pattern):
                with pytest.raises(AssertionError, match=f"{name}: missing"):
                    compare(without(path, name))


@pytest.mark.parametrize("q", [1.5, 2.0, 3.7, 256.0])
def test_the_ect_schedule_takes_any_q(q: float, tmp_path: Path) -> None:
    t = np.geomspace(1e-3, 80, 30).astype(np.float32)
    k, b, stages = 8.0, 1.0, 6
    ratios = np.array([1 - 1 / q ** (stage + 1) for stage in range(stages)])

    def mapped(times: Any) -> np.ndarray:
        adjust = 1 + k / (1 + np.exp(b * times))
        rows = [np.maximum(times * (1 - adjust / q ** (s + 1)), 0) for s in range(stages)]
        return np.stack(rows)

    arrays = {
        "t": t,
        "any.q_k_b_isconst": np.array([q, k, b, 0.0]),
        "any.ratio_by_stage": ratios,
        "any.r_by_stage": mapped(t).astype(np.float32),
        "any.r_by_stage.f64": mapped(t.astype(np.float64)),
    }
    path = write(tmp_path / "schedule.npz", arrays)
    compared(path, golden_formulas.compare_ect_schedule)


# ------------------------------------------------------------------------ lists of indices


@pytest.mark.parametrize("indices", [[0, 5, 12], [0, 17], [0, 3, 9, 17], [2, 9, 14], [0, 4], [7]])
@pytest.mark.parametrize("clip", [True, False])
@torch.no_grad()
def test_lists_of_indices_may_end_anywhere(indices: list[int], clip: bool, tmp_path: Path) -> None:
    """The published loop adds the noise of the next index, whether an evaluation follows or not."""
    network, n = small(tmp_path, "online"), 18
    draw = torch.randn(len(indices), 2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    y, times = torch.tensor([1, 2]), level(torch.tensor(indices), n)
    x = T_MAX * draw[0]
    for step, t in enumerate(times[:-1]):
        x_0 = boundary(network, x, torch.full((2,), float(t)), y)
        x_0 = x_0.clamp(-1, 1) if clip else x_0
        x = x_0 + draw[step + 1] * max(float(times[step + 1]) ** 2 - T_MIN**2, 0) ** 0.5
    arrays = {
        "y": y,
        "multistep_case.draws": draw,
        "multistep_case.ts": np.array(indices),
        "multistep_case.steps": np.array(n),
        "multistep_case.clip_denoised": np.array(clip),
        "multistep_case.out": x.clamp(-1, 1),
    }
    path = write(tmp_path / "openai_samplers.npz", arrays)
    compared(path, golden_samplers.compare_openai_samplers)


@pytest.mark.parametrize("indices", [[0, 9, 17], [0, 5, 12], [3, 11]])
@torch.no_grad()
def test_lists_of_indices_of_edits_may_end_anywhere(indices: list[int], tmp_path: Path) -> None:
    network, n = small(tmp_path, "online"), 18
    generator = torch.Generator().manual_seed(3)
    draw = torch.randn(len(indices), 2, 3, 16, 16, generator=generator)
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    mask = (torch.rand(2, 3, 16, 16, generator=generator) < 0.5).float()
    y, times = torch.tensor([1, 2]), level(torch.tensor(indices), n)
    reference, x = mask * images - (1 - mask), T_MAX * draw[0]
    for step, t in enumerate(times[:-1]):
        x_0 = boundary(network, x, torch.full((2,), float(t)), y).clamp(-1, 1)
        x_0 = mask * images + (1 - mask) * x_0
        x = x_0 + draw[step + 1] * max(float(times[step + 1]) ** 2 - T_MIN**2, 0) ** 0.5
    arrays = {
        "inpainting.images": images,
        "inpainting.mask": mask.to(torch.uint8),
        "inpainting.y": y,
        "inpainting.draws": draw,
        "inpainting.ts": np.array(indices),
        "inpainting.steps": np.array(n),
        "inpainting.out_x": x,
        "inpainting.out_images": reference,
    }
    path = write(tmp_path / "openai_editing.npz", arrays)
    compared(path, golden_editing.compare_editing)


# -------------------------------------------------------------------------------- networks


def test_an_unread_argument_of_a_network_is_a_failure() -> None:
    kwargs = next(iter(read_json(FOLDER / "edm" / "configs.json").values()))["kwargs"]
    with pytest.raises(AssertionError, match="skip_scale"):
        golden_networks.nvlabs_arguments(kwargs | {"skip_scale": 1.0})
    assert golden_networks.nvlabs_arguments(kwargs | {"use_fp16": False, "sigma_data": 0.4})


def test_the_number_of_heads_of_the_decoder_reaches_the_network() -> None:
    cfg = next(iter(read_json(FOLDER / "openai_unet" / "configs.json").values()))["cfg"]
    assert "num_heads_upsample" not in golden_networks.openai_arguments(cfg)
    found = golden_networks.openai_arguments(cfg | {"num_heads_upsample": 2})
    assert found["num_heads_upsample"] == 2
