"""RAdam in one kernel: the numbers and the state of PyTorch's, whatever the layout of the weights."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from consistency.training.module import ConsistencyModule
from consistency.training.optimizers import RAdam

STEPS = 12
"""Of which the first five, with beta2 = 0.999, are not rectified."""

SHAPES = [(8, 4, 3, 3), (5, 7), (3,), ()]
OPTIONS: list[dict[str, Any]] = [{}, {"betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.3}]


def weights(dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in SHAPES]
    made[0] = made[0].to(memory_format=torch.channels_last)
    return [weight.requires_grad_() for weight in made]


def gradients_into(params: list[Tensor], step: int) -> None:
    """Gradients of very different sizes."""
    draw = torch.Generator().manual_seed(step + 1)
    for weight in params:
        number = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        scale = 10.0 ** torch.randint(-6, 7, (), generator=draw)
        weight.grad = torch.empty_like(weight).copy_(number * scale)


def trained(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> list[Tensor]:
    after = []
    for step in steps:
        gradients_into(params, step)
        optimizer.step()
        after.append(torch.cat([weight.detach().flatten() for weight in params]))
    return after


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_step_is_that_of_pytorch(
    dtype: torch.dtype, rtol: float, options: dict[str, Any]
) -> None:
    ours, theirs = weights(dtype), weights(dtype)
    fused = RAdam(ours, lr=1e-2, fused=True, **options)
    plain = torch.optim.RAdam(theirs, lr=1e-2, foreach=False, **options)
    pairs = zip(
        trained(fused, ours, range(STEPS)), trained(plain, theirs, range(STEPS)), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)
    for mine, its in zip(ours, theirs, strict=True):
        for name, value in plain.state[its].items():
            torch.testing.assert_close(fused.state[mine][name], value, rtol=rtol, atol=rtol)


def test_the_state_of_pytorch_is_continued_and_the_other_way_round() -> None:
    ours, theirs = weights(torch.float64), weights(torch.float64)
    fused, plain = RAdam(ours, lr=1e-2, fused=True), torch.optim.RAdam(theirs, lr=1e-2)
    trained(fused, ours, range(STEPS))
    trained(plain, theirs, range(STEPS))
    state = copy.deepcopy(fused.state_dict()["state"])
    fused.load_state_dict({**fused.state_dict(), "state": plain.state_dict()["state"]})
    plain.load_state_dict({**plain.state_dict(), "state": state})
    later = range(STEPS, STEPS + 3)
    one, other = trained(fused, ours, later)[-1], trained(plain, theirs, later)[-1]
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_a_weight_without_a_gradient_counts_its_own_steps() -> None:
    ours, theirs = weights(torch.float64), weights(torch.float64)
    fused, plain = RAdam(ours, lr=1e-2, fused=True), torch.optim.RAdam(theirs, lr=1e-2)
    for step in range(STEPS):
        for optimizer, params in ((fused, ours), (plain, theirs)):
            gradients_into(params, step)
            params[1].grad = None if step % 3 else params[1].grad
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_the_number_of_threads_changes_no_bit() -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            params = weights(torch.float32)
            results.append(trained(RAdam(params, lr=1e-2, fused=True), params, range(STEPS))[-1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_moments_of_another_layout_are_laid_out_as_the_weights() -> None:
    """A kernel would pair them by their place in memory; a checkpoint may come from weights with the channels first."""
    expected, params = weights(torch.float64), weights(torch.float64)
    whole, resumed = RAdam(expected, lr=1e-2, fused=True), RAdam(params, lr=1e-2, fused=True)
    trained(whole, expected, range(STEPS))
    trained(resumed, params, range(STEPS))
    state = copy.deepcopy(resumed.state_dict())
    for moments in state["state"].values():
        moments |= {name: moments[name].contiguous() for name in ("exp_avg", "exp_avg_sq")}
    resumed.load_state_dict(state)
    started: Any = SimpleNamespace(trainer=SimpleNamespace(optimizers=[resumed]))
    ConsistencyModule.on_train_start(started)
    trained(whole, expected, range(STEPS, STEPS + 1))
    trained(resumed, params, range(STEPS, STEPS + 1))
    for one, other in zip(expected, params, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_counts_of_a_checkpoint_stay_on_the_host() -> None:
    params = [weight.detach().cuda().requires_grad_() for weight in weights(torch.float32)]
    optimizer = RAdam(params, lr=1e-2, fused=True)
    trained(optimizer, params, range(STEPS))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}
