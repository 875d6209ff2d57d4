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


def pf_ode(denoise: Denoise, x_t: Data, t: Time, label: Label = None) -> Data:
    """The right-hand side dx/dt = (x - D(x, t)) / t."""
    return (x_t - denoise(x_t, t, label)) / broadcast_time(t, x_t)


def euler_step(denoise: Denoise, x: Data, t: Time, r: Time, label: Label = None) -> Data:
    """Euler's method, order 1, one evaluation; r = 0 is allowed and gives D(x, t)."""
    return x + broadcast_time(r - t, x) * pf_ode(denoise, x, t, label)


def heun_step(denoise: Denoise, x: Data, t: Time, r: Time, label: Label = None) -> Data:
    """Heun's method, order 2, two evaluations; r > 0 [Karras et al. 2022, Algorithm 1, lines 4 to 8]."""
    step = broadcast_time(r - t, x)
    d = pf_ode(denoise, x, t, label)
    d_prime = pf_ode(denoise, x + step * d, r, label)
    return x + step * (d + d_prime) / 2


def midpoint_step(
    slope: Denoise, x: Data, t: Time, middle: Time, r: Time, label: Label = None
) -> Data:
    """One step of dx/dt = slope(x, t) with the slope of a time between, two evaluations; order 2 at (t + r) / 2."""
    half = x + broadcast_time(middle - t, x) * slope(x, t, label)
    return x + broadcast_time(r - t, x) * slope(half, middle, label)
