"""Laws of the steps x_t -> x_r and of the velocities."""

import pytest
import torch
from torch import Tensor, nn

from analytic import Points, normal, times
from consistency.denoiser import Denoiser
from consistency.errors import UserError
from consistency.networks.mlp import MLP
from consistency.preconditioning import EDM
from consistency.solvers import euler_step, heun_step, pf_ode
from consistency.steps import DataStep, DataVelocity, Guided, TeacherStep, TeacherVelocity
from consistency.tensors import broadcast_time

T, R = times(9, 0.9), times(9, 0.5)


def teacher() -> Denoiser:
    network = MLP(channels=4, width=8, depth=1)
    nn.init.normal_(network.last.weight)
    return Denoiser(network, EDM(sigma_data=0.5, c_noise_scale=0.25)).double()


def test_the_data_step_shares_the_noise() -> None:
    x_0, z = normal(9, 1, 2, 2), normal(9, 1, 2, 2, seed=1)
    x_t = x_0 + 0.9 * z
    assert torch.allclose(DataStep()(x_0, z, x_t, T, R, None), x_0 + 0.5 * z)
    assert torch.equal(DataVelocity()(x_0, z, x_t, T, None), z)


def test_the_data_step_is_on_average_the_euler_step() -> None:
    """E[x_r | x_t] = Euler's step with the exact denoiser [Song et al. 2023, Theorem 2], here summed over all data."""
    data = Points(normal(6, 1, 2, 2))
    x_t = normal(9, 1, 2, 2, seed=1)
    weights = data.posterior(x_t, T)
    mean_step, mean_velocity = torch.zeros_like(x_t), torch.zeros_like(x_t)
    for number, image in enumerate(data.images):
        x_0 = image.expand_as(x_t)
        z = (x_t - x_0) / broadcast_time(T, x_t)
        share = broadcast_time(weights[:, number], x_t)
        mean_step += share * DataStep()(x_0, z, x_t, T, R, None)
        mean_velocity += share * DataVelocity()(x_0, z, x_t, T, None)
    assert torch.allclose(mean_step, euler_step(data.denoise, x_t, T, R), atol=1e-12)
    exact = TeacherVelocity(teacher=data.denoise)(x_t, x_t, x_t, T, None)
    assert torch.allclose(mean_velocity, exact, atol=1e-12)


def test_a_teacher_steps_with_its_solver() -> None:
    network, x_t = teacher(), normal(9, 1, 2, 2)
    for solver in (euler_step, heun_step):
        ours = TeacherStep(teacher=network, solver=solver)(x_t, x_t, x_t, T, R, None)
        assert torch.equal(ours, solver(network, x_t, T, R, None).detach())
    ours = TeacherVelocity(teacher=network)(x_t, x_t, x_t, T, None)
    assert torch.equal(ours, pf_ode(network, x_t, T, None).detach())


def test_a_teacher_takes_no_gradient_and_never_trains() -> None:
    x_t = normal(9, 1, 2, 2).requires_grad_()
    for step in (
        TeacherStep(teacher=teacher(), solver=heun_step),
        TeacherVelocity(teacher=teacher()),
    ):
        step.train()
        assert not any(module.training for module in step.modules())
        assert not any(p.requires_grad for p in step.parameters())
        arguments = (x_t, x_t, x_t, T, R) if isinstance(step, TeacherStep) else (x_t, x_t, x_t, T)
        assert not step(*arguments, None).requires_grad


class Classes(nn.Module):
    """The denoiser whose estimate is the class, and 7 for none, with what its network says of classes."""

    num_classes, no_class = 4, -1

    @property
    def network(self) -> nn.Module:
        return self

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        assert label is not None
        value = torch.where(label == -1, 7, label).to(x_t.dtype)
        return broadcast_time(value, x_t).expand_as(x_t)


def test_guidance_is_the_line_from_no_class_through_the_class() -> None:
    x_t, label = normal(9, 1, 2, 2), torch.arange(9) % 4
    expected = 7 + 2.5 * (broadcast_time(label, x_t) - 7)
    guided = Guided(Classes(), 2.5)(x_t, T, label)
    assert torch.allclose(guided, expected.expand_as(x_t).to(x_t.dtype))
    step = TeacherStep(teacher=Classes(), solver=euler_step, guidance=2.5)
    slope = (x_t - guided) / 0.9
    assert torch.allclose(step(x_t, x_t, x_t, T, R, label), x_t + (0.5 - 0.9) * slope)
    plain = TeacherVelocity(teacher=Classes(), guidance=1.0)(x_t, x_t, x_t, T, label)
    assert torch.allclose(plain, (x_t - broadcast_time(label, x_t)) / 0.9)


def test_guidance_needs_a_teacher_of_classes() -> None:
    with pytest.raises(UserError, match="for guidance"):
        TeacherStep(teacher=teacher(), solver=euler_step, guidance=2.0)
