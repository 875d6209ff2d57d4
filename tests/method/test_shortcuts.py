"""Laws of alpha-Flow and shortcut models: limits, fixed points on Gaussian data, laws of jumps, guidance and classes."""

from functools import partial
from typing import Any

import pytest
import torch
from test_average_velocity import (
    LAW,
    NOBODY,
    SHAPE,
    Classes,
    Marginal,
    batch,
    exact,
    network,
    objective,
)
from torch import Generator, Tensor, nn

from analytic import DOUBLE, normal
from consistency.derivatives import ExactDerivative
from consistency.distances import Adaptive, Distance, SquaredNorm
from consistency.errors import UserError
from consistency.flow_pairs import HalvedPairs, SinglePairs
from consistency.networks.layers import told
from consistency.networks.mlp import MLP
from consistency.processes import rectified_flow
from consistency.randomness import Share
from consistency.schedules import falling_sigmoid
from consistency.shortcuts import AlphaFlowObjective, ShortcutObjective
from consistency.steps import FlowVelocity, SelfGuidance, Velocity
from consistency.tensors import Data, Label, Time, broadcast_time

UNBOUNDED = 1e9


def alphaflow(
    *,
    velocity: Velocity | None = None,
    distance: Distance | None = None,
    clip: float = UNBOUNDED,
    **options: Any,
) -> AlphaFlowObjective:
    return AlphaFlowObjective(
        pairs=SinglePairs(**LAW),
        velocity=velocity or FlowVelocity(),
        derivative=ExactDerivative(),
        distance=distance or SquaredNorm(),
        clip=clip,
        **options,
    )


def shortcut(*, steps: int = 8, clip: float = UNBOUNDED, **options: Any) -> ShortcutObjective:
    pairs = HalvedPairs(bootstrap=0.5, steps=steps)
    velocity = options.pop("velocity", FlowVelocity())
    return ShortcutObjective(
        pairs=pairs, velocity=velocity, distance=SquaredNorm(), clip=clip, **options
    )


def gradient(losses: Tensor, online: nn.Module) -> Tensor:
    parts = torch.autograd.grad(losses.mean(), list(online.parameters()))
    return torch.cat([part.flatten() for part in parts])


# ------------------------------------------------------------------------ alpha-Flow


def test_alpha_to_0_approaches_meanflow_with_slope_1() -> None:
    """The gradient at c = 0, where the weight alpha undoes the size alpha^2 of the loss."""
    x_0, z, t, r = batch()
    online, distance = network(), Adaptive(p=1.0, c=0.0)
    losses = objective(distance=distance).losses_at(online, x_0, None, t, r, NOBODY, z).loss
    limit = gradient(losses, online)
    errors = []
    for alpha in (1e-2, 1e-3, 1e-4, 0.0):
        ours = alphaflow(distance=distance).losses_at(online, x_0, None, t, r, NOBODY, alpha, z)
        errors.append(float((gradient(ours.loss, online) - limit).norm() / limit.norm()))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)
    assert errors[3] < 1e-13


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
def test_with_r_equal_to_t_it_is_flow_matching(alpha: float) -> None:
    x_0, z, t, _ = batch()
    online = network()
    losses = alphaflow(clip=1e-3).losses_at(online, x_0, None, t, t, NOBODY, alpha, z).loss
    x_t = rectified_flow(x_0, z, t)
    matched = (online(x_t, t, r=t) - (z - x_0)).square().sum((1, 2, 3))
    assert torch.allclose(losses, matched)
    assert torch.allclose(gradient(losses, online), gradient(matched, online))


def test_alpha_1_is_flow_matching_of_the_mean_velocity() -> None:
    """Whose bounded target is the velocity of the data for every r."""
    x_0, z, t, r = batch()
    online, x_t = network(), rectified_flow(x_0, z, t)
    losses = alphaflow(clip=0.5).losses_at(online, x_0, None, t, r, NOBODY, 1.0, z).loss
    y = (z - x_0).clamp(-0.5, 0.5)
    assert torch.allclose(losses, (online(x_t, t, r=r) - y).square().sum((1, 2, 3)))


def test_the_exact_average_velocity_has_no_residual() -> None:
    """At alpha = 0 with the ODE's velocity; at each alpha with its mean from t - dt to t; with the former, of size alpha^2."""
    x_0, z, t, r = batch()

    def losses(alpha: float, velocity: Velocity) -> Tensor:
        loss = alphaflow(velocity=velocity)
        # Without the weight alpha
        return loss.losses_at(exact, x_0, None, t, r, NOBODY, alpha, z).loss / (alpha or 1)

    assert float(losses(0.0, Marginal()).max()) < 1e-25
    for alpha in (0.1, 0.5, 0.9):

        def mean(x_0: Data, z: Data, x_t: Data, t: Time, label: Label, a: float = alpha) -> Data:
            return exact(x_t, t, r=t - a * (t - r))

        assert float(losses(alpha, mean).max()) < 1e-25
    coarse, fine = (losses(alpha, Marginal()).sqrt() for alpha in (2e-3, 1e-3))
    assert torch.allclose(coarse / fine, torch.full_like(t, 4.0), rtol=0.05)


def test_dropped_samples_lose_their_class_between_the_times_of_the_guidance_and_keep_it() -> None:
    loss = alphaflow(
        guidance=SelfGuidance(w=2.0, t_start=0.2, t_end=0.8),
        label_dropout=0.5,
        distance=lambda x, y: torch.cat([x, y], dim=1).flatten(1).mean(1),
    )
    x_0, z = torch.zeros(4, 1, 1, 1), torch.ones(4, 1, 1, 1)
    t = torch.tensor([0.1, 0.5, 0.5, 0.5])
    dropped = torch.tensor([True, True, False, True])
    online, label = Classes(), torch.tensor([3, 4, 5, 6])
    losses = loss.losses_at(online, x_0, label, t, t, dropped, 0.5, z).loss
    # u is the class, -1 of none; y = v = 1 outside, 2 v - u_0 = 3 inside.
    assert losses.tolist() == [(3 + 1) / 2, (-1 + 3) / 2, (5 + 3) / 2, (-1 + 3) / 2]


def test_alpha_falls_from_1_to_0() -> None:
    published = {"start_steps": 0, "end_steps": 400_000, "gamma": 25.0, "clamp": 0.005}
    alpha = [falling_sigmoid(k, **published) for k in range(0, 500_001, 100)]
    assert alpha == sorted(alpha, reverse=True)
    moving = [100 * n for n, a in enumerate(alpha) if 0 < a < 1]
    assert (moving[0], moving[-1]) == (115_400, 284_600)
    assert falling_sigmoid(200_000, **published) == 0.5
    assert falling_sigmoid(1, start_steps=2, end_steps=4, gamma=1.0, clamp=0.0) == 1.0


# ------------------------------------------------------------------------ shortcut models


def test_the_exact_average_velocity_is_its_own_target() -> None:
    """Of two jumps the mean velocity is that of one; the shortest jump differs from the velocity by its length."""
    x_0, z, _, _ = batch()
    for steps, near in ((8, 1.0), (512, 0.02)):
        loss = shortcut(steps=steps, velocity=Marginal())
        t, r = loss.pairs.at(torch.linspace(0, 0.999, 16, dtype=DOUBLE))
        losses = loss.losses_at(exact, exact, x_0, None, t, r, range(8), NOBODY, z).loss
        assert float(losses[:8].max()) < 1e-25
        assert 0 < float(losses[8:].max()) ** 0.5 < near


def test_the_target_is_the_mean_of_two_jumps_and_takes_no_gradient() -> None:
    x_0, z, _, _ = batch()
    online, average, loss = network(), network(seed=1), shortcut(clip=0.7)
    t, r = loss.pairs.at(torch.linspace(0, 0.999, 16, dtype=DOUBLE))
    losses = loss.losses_at(online, average, x_0, None, t, r, range(8), NOBODY, z).loss
    x_t, s = rectified_flow(x_0, z, t), (t + r) / 2
    first = average(x_t, t, r=s)
    second = average((x_t - broadcast_time(t - s, z) * first).clamp(-0.7, 0.7), s, r=r)
    long = (torch.arange(16) < 8)[:, None, None, None]
    y = torch.where(long, ((first + second) / 2).clamp(-0.7, 0.7), z - x_0)
    matched = (online(x_t, t, r=r) - y.detach()).square().sum((1, 2, 3))
    assert torch.allclose(losses, matched)
    assert torch.allclose(gradient(losses, online), gradient(matched, online))
    assert all(p.grad is None for p in average.parameters())


def test_the_shortest_jumps_alone_are_guided_and_lose_classes() -> None:
    loss = shortcut(steps=4, guidance=2.0, label_dropout=0.5)
    t, r = torch.tensor([1.0, 1.0, 1.0, 0.5]), torch.tensor([0.0, 0.5, 0.75, 0.25])
    seen = list[Tensor]()

    def online(x_t: Data, t: Time, label: Label = None, r: Time | None = None) -> Data:
        assert label is not None
        seen.append(label)
        return torch.zeros_like(x_t)

    x_0, label = torch.zeros(4, 1, 1, 1), torch.tensor([3, 4, 5, 6])
    dropped = torch.tensor([True, True, True, False])
    losses = loss.losses_at(online, Classes(), x_0, label, t, r, range(2), dropped, x_0).loss
    assert seen[0].tolist() == [3, 4, -1, 6]
    # The jump of 1 has two of 1/2 for target, of class 3; that of 1/2 two of 1/4, guided: -1 + 2 (4 + 1).
    assert losses.tolist() == [9.0, 81.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [1024, 512, 24])
def test_jumps_are_halves_of_halves(size: int) -> None:
    law = HalvedPairs(bootstrap=0.125, steps=128)
    t, r = law(size, 0, Generator().manual_seed(0))
    assert t.dtype == r.dtype == torch.float32
    gaps, long = t - r, size // 8
    assert bool((gaps[long:] == 1 / 128).all())
    assert bool((t / gaps == (t / gaps).round()).all())
    assert 0 <= float(r.min()) <= float(t.max()) <= 1
    halvings, each = -gaps[:long].log2(), long // 7
    assert set(halvings.tolist()) <= set(range(7))
    if each:
        most = [k for k in range(6, -1, -1) for _ in range(each)]
        assert halvings.tolist() == most + [0] * (long - len(most))
    assert bool((r[long:] == 0).any()) or size < 512
    with pytest.raises(UserError, match="power of 2"):
        HalvedPairs(bootstrap=0.125, steps=100)


def test_a_part_of_a_batch_has_the_rows_of_the_whole() -> None:
    online, x_0, label = network(num_classes=3), normal(*SHAPE), torch.arange(16) % 3
    draw = partial(Generator().manual_seed, 0)
    for loss, k in ((alphaflow(), 0.5), (shortcut(), 0)):
        whole = loss(online, online, x_0, label, k, draw())
        for number in range(4):
            rows = slice(4 * number, 4 * number + 4)
            part = loss(online, online, x_0[rows], label[rows], k, draw(), Share(number, 4))
            assert torch.equal(part.t, whole.t[rows])
            assert torch.allclose(part.loss, whole.loss[rows])


def test_the_network_is_told_the_halvings() -> None:
    t, r = torch.tensor([1.0, 1.0, 0.5, 0.5]), torch.tensor([0.0, 0.5, 0.25, 0.5 - 1 / 128])
    assert (7 * told(t, r, "halvings")).tolist() == pytest.approx([0, 1, 2, 7])
    assert bool(told(t, t, "halvings").isfinite().all())


def test_a_network_without_what_a_loss_needs_is_refused() -> None:
    told_once = MLP(channels=4, width=8, depth=1)
    told_twice = MLP(channels=4, width=8, depth=1, second_time="end")
    for loss in (alphaflow(), shortcut()):
        loss.require_suited(told_twice)
        with pytest.raises(UserError, match="two times"):
            loss.require_suited(told_once)
    for guided in (alphaflow(guidance=SelfGuidance(w=2.0)), shortcut(guidance=1.5)):
        with pytest.raises(UserError, match="no class"):
            guided.require_suited(told_twice)
