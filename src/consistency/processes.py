"""The forward process x_t = alpha(t) x_0 + sigma(t) z that turns data into noise."""

from consistency.tensors import Data, Time, broadcast_time


def variance_exploding(x_0: Data, z: Data, t: Time) -> Data:
    """x_t = x_0 + t z: alpha(t) = 1, sigma(t) = t [Karras et al. 2022, arXiv:2206.00364, Section 2]."""
    return x_0 + broadcast_time(t, x_0) * z


def trigflow(x_0: Data, z: Data, t: Time) -> Data:
    """x_t = cos(t) x_0 + sin(t) z, 0 <= t <= pi/2, where z has the standard deviation sigma_data of the data.

    [Lu and Song 2024, arXiv:2410.11081, Section 3.1]. With t = arctan(t_ve / sigma_data) and the same image and unit
    noise it is cos(t) times the variance-exploding x at t_ve.
    """
    return broadcast_time(t.cos(), x_0) * x_0 + broadcast_time(t.sin(), x_0) * z


def rectified_flow(x_0: Data, z: Data, t: Time) -> Data:
    """x_t = (1 - t) x_0 + t z, 0 <= t <= 1, whose velocity is z - x_0 [Liu et al. 2022, arXiv:2209.03003, Section 2.1].

    With t = s / (1 + s) and the same image and noise it is 1 / (1 + s) times the variance-exploding x at s.
    """
    return broadcast_time(1 - t, x_0) * x_0 + broadcast_time(t, x_0) * z
