"""Laws of EDM2: magnitudes are preserved, weights have no length, and training keeps them on the sphere."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from consistency.average_velocity import MeanFlowObjective
from consistency.averaging import frozen_copy
from consistency.denoiser import Denoiser
from consistency.derivatives import ExactDerivative
from consistency.distances import L2, Adaptive
from consistency.flow_pairs import FirstPairs
from consistency.networks.edm2 import (
    EDM2,
    MPConv,
    MPFourier,
    MPPositions,
    forced_normalisation,
    mp_cat,
    mp_silu,
    mp_sum,
    normalise,
)
from consistency.objectives import Objective
from consistency.pairs import LognormalTimes
from consistency.preconditioning import EDM, Preconditioning, TrigFlowSlope, Unscaled
from consistency.randomness import generator
from consistency.steps import FlowVelocity
from consistency.tangents import derivative_along, normalised
from consistency.trigflow import DataVelocity, ForwardDerivative, TrigFlowObjective
from consistency.weightings import FourierWeighting, uniform

# PyTorch's own first use of forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

LEVEL = EDM(sigma_data=0.5, c_noise_scale=0.25)
SLOPE = TrigFlowSlope(sigma_data=0.5, c_noise_scale=0.25)

small = partial(
    EDM2,
    image_size=8,
    in_channels=2,
    model_channels=8,
    num_res_blocks=1,
    channel_mult=[1, 2],
    attention_resolutions=[4],
    num_head_channels=8,
)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def awake(network: nn.Module) -> nn.Module:
    """The network with random gains in the place of zeros."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("_gain"):
                parameter.fill_(0.3 + 0.1 * len(name) % 0.5)
    return network


def magnitude(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


@pytest.mark.parametrize("t", [0.3, 0.5, 0.8])
def test_sums_and_concatenations_keep_the_magnitude(t: float) -> None:
    a, b, c = normal(64, 4, 8, 8), normal(64, 4, 9, 9)[..., :8, :8], normal(64, 11, 8, 8)
    assert magnitude(mp_sum(a, b, t)) == pytest.approx(1, abs=0.02)
    joined = mp_cat(a, c, t)
    assert magnitude(joined) == pytest.approx(1, abs=0.02)
    # Each part contributes as much as its share, whatever its number of channels.
    ratio = joined[:, 4:].norm() / joined[:, :4].norm()
    assert float(ratio) == pytest.approx(t / (1 - t), rel=0.02)


def test_layers_keep_the_magnitude() -> None:
    x = normal(64, 32, 8, 8)
    assert magnitude(mp_silu(x)) == pytest.approx(1, abs=0.02)
    assert magnitude(normalise(5 * x, dims=(1,))) == pytest.approx(1, abs=1e-3)
    assert magnitude(MPConv(32, 64, 1)(x)) == pytest.approx(1, abs=0.05)
    assert magnitude(MPConv(32, 64, 3)(x)[..., 1:-1, 1:-1]) == pytest.approx(1, abs=0.05)
    assert magnitude(MPConv(32, 64)(x.mean((2, 3)) * 8)) == pytest.approx(1, abs=0.1)
    c_noise = torch.linspace(-2, 2, 99)
    for features in (MPFourier(512), MPPositions(512)):
        assert magnitude(features(c_noise)) == pytest.approx(1, abs=0.05)


def test_a_fresh_denoiser_is_the_skip_alone() -> None:
    x_t, t = normal(3, 2, 8, 8), torch.tensor([0.01, 0.5, 40.0])
    expected = LEVEL(t).c_skip[:, None, None, None] * x_t
    assert torch.equal(Denoiser(small(), LEVEL)(x_t, t), expected)


@torch.no_grad()
def test_the_length_of_a_weight_changes_nothing() -> None:
    network = awake(small(num_classes=3))
    arguments = normal(2, 2, 8, 8), normal(2), torch.tensor([0, 2])
    before = network(*arguments)
    for name, parameter in network.named_parameters():
        if not name.endswith("_gain"):
            parameter *= 1e3
    after = network(*arguments)
    # The constant added to the root mean square is 1e-4.
    assert float((after - before).norm() / before.norm()) < 1e-2
    assert float((after - before).norm()) > 0


def test_no_class_is_a_row_of_zeros_that_keeps_its_share() -> None:
    network = awake(small(num_classes=3))
    x, c_noise = normal(2, 2, 8, 8), normal(2)
    none = network(x, c_noise, torch.tensor([-1, -1]))
    with torch.no_grad():
        network.emb_label.weight[:, 1] = 0
    torch.testing.assert_close(network(x, c_noise, torch.tensor([1, 1])), none)


@torch.no_grad()
def test_training_puts_the_weights_on_the_sphere_and_averages_keep_theirs() -> None:
    network = small()
    for parameter in network.parameters():
        parameter *= 3
    average, before = frozen_copy(network), network.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    forced_normalisation(network)()
    for name, parameter in network.named_parameters():
        if name.endswith("_gain"):
            continue
        lengths = parameter.flatten(1).norm(dim=1) / math.sqrt(parameter[0].numel())
        torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=2e-4, rtol=0)
        cosine = torch.cosine_similarity(parameter.flatten(), before[name].flatten(), dim=0)
        assert float(cosine) > 0.9
    assert all(torch.equal(t, before[name]) for name, t in average.state_dict().items())


def test_the_gradient_of_a_weight_is_orthogonal_to_it() -> None:
    network = awake(small())
    network(normal(2, 2, 8, 8), normal(2)).square().sum().backward()
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if parameter.ndim:
            w, g = parameter.detach().flatten(1), gradient.flatten(1)
            along = (w * g).sum(1).abs() / (w.norm(dim=1) * g.norm(dim=1) + 1e-12)
            assert float(along.max()) < 5e-3, name


def test_two_times_and_frequencies_by_option() -> None:
    x, t, r = normal(2, 2, 8, 8), torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.5])
    for scale in (1.0, 0.02, None):
        network = awake(small(second_time="gap", fourier_scale=scale))
        assert not torch.equal(network(x, t, r=r), network(x, t))
        torch.testing.assert_close(network(x, t, r=t), network(x, t, r=t + 0 * r))
    with pytest.raises(ValueError, match="second_time=null"):
        small()(x, t, r=r)


def simplified() -> TrigFlowObjective:
    return TrigFlowObjective(
        sigma_data=0.5,
        times=LognormalTimes(p_mean=-1.0, p_std=1.4),
        velocity=DataVelocity(),
        derivative=ForwardDerivative(),
        normalisation=partial(normalised, c=0.1, per_root_dimension=False),
        distance=L2(),
        weighting=uniform,
        head=FourierWeighting(preconditioning=SLOPE, width=16),
    )


def velocities() -> MeanFlowObjective:
    return MeanFlowObjective(
        pairs=FirstPairs(mean_t=-0.4, std_t=1.0, mean_r=-0.4, std_r=1.0, equal=0.25),
        velocity=FlowVelocity(),
        derivative=ExactDerivative(),
        distance=Adaptive(p=0.75, c=1e-3),
    )


@pytest.mark.parametrize(
    ("objective", "scalings", "second_time"),
    [(simplified(), SLOPE, None), (velocities(), Unscaled(), "gap")],
    ids=["sct", "meanflow"],
)
def test_objectives_with_a_derivative_take_a_step(
    objective: Objective, scalings: Preconditioning, second_time: str | None
) -> None:
    network = awake(small(second_time=second_time, dropout=0.1)).train()
    denoise = Denoiser(network, scalings)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    forced_normalisation(nn.ModuleList([network, objective]))()
    losses = objective(denoise, denoise, normal(4, 2, 8, 8), None, 1, generator(0, "train"))
    losses.loss.mean().backward()
    torch.optim.Adam(network.parameters(), lr=1e-3).step()
    assert torch.isfinite(losses.loss).all()
    assert not any(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_the_exact_derivative_is_the_limit_of_differences() -> None:
    """Along a path, of the slope of TrigFlow and of an average velocity."""
    h = 1e-5
    x, v = normal(2, 2, 8, 8).double(), normal(2, 2, 8, 9)[..., :8].double()
    t, r = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.2, 0.4]).double()
    slope = Denoiser(awake(small()), SLOPE).double()
    average = Denoiser(awake(small(second_time="gap")), Unscaled()).double()
    for u in (slope, lambda x, t, label: average(x, t, label, r)):
        exact = derivative_along(u, x, t, v, None)[1]
        difference = (u(x + h * v, t + h, None) - u(x - h * v, t - h, None)) / (2 * h)
        torch.testing.assert_close(exact, difference, rtol=1e-5, atol=1e-6)


def test_the_learned_weighting_is_of_unit_magnitude_and_trained_with_its_sphere() -> None:
    head = FourierWeighting(preconditioning=LEVEL, width=256)
    t = torch.linspace(-5, 4, 199).exp()
    log_variance, loss = head.log_variance(t), t
    assert 0.1 < magnitude(log_variance) < 3
    torch.testing.assert_close(head(loss, t), (-log_variance).exp() * loss + log_variance)
    head(loss, t).sum().backward()
    assert {name for name, _ in head.named_parameters()} == {"linear.weight"}
    forced_normalisation(head)()
    assert magnitude(head.linear.weight) == pytest.approx(1, abs=2e-4)


@pytest.mark.slow
def test_a_network_is_compiled_without_breaks() -> None:
    """In a process of its own, without the tests' type checker; the normalisation stands outside of the graph."""
    code = """
import torch
from consistency.networks.edm2 import EDM2, forced_normalisation
torch.manual_seed(0)
network = EDM2(image_size=8, in_channels=1, model_channels=8, num_res_blocks=1, channel_mult=[1, 2],
               attention_resolutions=[4], num_head_channels=8, num_classes=3, dropout=0.0).train()
torch.nn.init.ones_(network.out_gain)
compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
arguments = torch.randn(4, 1, 8, 8), torch.randn(4), torch.tensor([0, 1, 2, -1])
normalise = forced_normalisation(network)
for _ in range(2):
    normalise()
    torch.testing.assert_close(compiled(*arguments), network(*arguments))
    compiled(*arguments).square().sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 1e-2 * parameter.grad
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
