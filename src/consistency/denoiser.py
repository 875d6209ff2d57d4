"""Denoiser = network + preconditioning."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from consistency.preconditioning import Preconditioning
from consistency.tensors import Data, Label, Time, broadcast_time


class Denoiser(nn.Module):
    """(x_t, t, label) -> estimate of x_0 = c_skip x_t + c_out F(c_in x_t, c_noise, label).

    With EDM scalings D(x_t, t), with boundary scalings f(x_t, t) [Karras et al. 2022, Eq. 7; Song et al. 2023, Eq. 5].
    The scalings keep the precision of x_t and t whatever the network computes in. A network of two times is told the
    time r < t at which its average velocity ends; without r it ends at 0.
    """

    def __init__(self, network: nn.Module, preconditioning: Preconditioning) -> None:
        super().__init__()
        # Convolutions on a CPU are a tenth faster with the channels last, on a GPU in half precision more.
        self.network = network.to(memory_format=torch.channels_last)
        self.preconditioning = preconditioning

    def forward(
        self,
        x_t: Data,
        t: Time,
        label: Label = None,
        r: Time | None = None,
        **augment: Float[Tensor, "b _a"],
    ) -> Data:
        """`augment=` are the labels of an augmentation, for a network that has such an input."""
        c = self.preconditioning(t)
        x = broadcast_time(c.c_in, x_t) * x_t
        end = {} if r is None else {"r": self.preconditioning(r).c_noise}
        raw = self.network(x, c.c_noise, label, **end, **augment).to(x_t.dtype)
        return broadcast_time(c.c_skip, x_t) * x_t + broadcast_time(c.c_out, x_t) * raw
