"""Steps of the probability-flow ODE dx/dt = (x - D(x, t)) / t, written once for training and for sampling.

[Karras et al. 2022, arXiv:2206.00364, Eq. 1 with Eq. 3 and sigma(t) = t]. Times may go down (sampling) or up
(inversion), and differ from sample to sample.
"""

from typing import Protocol, runtime_checkable

from consistency.tensors import Data, Denoise, Label, Time, broadcast_time


@runtime_checkable
class Solver(Protocol):
    """One step of the PF-ODE from x at time t to time r."""

    def __call__(self, denoise: Denoise, x: Data, t: Time, r: Time, label: Label) -> Data: ...


def pf_ode(denoise: Denoise, x: Data, t: Time, label: Label) -> Data:
    """The right-hand side dx/dt = (x - D(x, t)) / t."""
    return (x - denoise(x, t, label)) / broadcast_time(t, x)


def euler_step(denoise: Denoise, x: Data, t: Time, r: Time, label: Label = None) -> Data:
    """Euler's method, order 1, one evaluation; r = 0 is allowed and gives D(x, t)."""
    return x + broadcast_time(r - t, x) * pf_ode(denoise, x, t, label)


def heun_step(denoise: Denoise, x: Data, t: Time, r: Time, label: Label = None) -> Data:
    """Heun's method, order 2, two evaluations; r > 0 [Karras et al. 2022, Algorithm 1, lines 4 to 8]."""
    step = broadcast_time(r - t, x)
    d = pf_ode(denoise, x, t, label)
    d_prime = pf_ode(denoise, x + step * d, r, label)
    return x + step * (d + d_prime) / 2
