"""Comparisons of the samplers with golden data, given the recorded draws.

The arguments of a published callback are the calls of our denoiser, which `Recorded` keeps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from consistency.denoiser import Denoiser
from consistency.grids import KarrasGrid
from consistency.networks.dhariwal import DhariwalUNet
from consistency.networks.song import SongUNet
from consistency.pixels import to_uint8
from consistency.preconditioning import EDM, Boundary
from consistency.samplers import (
    Noise,
    Sampler,
    ancestral_levels,
    dpm_solver_2,
    euler,
    euler_ancestral,
    heun,
    multistep,
    onestep,
    progressive,
)
from consistency.solvers import midpoint_step
from consistency.tensors import Data, Denoise, Label, Time
from golden_formulas import EXACT, GRID, GRID_FLOAT32, RHO, SIGMA_DATA, T_MAX, T_MIN
from golden_harness import SCALING_FLOAT64, Archive, Tolerance, read_json
from golden_jcm import BOUNDARY, PLAIN, Toy, channels_first, channels_last
from golden_networks import (
    NVLABS,
    OPENAI,
    class_indices,
    ect_network,
    ect_sigma_data,
    no_class,
    nvlabs_network,
    nvlabs_sigma_data,
    small_network,
)

IMAGE = Tolerance(absolute=2e-4)
"""Section 4 of the golden README: samplers and editing."""
STUDENT_IMAGE = Tolerance(absolute=1e-5)
"""One or a few evaluations: tight enough to tell the boundary scalings from those of a denoiser."""
ONE_GREY_VALUE = Tolerance(absolute=1.0)
NVLABS_IMAGE = Tolerance(absolute=1e-4)
STATE = Tolerance(absolute=2e-4, of_largest=2e-6)
"""x on the way is up to a few hundred, in float32."""
LEVEL = Tolerance(of_largest=2e-6)
"""Both levels are roots of differences in float32."""
LEVEL_FLOAT64 = Tolerance(of_each=1e-12, of_largest=1e-12)


class Recorded:
    """A denoiser that remembers its calls: x, the time of the batch, and the estimate."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.x: list[Data] = []
        self.times: list[float] = []
        self.estimates: list[Data] = []

    def __call__(self, x_t: Data, t: Time, label: Label = None) -> Data:
        estimate = self.denoise(x_t, t, label)
        self.x.append(x_t)
        self.times.append(float(t[0]))
        self.estimates.append(estimate)
        return estimate


def replayed(draws: Float[Tensor, "n b c h w"]) -> Noise:
    """The recorded draws in their order."""
    remaining = iter(draws)
    return lambda: next(remaining)


# ------------------------------------------------------------------------ OpenAI

STUDENT = ("onestep", "multistep")
ODE: dict[str, Callable[..., Data]] = {
    "ancestral": euler_ancestral,
    "heun": heun,
    "dpm": dpm_solver_2,
    "progdist": progressive,
    "euler": euler,
}
"""Ours by the word in the name of a case; an `ancestral` one may be Euler's too."""
CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")


def compare_openai_levels(archive: Archive) -> None:
    """The two levels of an ancestral step; the published float32 root of a difference that rounds below 0 is no number."""
    for name in archive.matching("*.ancestral.sigma_from"):
        case = name.removesuffix("_from")
        t, r = archive.tensor(name), archive.tensor(f"{case}_to")
        for kind, ours in zip(
            ("down", "up"), ancestral_levels(t.double(), r.double()), strict=True
        ):
            holes = torch.from_numpy(archive.arrays[f"{case}_{kind}"]).isnan()
            archive.compare(f"{case}_{kind}", ours.masked_fill(holes, torch.nan), LEVEL)
            if f"{case}_{kind}.f64" in archive:
                archive.compare(f"{case}_{kind}.f64", ours, LEVEL_FLOAT64)


@torch.no_grad()
def compare_openai_samplers(archive: Archive) -> None:
    """Every case of the file; the kind of sampler is a word of its name."""
    for name in archive.matching("*.steps"):
        compare_openai_case(archive, name.removesuffix(".steps"))
    compare_midpoint(archive)


def openai_denoiser(archive: Archive, network: str, *, boundary: bool) -> Denoiser:
    module = small_network(archive.path.parent / "openai_small", network)
    if boundary:
        return Denoiser(module, Boundary(sigma_data=SIGMA_DATA, t_min=T_MIN, c_noise_scale=OPENAI))
    return Denoiser(module, EDM(sigma_data=SIGMA_DATA, c_noise_scale=OPENAI))


def openai_sampler(archive: Archive, case: str, kind: str) -> Sampler:
    """Our sampler with the arguments of the case; a range of its own changes the grid alone."""
    steps, clip = int(archive.number(f"{case}.steps")), bool(archive.input(f"{case}.clip_denoised"))
    grid = KarrasGrid(
        t_min=archive.number(f"{case}.sigma_min", T_MIN),
        t_max=archive.number(f"{case}.sigma_max", T_MAX),
        rho=archive.number(f"{case}.rho", RHO),
    )
    churn: dict[str, Any] = {
        name: archive.number(f"{case}.{name}") for name in CHURN if f"{case}.{name}" in archive
    }

    def sampler(denoise: Denoise, noise: Noise, label: Label = None) -> Data:
        if kind == "onestep":
            return onestep(denoise, noise, label, t_max=grid.t_max, clip=clip)
        if kind == "multistep":
            indices = archive.input(f"{case}.ts").tolist()
            if indices[0] > 0 or indices[-1] < steps - 1 or len(indices) < 2:
                return unfinished(denoise, noise, label, indices, steps, grid, clip)
            return multistep(
                denoise,
                noise,
                label,
                times=[],
                indices=indices,
                num_scales=steps,
                t_min=grid.t_min,
                t_max=grid.t_max,
                rho=grid.rho,
                clip=clip,
            )
        return ODE[kind](denoise, noise, label, grid=grid, steps=steps, clip=clip, **churn)

    return sampler


def unfinished(
    denoise: Denoise,
    noise: Noise,
    label: Label,
    indices: list[int],
    steps: int,
    grid: KarrasGrid,
    clip: bool,
) -> Data:
    """Multistep sampling with indices that our commands refuse: a list that ends above t_min leaves the last noise in.

    The points themselves go below the check of the indices. The first noise has deviation t_max, whatever the first index.
    """
    if len(indices) < 2:
        return grid.t_max * noise()
    *times, last = grid.at(torch.tensor(indices), steps).tolist()
    scale = iter([grid.t_max / times[0]])
    x_0 = multistep(
        denoise,
        lambda: next(scale, 1.0) * noise(),
        label,
        times=times,
        t_min=grid.t_min,
        t_max=times[0],
        clip=clip,
    )
    return x_0 + with_noise(last, grid) * noise()


def with_noise(t: float, grid: KarrasGrid) -> float:
    """The deviation of the noise that takes an estimate to time t."""
    return (min(max(t, grid.t_min), grid.t_max) ** 2 - grid.t_min**2) ** 0.5


def compare_openai_case(archive: Archive, case: str) -> None:
    words = (word for word in (*STUDENT, *ODE) if word in case)
    kind = "multistep" if f"{case}.ts" in archive else next(words, None)
    assert kind is not None, f"{case}: no sampler in the name of the case"
    student = kind in STUDENT
    sampler, draws = openai_sampler(archive, case, kind), archive.tensor(f"{case}.draws")
    own = f"{case}.y" if f"{case}.y" in archive else "y"
    label = archive.tensor(own) if own in archive else None
    if f"{case}.n_draws" in archive:
        # Theirs draws at every step, whether it adds noise there or not.
        steps = int(archive.number(f"{case}.steps"))
        archive.compare(f"{case}.n_draws", torch.tensor(1 + steps), EXACT)
    network = "online" if student else "teacher"
    recorded = Recorded(openai_denoiser(archive, network, boundary=student))
    x_0 = sampler(recorded, replayed(draws), label).clamp(-1, 1)
    archive.compare(f"{case}.out", x_0, STUDENT_IMAGE if student else IMAGE)
    if f"{case}.uint8_nhwc" in archive:
        # Theirs cuts off where ours takes the nearest grey value: the same, (almost) half a value lower.
        grey = to_uint8(x_0 - 0.9999 / 255).permute(0, 2, 3, 1)
        archive.compare(f"{case}.uint8_nhwc", grey, ONE_GREY_VALUE)
    if f"{case}.cb.x" in archive:
        compare_callback(archive, case, recorded, bool(archive.number(f"{case}.clip_denoised")))


def compare_callback(archive: Archive, case: str, recorded: Recorded, clip: bool) -> None:
    """Compare the arguments of the published callback with the first evaluation of every step of ours."""
    steps = len(archive.input(f"{case}.cb.i"))
    stages = 2 if len(recorded.times) > steps else 1  # of a step, but for the last one
    x, estimates = (torch.stack(values[::stages]) for values in (recorded.x, recorded.estimates))
    times = torch.tensor(recorded.times[::stages], dtype=torch.float64)
    archive.compare(f"{case}.cb.i", torch.arange(len(times)), EXACT)
    archive.compare(f"{case}.cb.x", x, STATE)
    estimates = estimates.clamp(-1, 1) if clip else estimates
    archive.compare(f"{case}.cb.denoised", estimates, IMAGE)
    for name in ("sigma", "sigma_hat"):
        if f"{case}.cb.{name}" in archive:
            archive.compare(f"{case}.cb.{name}", times, GRID_FLOAT32)


def compare_midpoint(archive: Archive) -> None:
    """The midpoint rule with the denoiser itself for a slope, in steps of 1 / (number of times)."""
    for name in archive.matching("*midpoint*.ts"):
        case = name.removesuffix(".ts")
        drift = openai_denoiser(archive, "teacher", boundary=False)
        x, times = archive.tensor(f"{case}.x"), archive.tensor(name)
        label, step = archive.tensor("y") if "y" in archive else None, 1 / len(times)
        for t in times:
            moments = (t + h for h in (0, step / 2, step))
            x = midpoint_step(drift, x, *(x.new_full((len(x),), m) for m in moments), label)
        archive.compare(f"{case}.out", x, IMAGE)


# ------------------------------------------------------------------------ NVlabs and ECT


@torch.no_grad()
def compare_nvlabs_sampler(archive: Archive) -> None:
    """The EDM sampler, whose state is in float64 and whose network is in float32, and the times it visits."""
    for name in archive.matching("edm_sampler_net_sigmas.n*"):
        recorded = Recorded(lambda x, t, label: 0 * x)
        n = int(name.rsplit("n", 1)[1])
        heun(recorded, lambda: torch.zeros(1, 1, 1, 1).double(), grid=GRID, steps=n, clip=False)
        times = torch.tensor(recorded.times, dtype=torch.float64)
        archive.compare(name, times, SCALING_FLOAT64)
    for name in archive.matching("sampler.*.num_steps"):
        compare_nvlabs_case(archive, name.removesuffix(".num_steps"))


def compare_nvlabs_case(archive: Archive, case: str) -> None:
    network = nvlabs_network(archive.path.parent, archive.path.stem)
    denoiser = Denoiser(network, EDM(sigma_data=nvlabs_sigma_data(archive), c_noise_scale=NVLABS))
    recorded, z = Recorded(in_float64(denoiser)), archive.tensor("sampler.latents").double()
    noise, churn = [z], archive.number(f"{case}.S_churn", 0.0)
    if archive.has(f"{case}.noise_float64", unless=churn == 0):
        noise += list(archive.tensor(f"{case}.noise_float64"))

    x_0 = heun(
        recorded,
        replayed(torch.stack(noise)),
        label_of(archive, network, len(z)),
        grid=KarrasGrid(
            t_min=archive.number(f"{case}.sigma_min", T_MIN),
            t_max=archive.number(f"{case}.sigma_max", T_MAX),
            rho=archive.number(f"{case}.rho", RHO),
        ),
        steps=int(archive.number(f"{case}.num_steps")),
        clip=False,
        s_churn=churn,
        s_tmin=archive.number(f"{case}.S_min", 0.0),
        s_tmax=archive.number(f"{case}.S_max", float("inf")),
        s_noise=archive.number(f"{case}.S_noise", 1.0),
    )
    archive.compare(f"{case}.out_float64", x_0, NVLABS_IMAGE)
    if f"{case}.net_in_x" in archive:
        archive.compare(f"{case}.net_in_x", torch.stack(recorded.x), STATE)
        times = torch.tensor(recorded.times, dtype=torch.float64)
        archive.compare(f"{case}.net_in_sigma", times, SCALING_FLOAT64)


def in_float64(denoise: Denoise) -> Denoise:
    """A denoiser in float32 for a state in float64."""
    return lambda x_t, t, label=None: denoise(x_t.float(), t.float(), label).double()


def label_of(archive: Archive, network: SongUNet | DhariwalUNet, batch: int) -> Label:
    """The first class labels of the file, where it has any."""
    if "class_labels" in archive:
        return class_indices(archive.tensor("class_labels"))[:batch]
    return no_class(network, batch)


@torch.no_grad()
def compare_ect_sampler(archive: Archive) -> None:
    """Algorithm 1 as the ECT code has it: the noise added before time t has deviation t, not sqrt(t^2 - t_min^2)."""
    folder = archive.path.parent
    network, t_min = ect_network(folder), read_json(folder / "config.json")["sigma_min"]
    boundary = Boundary(sigma_data=ect_sigma_data(folder), t_min=t_min, c_noise_scale=NVLABS)
    denoise = in_float64(Denoiser(network, boundary))
    for name in archive.matching("gen.*_float64"):
        case = name.removesuffix("_float64")
        if case.endswith(".noise"):
            continue
        z = archive.tensor("gen.latents").double()
        noise, times = [z], [T_MAX]
        if f"{case}.mid_t" in archive:
            noise += list(archive.tensor(f"{case}.noise_float64"))
            times += archive.input(f"{case}.mid_t").tolist()
        sampler = partial(multistep, times=times, t_min=0.0, t_max=T_MAX, clip=False)
        candidates = [
            sampler(denoise, replayed(torch.stack(noise)), label)
            for label in candidate_labels(archive, network, len(z))
        ]
        expected = torch.from_numpy(archive.arrays[name])
        nearest = min(candidates, key=lambda ours: float((ours - expected).abs().max()))
        archive.compare(name, nearest, IMAGE)


def candidate_labels(archive: Archive, network: SongUNet | DhariwalUNet, batch: int) -> list[Label]:
    """Return both candidates: no class, and the first labels of the file, if any. The file does not record which was used."""
    labels = [no_class(network, batch)]
    if "labels" in archive:
        given = class_indices(archive.tensor("labels"))
        labels += [given[:batch]] if len(given) >= batch else []
    return labels


# ------------------------------------------------------------------------ JAX


@torch.no_grad()
def compare_jcm_samplers(archive: Archive) -> None:
    """The toy network as a consistency function in one step, and as a denoiser along the PF-ODE."""
    toy = Toy(archive.path.parent / "toy_online.safetensors")
    z = channels_first(archive.tensor("onestep.z"))
    deviation = archive.number("onestep.std")
    x_0 = onestep(Denoiser(toy, BOUNDARY), lambda: z, t_max=deviation, clip=False)
    archive.compare("onestep.out", channels_last(x_0), IMAGE)
    z = channels_first(archive.tensor("heun_euler.z"))
    n = int(archive.number("heun_euler.N"))
    walks: dict[tuple[str, str], Callable[[Denoise], Data]] = {
        ("heun", "True"): lambda d: heun(d, lambda: z, grid=GRID, steps=n, clip=False),
        ("heun", "False"): lambda d: heun(
            d, lambda: z, grid=GRID, steps=n, clip=False, to_zero=False
        ),
        ("euler", "True"): lambda d: euler(d, lambda: z, grid=GRID, steps=n, clip=False),
        ("euler", "False"): lambda d: progressive(d, lambda: z, grid=GRID, steps=n - 1, clip=False),
    }
    for name in archive.matching("*.denoise_*.out"):
        kind, last, _ = name.split(".")
        x_0 = walks[kind, last.removeprefix("denoise_")](Denoiser(toy, PLAIN))
        archive.compare(name, channels_last(x_0), IMAGE)
