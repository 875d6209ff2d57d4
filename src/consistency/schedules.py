"""Schedules: pure functions of the optimizer step k, so that a resumed run finds its place by k alone.

N(k) is the number of scales, mu(k) the decay of the target network's average. k counts the optimizer steps that were
really taken, starting at 0.
"""

import math


def constant(k: int, *, num_scales: int) -> int:
    """N(k) = num_scales [Song et al. 2023, arXiv:2303.01469, distillation]."""
    return num_scales


def square_root(k: int, *, s_0: int, s_1: int, total_steps: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s_1+1)^2 - s_0^2) + s_0^2) - 1) + 1 [Song et al. 2023, Appendix C].

    The released code bounds the bracket below by 1; total_steps is K.
    """
    root = math.sqrt(k / total_steps * ((s_1 + 1) ** 2 - s_0**2) + s_0**2)
    return max(math.ceil(root - 1), 1) + 1


def doubling(k: int, *, s_0: int, s_1: int, total_steps: int) -> int:
    """N(k) = min(s_0 2^floor(k/K'), s_1) + 1, K' = floor(K / (log2 floor(s_1/s_0) + 1)).

    [Song and Dhariwal 2023, arXiv:2310.14189, Table 1]; total_steps is K.
    """
    stage_steps = max(math.floor(total_steps / (math.log2(s_1 // s_0) + 1)), 1)
    return min(s_0 * 2 ** min(k // stage_steps, 64), s_1) + 1


def powers(k: int, *, q: int, stage_steps: int) -> int:
    """N(k) = q^(stage + 1) with stage = floor(k / stage_steps): r/t -> 1 - 1/N for small gaps.

    [Geng et al. 2024, arXiv:2406.14548; the published code counts stages in ticks of images].
    """
    return q ** (k // stage_steps + 1)


def fixed_decay(num_scales: int, *, mu: float) -> float:
    """mu(k) = mu [Song et al. 2023, distillation]."""
    return mu


def decay_as_released(num_scales: int, *, s_0: int, mu_0: float) -> float:
    """mu(k) = exp(s_0 ln mu_0 / (N(k) - 1)): the released code, which the published models were trained with."""
    return math.exp(s_0 * math.log(mu_0) / (num_scales - 1))


def decay_as_printed(num_scales: int, *, s_0: int, mu_0: float) -> float:
    """mu(k) = exp(s_0 ln mu_0 / N(k)) [Song et al. 2023, Appendix C, as printed]."""
    return math.exp(s_0 * math.log(mu_0) / num_scales)


def falling_rate(k: int, *, start: float, total_steps: int) -> float:
    """1 until the share `start` of the run, then linearly down to 0 at total_steps: a factor of the learning rate."""
    done = k / total_steps
    return 1.0 if done <= start else max(0.0, (1 - done) / (1 - start))


def constant_rate(k: int) -> float:
    """1: the published consistency models were trained at a constant rate."""
    return 1.0
