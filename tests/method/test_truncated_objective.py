"""Laws of the second stage of truncated consistency models."""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from analytic import DOUBLE, Gaussian, normal, times
from consistency.denoiser import Denoiser
from consistency.distances import PseudoHuber
from consistency.errors import UserError
from consistency.networks.mlp import MLP
from consistency.objectives import ConsistencyObjective, TruncatedObjective
from consistency.pairs import RatioPairs, TruncatedStudentTimes
from consistency.preconditioning import EDM
from consistency.randomness import Share
from consistency.steps import DataStep
from consistency.tensors import Data, Label, Time
from consistency.weightings import inverse_gap

SPLIT, BATCH = 1.0, 32
SHAPE = (BATCH, 1, 2, 2)
LAW = Gaussian(0.0, 0.5)
TIMES = TruncatedStudentTimes(df=0.01, loc=0.0, scale=0.2, t_lo=SPLIT, t_hi=80.0)
PARTS: dict[str, Any] = {
    "pairs": RatioPairs(times=TIMES, k=8.0, b=1.0, ratio_limit=0.999, r_min=1e-6),
    "step": DataStep(),
    "distance": PseudoHuber(c=0.0, per_root_dimension=False),
    "weighting": inverse_gap,
}


class Constant(nn.Module):
    """A denoiser that answers one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=DOUBLE))

    def forward(self, x_t: Data, t: Time, label: Label = None) -> Data:
        return self.value.expand_as(x_t)


class Exact(nn.Module):
    """The consistency function of the data."""

    def forward(self, x_t: Data, t: Time, label: Label = None) -> Data:
        return LAW.flow(x_t, t, torch.zeros_like(t))


class ExactStep:
    """x_r by the solution of the PF-ODE."""

    def __call__(self, x_0: Data, z: Data, x_t: Data, t: Time, r: Time, label: Label) -> Data:
        return LAW.flow(x_t, t, r)


def truncated(first_stage: nn.Module, *, share: float = 0.25, **parts: Any) -> TruncatedObjective:
    return TruncatedObjective(
        first_stage=first_stage,
        t_split=SPLIT,
        boundary_share=share,
        boundary_weight=0.1,
        **(PARTS | parts),
    )


def drawn(objective: TruncatedObjective, batch: int, seed: int = 0) -> tuple[Time, Time, Tensor]:
    t, r, weight = objective.draw(batch, 1000, Generator().manual_seed(seed))
    return t, r, weight


def network(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    module = MLP(channels=4, width=16, depth=2)
    nn.init.normal_(module.last.weight)
    return Denoiser(module, EDM(sigma_data=0.5, c_noise_scale=0.25)).double()


@pytest.mark.parametrize(("batch", "count"), [(32, 8), (31, 7), (3, 0)])
def test_the_share_of_a_batch_is_at_the_split(batch: int, count: int) -> None:
    t, r, weight = drawn(truncated(Constant(0.0)), batch)
    at_split = t == SPLIT
    assert int(at_split.sum()) == count
    assert (t >= SPLIT).all()
    assert (r < t).all()
    assert (r[at_split] < SPLIT).all()
    assert float(weight.mean()) == pytest.approx(1.1 if count else 1.0)


def test_other_steps_have_other_boundary_samples() -> None:
    objective = truncated(Constant(0.0))
    first, second = (drawn(objective, BATCH, seed)[0] == SPLIT for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("count", [0, 1, 8, 32])
def test_the_batch_mean_is_that_of_the_others_and_a_part_of_the_boundary_s(count: int) -> None:
    """Without a boundary sample it is the plain mean, and without another the boundary's part."""
    boundary = torch.arange(BATCH) < count
    losses = normal(BATCH).abs()
    weight = truncated(Constant(0.0)).weights(boundary, losses)
    parts = (losses[~boundary], 1.0), (losses[boundary], 0.1)
    expected = sum(w * part.mean() for part, w in parts if len(part))
    assert torch.allclose((weight * losses).mean(), torch.as_tensor(expected, dtype=DOUBLE))


def test_the_target_below_the_split_is_the_first_stage() -> None:
    objective = truncated(Constant(3.0))
    r = torch.tensor([0.1, 0.999, 1.0, 5.0], dtype=DOUBLE)
    target = objective.split(Constant(7.0), normal(4, 1, 2, 2), r)
    assert target[:, 0, 0, 0].tolist() == [3.0, 3.0, 7.0, 7.0]


def test_the_first_stage_takes_no_gradient() -> None:
    first_stage, online = Constant(3.0), Constant(7.0)
    objective = truncated(first_stage)
    assert not first_stage.value.requires_grad
    assert first_stage.training
    first_stage.requires_grad_(True)  # not even then
    x_0 = LAW.sample(*SHAPE)
    losses = objective(online, online, x_0, None, 1000, Generator().manual_seed(0))
    losses.loss.mean().backward()
    assert first_stage.value.grad is None
    assert online.value.grad is not None
    assert float(online.value.grad) != 0


def test_samples_at_the_split_draw_towards_the_first_stage() -> None:
    """A constant network differs from its own target nowhere, so the others have no loss."""
    objective = truncated(Constant(3.0))
    x_0, z = LAW.sample(*SHAPE), normal(*SHAPE)
    online, t, r = Constant(7.0), times(BATCH, 1.0), times(BATCH, 0.9)
    t[8:], r[8:] = 5.0, 4.0
    loss = objective.losses_at(online, online, x_0, None, t, r, torch.ones_like(t), z).loss
    assert torch.allclose(loss[:8], torch.full_like(loss[:8], 2 * 4 / 0.1))
    assert torch.equal(loss[8:], torch.zeros_like(loss[8:]))


def test_the_exact_function_has_no_loss_along_exact_steps() -> None:
    objective = truncated(Exact(), step=ExactStep())
    x_0, z = LAW.sample(*SHAPE), normal(*SHAPE)
    t, r, weight = (part.double() for part in drawn(objective, BATCH))
    loss = objective.losses_at(Exact(), Exact(), x_0, None, t, r, weight, z).loss
    assert float(loss.max()) < 1e-10


def test_above_the_split_it_is_the_consistency_loss() -> None:
    """And everywhere, if the first stage is the network itself."""
    plain, online = ConsistencyObjective(**PARTS), network()
    x_0, z = LAW.sample(*SHAPE), normal(*SHAPE)
    t, r = times(BATCH, 5.0), torch.linspace(0.1, 4.9, BATCH, dtype=DOUBLE)
    ones = torch.ones_like(t)
    expected = plain.losses_at(online, online, x_0, None, t, r, z).loss
    for first_stage, rows in ((network(1), r >= SPLIT), (network(), r > 0)):
        objective = truncated(first_stage)
        ours = objective.losses_at(online, online, x_0, None, t, r, ones, z).loss
        assert torch.allclose(ours[rows], expected[rows])


def test_the_mean_over_the_parts_of_a_batch_is_that_of_the_whole() -> None:
    objective, online = truncated(network(1)), network()
    x_0 = LAW.sample(*SHAPE)
    whole = objective(online, online, x_0, None, 1000, Generator().manual_seed(0)).loss.mean()
    parts = [
        objective(online, online, part, None, 1000, Generator().manual_seed(0), Share(i, 4))
        for i, part in enumerate(x_0.split(8))
    ]
    assert torch.allclose(torch.stack([part.loss.mean() for part in parts]).mean(), whole)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="boundary_share"):
        truncated(Constant(0.0), share=share)
