"""Laws of average velocities under the rectified flow: their loss, derivatives, times, guidance and jumps, on Gaussian data."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Generator, nn

from analytic import DOUBLE, normal, times
from consistency.average_velocity import MeanFlowObjective
from consistency.denoiser import Denoiser
from consistency.derivatives import Derivative, ExactDerivative, FiniteDifference
from consistency.distances import Adaptive, AdaptiveStep, Distance, SquaredNorm
from consistency.errors import UserError
from consistency.flow_pairs import CappedPairs, CountedPairs, FirstPairs, LogitNormalPairs
from consistency.flow_samplers import flow_jumps, flow_multistep
from consistency.networks.adm import ADM
from consistency.networks.dhariwal import DhariwalUNet
from consistency.networks.dit import DiT
from consistency.networks.layers import times_of
from consistency.networks.mlp import MLP
from consistency.networks.song import SongUNet
from consistency.pairs import Pairs
from consistency.preconditioning import RectifiedFlow, Unscaled
from consistency.processes import rectified_flow, variance_exploding
from consistency.randomness import Share
from consistency.samplers import onestep
from consistency.steps import FlowVelocity, SelfGuidance, Velocity
from consistency.tensors import AverageVelocity, Data, Label, Time, broadcast_time

M, S = 0.3, 0.5
LAW = {"mean_t": -0.4, "std_t": 1.0, "mean_r": -0.4, "std_r": 1.0, "equal": 0.25}
PAIRS = LogitNormalPairs(**LAW)
SHAPE = (16, 1, 2, 2)


def variance(t: Time, x: Data) -> Data:
    """Of x_t, for Gaussian data N(M, S^2)."""
    t = broadcast_time(t, x)
    return (1 - t) ** 2 * S**2 + t**2


def flow(x_t: Data, t: Time, r: Time) -> Data:
    """The exact jump from t to r."""
    centred = x_t - broadcast_time(1 - t, x_t) * M
    ratio = variance(r, x_t) / variance(t, x_t)
    return broadcast_time(1 - r, x_t) * M + ratio.sqrt() * centred


def marginal(x_t: Data, t: Time) -> Data:
    """The velocity of the ODE."""
    s = broadcast_time(t, x_t)
    return -M + (s - (1 - s) * S**2) / variance(t, x_t) * (x_t - (1 - s) * M)


def exact(x_t: Data, t: Time, label: Label = None, r: Time | None = None) -> Data:
    """The average velocity from r to t; of r = t the velocity."""
    r = torch.zeros_like(t) if r is None else r
    gap = broadcast_time(t - r, x_t)
    return torch.where(gap == 0, marginal(x_t, t), (x_t - flow(x_t, t, r)) / gap.clamp(min=1e-300))


def exact_estimate(x_t: Data, t: Time, label: Label = None, r: Time | None = None) -> Data:
    """x_t - t u(x_t, t, r), as a denoiser of two times gives it."""
    return x_t - broadcast_time(t, x_t) * exact(x_t, t, label, r)


class Marginal:
    """The ODE's velocity as that of an objective."""

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, label: Label) -> Data:
        return marginal(x_t, t)


def objective(
    *,
    velocity: Velocity | None = None,
    derivative: Derivative | None = None,
    distance: Distance | None = None,
    guidance: SelfGuidance | None = None,
    label_dropout: float = 0.0,
) -> MeanFlowObjective:
    return MeanFlowObjective(
        pairs=PAIRS,
        velocity=velocity or FlowVelocity(),
        derivative=derivative or ExactDerivative(),
        distance=distance or SquaredNorm(),
        guidance=guidance,
        label_dropout=label_dropout,
    )


def network(seed: int = 0, num_classes: int | None = None) -> Denoiser:
    torch.manual_seed(seed)
    inner = MLP(channels=4, width=16, depth=2, num_classes=num_classes, second_time="gap")
    nn.init.normal_(inner.last.weight)
    return Denoiser(inner, Unscaled()).double()


def batch() -> tuple[Data, Data, Time, Time]:
    """Images, noise, and times r < t."""
    t = torch.linspace(0.1, 0.95, 16, dtype=DOUBLE)
    return M + S * normal(*SHAPE), normal(*SHAPE, seed=1), t, t * torch.linspace(0, 0.9, 16)


NOBODY = torch.zeros(16, dtype=torch.bool)

# ------------------------------------------------------------------------ the process


def test_the_rectified_flow_is_rescaled_variance_exploding() -> None:
    x_0, z, t, _ = batch()
    exploded = variance_exploding(x_0, z, t / (1 - t))
    scaled = broadcast_time(1 - t, x_0) * exploded
    assert torch.allclose(rectified_flow(x_0, z, t), scaled, atol=1e-14)


def test_a_denoiser_of_the_flow_jumps_to_0() -> None:
    x_0, z, t, r = batch()
    u, x_t = network(), rectified_flow(x_0, z, t)
    denoise = Denoiser(u.network, RectifiedFlow())
    jump = x_t - broadcast_time(t, x_t) * u(x_t, t, r=torch.zeros_like(t))
    assert torch.allclose(denoise(x_t, t), jump, atol=1e-14)
    assert torch.equal(u(x_t, t, r=r), u.network(x_t, t, r=r))


# ------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("derivative", [ExactDerivative(), FiniteDifference(e=1e-5)])
def test_the_exact_average_velocity_has_no_residual(derivative: Derivative) -> None:
    """u + (t - r) du/dt = v [Geng et al. 2025, Eq. 6]."""
    x_0, z, t, r = batch()
    loss = objective(velocity=Marginal(), derivative=derivative)
    losses = loss.losses_at(exact, x_0, None, t, r, NOBODY, z).loss
    assert float(losses.max()) < (1e-25 if isinstance(derivative, ExactDerivative) else 1e-16)


@pytest.mark.parametrize("derivative", [ExactDerivative(), FiniteDifference(e=1e-3)])
def test_with_r_equal_to_t_it_is_flow_matching(derivative: Derivative) -> None:
    x_0, z, t, _ = batch()
    online = network()
    losses = objective(derivative=derivative).losses_at(online, x_0, None, t, t, NOBODY, z).loss
    x_t = rectified_flow(x_0, z, t)
    matched = (online(x_t, t, r=t) - (z - x_0)).square().sum((1, 2, 3))
    assert torch.allclose(losses, matched)
    parameters = list(online.parameters())
    ours, theirs = (torch.autograd.grad(x.mean(), parameters) for x in (losses, matched))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_no_gradient_passes_through_the_target() -> None:
    """The gradient is that of ||u - y||^2 with y given."""
    x_0, z, t, r = batch()
    online, x_t = network(), rectified_flow(x_0, z, t)
    losses = objective().losses_at(online, x_0, None, t, r, NOBODY, z).loss
    v = z - x_0
    u, du = torch.func.jvp(lambda x, s: online(x, s, r=r), (x_t, t), (v, torch.ones_like(t)))
    y = (v - broadcast_time(t - r, v) * du).detach()
    by_hand = (u - y).square().sum((1, 2, 3))
    parameters = list(online.parameters())
    ours, theirs = (torch.autograd.grad(x.mean(), parameters) for x in (losses, by_hand))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_finite_difference_tends_to_the_derivative() -> None:
    """With the square of e inside of the interval."""
    x_0, z, t, r = batch()
    online, x_t, v = network(), rectified_flow(x_0, z, t), z - x_0
    u, du = ExactDerivative()(online, x_t, t, r, v, None)
    errors = []
    for e in (4e-3, 2e-3, 1e-3):
        near, difference = FiniteDifference(e=e)(online, x_t, t, r, v, None)
        assert torch.equal(near, u)
        inside = t - r > e
        errors.append(float((difference - du)[inside].detach().norm()))
    for coarse, fine in itertools.pairwise(errors):
        assert 3.5 < coarse / fine < 4.5


def test_the_finite_difference_stays_between_r_and_t_max() -> None:
    part = FiniteDifference(e=0.1, t_max=0.999)
    t = torch.tensor([0.5, 0.5, 0.95, 0.95], dtype=DOUBLE)
    r = torch.tensor([0.0, 0.45, 0.0, 0.93], dtype=DOUBLE)
    after, before = part.ends(t, r)
    assert after.tolist() == pytest.approx([0.6, 0.6, 0.95, 0.95])
    assert before.tolist() == pytest.approx([0.4, 0.5, 0.85, 0.85])
    assert bool((after > before).all())
    with pytest.raises(UserError, match="0 < e < t_max"):
        FiniteDifference(e=0.0)


def test_a_part_of_a_batch_has_the_rows_of_the_whole() -> None:
    online, x_0, label = network(num_classes=3), normal(*SHAPE), torch.arange(16) % 3
    loss = objective()
    draw = partial(Generator().manual_seed, 0)
    whole = loss(online, online, x_0, label, 0, draw())
    for number in (0, 1):
        rows = slice(8 * number, 8 * number + 8)
        part = loss(online, online, x_0[rows], label[rows], 0, draw(), Share(number, 2))
        assert torch.equal(part.t, whole.t[rows])
        assert torch.allclose(part.loss, whole.loss[rows])


# ------------------------------------------------------------------------ distances


def test_the_power_of_the_weight() -> None:
    x, y = normal(*SHAPE).requires_grad_(), normal(*SHAPE, seed=1)
    s = SquaredNorm()(x, y)
    plain = {"p": 0.0, "c": 1e-3}
    for distance in (Adaptive(**plain), AdaptiveStep(**plain, per_root_dimension=False)):
        assert torch.allclose(distance(x, y), s)
    assert torch.allclose(Adaptive(p=1.0, c=0.0)(x, y), torch.ones(16, dtype=DOUBLE))
    (slope,) = torch.autograd.grad(Adaptive(p=1.0, c=0.5)(x, y).sum(), x)
    assert torch.allclose(slope, 2 * (x - y) / (s + 0.5)[:, None, None, None])
    step = AdaptiveStep(p=1.0, c=0.5, per_root_dimension=False)
    (slope,) = torch.autograd.grad(step(x, y).sum(), x)
    assert torch.allclose(slope, 2 * (x - y) / (s.sqrt() + 0.5)[:, None, None, None])


# ------------------------------------------------------------------------ times

LAWS: list[LogitNormalPairs] = [
    kind(**LAW, t_max=0.999) for kind in (LogitNormalPairs, CappedPairs, FirstPairs, CountedPairs)
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_pairs_are_ordered_and_a_share_has_one_time(law: LogitNormalPairs) -> None:
    assert isinstance(law, Pairs)
    t, r = law(2000, 0, Generator().manual_seed(0))
    assert t.dtype == r.dtype == torch.float32
    assert bool((r <= t).all())
    assert 0 < float(r.min()) < float(t.max()) < 0.999
    equal = t == r
    # Where r is capped by t, half of the others have r = t as well: their laws are the same here.
    share = 0.25 + 0.75 / 2 if isinstance(law, CappedPairs) else 0.25
    assert abs(float(equal.double().mean()) - share) < 0.03
    first = isinstance(law, FirstPairs | CountedPairs)
    assert bool(equal[: int(equal.sum())].all()) == first
    if isinstance(law, FirstPairs):
        assert int(equal.sum()) == 500
    again = law(2000, 0, Generator().manual_seed(0))
    assert torch.equal(t, again[0])
    assert torch.equal(r, again[1])


# ------------------------------------------------------------------------ guidance


class Classes:
    """An average velocity that is its class, -1 of none, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x_t: Data, t: Time, label: Label = None, r: Time | None = None) -> Data:
        self.calls += 1
        assert label is not None
        return label.to(x_t.dtype)[:, None, None, None].expand_as(x_t)


def test_guidance_mixes_three_velocities_inside_its_interval() -> None:
    v, t, label = normal(*SHAPE), torch.linspace(0, 1, 16, dtype=DOUBLE), torch.arange(16)
    ours = SelfGuidance(w=0.2, k=0.92, t_start=0.2, t_end=0.75)(Classes(), v, t, v, label)
    mixed = 0.2 * v + (1 - 0.2 - 0.92) * -1 + 0.92 * label[:, None, None, None]
    inside = ((t >= 0.2) & (t <= 0.75))[:, None, None, None]
    assert torch.allclose(ours, torch.where(inside, mixed, v))


def test_guidance_1_is_none() -> None:
    v, t, label = normal(*SHAPE), times(16, 0.5), torch.arange(16)
    silent = Classes()
    assert torch.equal(SelfGuidance(w=1.0)(silent, v, t, v, label), v)
    assert silent.calls == 0
    with pytest.raises(UserError, match="labels for the guidance"):
        SelfGuidance(w=2.0)(silent, v, t, v, None)


def test_dropped_samples_lose_class_and_guidance() -> None:
    """As many as draws lie below the share, the first ones of the batch."""
    seen = dict[str, object]()

    def derivative(
        average: AverageVelocity, x_t: Data, t: Time, r: Time, v: Data, label: Label
    ) -> tuple[Data, Data]:
        seen.update(v=v, label=label)
        return v, torch.zeros_like(v)

    loss = objective(derivative=derivative, guidance=SelfGuidance(w=2.0), label_dropout=0.3)
    u = torch.tensor([0.9, 0.1, 0.2, 0.5])
    assert loss.dropped(u).tolist() == [True, True, False, False]
    x_0, z, t, r = (part[:4] for part in batch())
    loss.losses_at(Classes(), x_0, torch.arange(4), t, r, loss.dropped(u), z)
    v = z - x_0
    expected = torch.cat([v[:2], 2 * v[2:] + 1])
    assert torch.allclose(seen["v"], expected)  # type: ignore[arg-type]
    assert seen["label"].tolist() == [-1, -1, 2, 3]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------ jumps


def test_one_jump_equals_many_for_the_exact_average_velocity() -> None:
    z = normal(*SHAPE)
    ends = [
        flow_jumps(exact_estimate, lambda: z, times=points, t_max=1.0)
        for points in ([1.0], [1.0, 0.5], [1.0, 0.9, 0.3, 0.05])
    ]
    for end in ends:
        assert torch.allclose(end, flow(z, times(16, 1.0), times(16, 0.0)), atol=1e-13)
    one = onestep(exact_estimate, lambda: z, t_max=1.0, clip=False)
    assert torch.allclose(one, ends[0], atol=1e-15)


def test_renewed_noise_keeps_the_law_of_the_data() -> None:
    seeds = itertools.count()
    x = flow_multistep(
        exact_estimate,
        lambda: normal(40_000, 1, 1, 1, seed=next(seeds)),
        times=[1.0, 0.6, 0.2],
        t_max=1.0,
        clip=False,
    )
    assert next(seeds) == 3
    assert abs(float(x.mean()) - M) < 0.01
    assert abs(float(x.std()) - S) < 0.01


@pytest.mark.parametrize("points", [[0.9, 0.5], [1.0, 0.0], [1.0, 1.0], []])
def test_wrong_times_of_jumps_are_refused(points: list[float]) -> None:
    for sampler in (flow_jumps, partial(flow_multistep, clip=False)):
        with pytest.raises(UserError, match="fall"):
            sampler(exact_estimate, lambda: normal(*SHAPE), times=points, t_max=1.0)


# ------------------------------------------------------------------------ networks

SONG = dict(image_size=8, in_channels=1, model_channels=8, num_res_blocks=1, channel_mult=[1, 1])
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": partial(MLP, channels=64, width=16, depth=1),
    "dit": partial(
        *(DiT,), image_size=8, in_channels=1, patch_size=4, hidden_size=16, depth=1, num_heads=2
    ),
    "song": partial(
        *(SongUNet,),
        **SONG,
        attention_resolutions=[4],
        fourier_scale=None,
        residual_input=False,
        channel_mult_noise=2,
        resample_filter=[1, 3, 3, 1],
    ),
    "dhariwal": partial(DhariwalUNet, **SONG, attention_resolutions=[4]),
    "adm": partial(
        *(ADM,),
        **SONG,
        attention_resolutions=[4],
        num_groups=4,
        num_head_channels=8,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
}


def test_an_unknown_second_time_is_refused() -> None:
    assert [times_of(second_time) for second_time in (None, "gap", "end")] == [1, 2, 2]
    with pytest.raises(ValueError, match='"halvings" or None; got "both"'):
        times_of("both")


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_of_two_times(name: str) -> None:
    x, t, r = normal(3, 1, 8, 8).float(), torch.tensor([0.2, 0.5, 0.9]), torch.full((3,), 0.1)
    outputs = {}
    for second_time in ("gap", "end"):
        torch.manual_seed(0)
        network = NETWORKS[name](second_time=second_time).eval()
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
        assert torch.equal(network(x, t), network(x, t, r=torch.zeros(3)))
        assert not torch.allclose(network(x, t), network(x, t, r=r))
        outputs[second_time] = network(x, t, r=r), network(x, t, r=t - r)
    # The networks have the same weights: t - (t - r) = r.
    assert torch.allclose(outputs["gap"][0], outputs["end"][1], atol=1e-5)
    assert torch.allclose(outputs["gap"][1], outputs["end"][0], atol=1e-5)
    with pytest.raises(ValueError, match="expected one time"):
        NETWORKS[name]()(x, t, r=r)
