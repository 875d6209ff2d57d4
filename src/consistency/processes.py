"""The forward process x_t = alpha(t) x_0 + sigma(t) z that turns data into noise."""

from consistency.tensors import Data, Time, broadcast_time


def variance_exploding(x_0: Data, z: Data, t: Time) -> Data:
    """x_t = x_0 + t z: alpha(t) = 1, sigma(t) = t [Karras et al. 2022, arXiv:2206.00364, Section 2]."""
    return x_0 + broadcast_time(t, x_0) * z
