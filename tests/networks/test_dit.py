"""Laws of the diffusion transformer. Golden data check the numbers themselves."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from consistency.denoiser import Denoiser
from consistency.derivatives import ExactDerivative, FiniteDifference
from consistency.networks.dit import DiT, position_embedding
from consistency.preconditioning import Unscaled

# PyTorch's own first use of forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

SIDE, PATCH, CLASSES = 8, 2, 5
build = partial(DiT, image_size=SIDE, in_channels=3, patch_size=PATCH, hidden_size=16, depth=2)
build = partial(build, num_heads=2, num_classes=CLASSES)


def awake(**settings: Any) -> DiT:
    """A network in double precision with random weights everywhere, also where it starts from zero."""
    network, generator = build(**settings).double(), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).double()
    return network


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    t = torch.rand(batch, generator=generator, dtype=torch.float64)
    return x, t, torch.arange(batch) % CLASSES


@pytest.mark.parametrize("second_time", [None, "gap", "end", "halvings"])
def test_a_fresh_network_returns_exactly_zero(second_time: str | None) -> None:
    x, t, label = inputs()
    assert not build(second_time=second_time).double()(x, t, label).any()


def patches(x: Tensor) -> Tensor:
    """The patches of images, row by row, as rows of numbers."""
    n = SIDE // PATCH
    return (
        x.reshape(len(x), 3, n, PATCH, n, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    )


def test_patches_and_positions_in_another_order_give_the_same_patches_in_that_order() -> None:
    network, (x, t, label) = awake(), inputs()
    order = torch.randperm((SIDE // PATCH) ** 2, generator=torch.Generator().manual_seed(2))
    expected = patches(network(x, t, label))[:, order]
    assert torch.equal(network.images(patches(x)), x)
    moved = network.images(patches(x)[:, order])
    assert not torch.allclose(patches(network(moved, t, label)), expected)
    network.pos_embed = network.pos_embed[:, order]
    torch.testing.assert_close(patches(network(moved, t, label)), expected)


def test_the_products_of_positions_depend_on_their_difference_alone() -> None:
    """As of any sines and cosines of the same frequencies."""
    e = position_embedding(16, 6).unflatten(0, (6, 6))
    torch.testing.assert_close((e[0, 0] * e[2, 3]).sum(), (e[3, 1] * e[5, 4]).sum())
    torch.testing.assert_close(e[1, 4, :8], e[5, 4, :8])  # the column first
    torch.testing.assert_close(e[1, 4, 8:], e[1, 0, 8:])


def gradients(network: DiT) -> list[Tensor]:
    network(*inputs()).square().sum().backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("change", [{"attention": "plain"}, {"checkpoint_activations": True}])
def test_attention_by_its_formula_and_recomputed_activations_change_no_gradient(
    change: dict[str, Any],
) -> None:
    torch.testing.assert_close(gradients(awake(**change)), gradients(awake()))


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_the_derivative_of_an_average_velocity_is_the_limit_of_differences(attention: str) -> None:
    online = Denoiser(awake(second_time="gap", attention=attention), Unscaled())
    x, t, label = inputs()
    v = x.flip(0)
    u, du = ExactDerivative()(online, x, t, 0.3 * t, v, label)
    same, difference = FiniteDifference(e=1e-5, t_max=2.0)(online, x, t, 0.3 * t, v, label)
    torch.testing.assert_close(u, same)
    torch.testing.assert_close(du, difference, rtol=1e-6, atol=1e-6)


def test_no_class_is_the_last_row_of_the_table() -> None:
    network, (x, t, label) = awake(), inputs()
    nothing = network(x, t, torch.full_like(label, network.no_class))
    assert torch.equal(nothing, network(x, t, torch.full_like(label, CLASSES)))
    assert not torch.allclose(nothing, network(x, t, label))


def test_the_second_half_of_the_channels_is_left_out() -> None:
    wide, narrow = awake(learn_sigma=True), awake()
    state, numbers = wide.state_dict(), PATCH**2 * 3
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = state[name].unflatten(0, (PATCH**2, 2, 3))[:, 0].flatten(0, 1)
        assert len(state[name]) == numbers
    narrow.load_state_dict(state)
    torch.testing.assert_close(narrow(*inputs()), wide(*inputs()))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size=3"):
        build(patch_size=3)
    with pytest.raises(ValueError, match="num_heads=3"):
        build(num_heads=3)
    x, t, label = inputs()
    with pytest.raises(ValueError, match="position embedding"):
        awake()(x[..., :4, :4], t, label)
