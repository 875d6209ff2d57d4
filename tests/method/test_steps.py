"""Laws of the steps x_t -> x_r and of the velocities."""

import torch
from torch import nn

from analytic import Points, normal, times
from consistency.denoiser import Denoiser
from consistency.networks.mlp import MLP
from consistency.preconditioning import EDM
from consistency.solvers import euler_step, heun_step, pf_ode
from consistency.steps import DataStep, DataVelocity, TeacherStep, TeacherVelocity
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
