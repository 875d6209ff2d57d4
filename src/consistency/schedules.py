"""Schedules: pure functions of the optimizer step k, so that a resumed run finds its place by k alone.

N(k) is the number of scales, mu(k) the decay of the target network's average. k counts the optimizer steps that were
really taken, starting at 0.
"""

import math

from consistency.errors import require


def constant(k: int, *, num_scales: int) -> int:
    """N(k) = num_scales [Song et al. 2023, arXiv:2303.01469, distillation]."""
    return num_scales


def square_root(k: int, *, s_0: int, s_1: int, total_steps: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s_1+1)^2 - s_0^2) + s_0^2) - 1) + 1 [Song et al. 2023, Appendix C].

    The released code bounds the bracket below by 1; total_steps is K. A run longer than K goes on along the same root, as
    the released code does, and passes s_1 + 1.
    """
    root = math.sqrt(max(k / total_steps * ((s_1 + 1) ** 2 - s_0**2) + s_0**2, 0))
    return max(math.ceil(root - 1), 1) + 1


def doubling(k: int, *, s_0: int, s_1: int, total_steps: int) -> int:
    """N(k) = min(s_0 2^floor(k/K'), s_1) + 1, K' = floor(K / (log2 floor(s_1/s_0) + 1)).

    [Song and Dhariwal 2023, arXiv:2310.14189, Table 1]; total_steps is K.
    """
    stage_steps = doubling_stage_steps(s_0=s_0, s_1=s_1, total_steps=total_steps)
    return min(s_0 * 2 ** min(k // stage_steps, 64), s_1) + 1


def doubling_stage_steps(*, s_0: int, s_1: int, total_steps: int) -> int:
    """K' of `doubling`, at least 1."""
    expected = "1 <= s_0 <= s_1 for scales that double from s_0 to s_1"
    got = f"s_0={s_0}, s_1={s_1}"
    require(1 <= s_0 <= s_1, expected, got, "the published values are 10 and 1280")
    return max(math.floor(total_steps / (math.log2(s_1 // s_0) + 1)), 1)


def powers(
    k: int, *, q: float, stages: int, total_steps: int, stage_steps: float | None = None
) -> float:
    """N(k) = q^(stage + 1) with stage = floor(k stages / K), at most stages - 1: r/t -> 1 - 1/N for large t.

    [Geng et al. 2024, arXiv:2406.14548: K = 200,000 steps in 8 stages, q = 2]; total_steps is K. N(k) is whole only if q
    is. stage_steps: steps of a stage, whatever the length of the run.
    """
    stage = k * stages // total_steps if stage_steps is None else int(k // stage_steps)
    return q ** (min(stage, stages - 1) + 1)


def halving(k: int, *, s_0: int, total_steps: int) -> int:
    """N(k) = s_0, s_0/2, s_0/4 ... 4 for K' steps each, 2 for 2 K', then 1: the steps left by progressive distillation.

    K' = floor(K / (log2 s_0 + 4)), the published 50,000 for s_0 = 4096 and K = 800,000; total_steps is K
    [released code of Song et al. 2023 after Salimans and Ho 2022, arXiv:2202.00512].
    """
    stage_steps, first_of_two = _halving_stages(s_0, total_steps)
    n = max(s_0 >> min(k // stage_steps, 64), 2)
    return 1 if n == 2 and k >= first_of_two + 2 * stage_steps else n


def _halving_stages(s_0: int, total_steps: int) -> tuple[int, float]:
    """K' and the step from which the doubled stages of N = 2 and N = 1 are counted."""
    require(s_0 >= 2, "s_0 >= 2 scales to halve", s_0, "the published value is 4096")
    stage_steps = max(math.floor(total_steps / (math.log2(s_0) + 4)), 1)
    return stage_steps, stage_steps * (math.log2(s_0) - 1)


def fixed_decay(num_scales: int, *, mu: float) -> float:
    """mu(k) = mu [Song et al. 2023, distillation]."""
    return mu


def decay_as_released(num_scales: int, *, s_0: int, mu_0: float) -> float:
    """mu(k) = exp(s_0 ln mu_0 / (N(k) - 1)): the released code, which the published models were trained with; 0 at N = 1,
    the limit.
    """
    return 0.0 if num_scales == 1 else math.exp(s_0 * math.log(mu_0) / (num_scales - 1))


def decay_as_printed(num_scales: int, *, s_0: int, mu_0: float) -> float:
    """mu(k) = exp(s_0 ln mu_0 / N(k)) [Song et al. 2023, Appendix C, as printed]."""
    return math.exp(s_0 * math.log(mu_0) / num_scales)


def falling_rate(k: int, *, start: float, total_steps: int) -> float:
    """1 until the share `start` of total_steps, then linearly down to 0 at total_steps, where it stays: a factor of the
    learning rate. start = 1 keeps it at 1, however long the run goes on.
    """
    done = k / total_steps
    return 1.0 if start >= 1 or done <= start else max(0.0, (1 - done) / (1 - start))


def constant_rate(k: int) -> float:
    """1: the published consistency models were trained at a constant rate."""
    return 1.0


def falling_in_stages(k: int, *, s_0: int, total_steps: int) -> float:
    """Linearly from 1 to 0 in every stage of `halving` of the same arguments [released CIFAR-10 code, `progdist`].

    N = 1 goes on in stages of 2 K', at total_steps and after it.
    """
    stage_steps, first_of_two = _halving_stages(s_0, total_steps)
    if k < first_of_two:
        return 1 - k % stage_steps / stage_steps
    return max(0.0, 1 - (k - first_of_two) % (2 * stage_steps) / (2 * stage_steps))


def warm_up(k: int, *, ramp_steps: int) -> float:
    """r(k) = min(1, k / ramp_steps): the share of the tangent's second term [Lu and Song 2024, arXiv:2410.11081: 10,000].

    ramp_steps = 0 is no warm-up.
    """
    return min(1.0, k / ramp_steps) if ramp_steps else 1.0


def falling_sigmoid(
    k: int, *, start_steps: int, end_steps: int, gamma: float, clamp: float
) -> float:
    """alpha(k) = 1 - sigmoid(gamma ((k - start) / (end - start) - 1/2)), 1 before and 0 after; within `clamp` of an end, that end.

    [Zhang et al. 2025, arXiv:2510.20771, released code: gamma 25, clamp 0.005, start 0 and end 400,000 of 400,000 steps]
    """
    if k < start_steps or k > end_steps:
        return 1.0 if k < start_steps else 0.0
    alpha = 1 - 1 / (1 + math.exp(-gamma * ((k - start_steps) / (end_steps - start_steps) - 0.5)))
    return 0.0 if alpha < clamp else 1.0 if alpha > 1 - clamp else alpha


def constant_share(k: int, *, alpha: float) -> float:
    """alpha(k) = alpha."""
    return alpha


def rising_rate(k: float, *, ramp_steps: float, start: float = 0.0) -> float:
    """Linearly from `start` up to 1 at `ramp_steps`: a factor of the learning rate [Karras et al. 2022, Table 7]."""
    return start + (1 - start) * min(k / max(ramp_steps, 1e-8), 1.0)


def inverse_root_rate(k: float, *, ref_steps: float, ramp_steps: float) -> float:
    """1 / sqrt(max(k / ref_steps, 1)) after a linear rise to `ramp_steps`; 0 leaves out either [Karras et al. 2024,
    arXiv:2312.02696, Eq. 67; its released code].
    """
    fall = max(k / ref_steps, 1.0) if ref_steps else 1.0
    return rising_rate(k, ramp_steps=ramp_steps) / math.sqrt(fall) if ramp_steps else fall**-0.5


def half_life_decay(k: float, *, half_life: float, ramp_up: float) -> float:
    """2^(-1 / min(half_life, ramp_up k)): the decay of an average that forgets half in `half_life` steps.

    `ramp_up` keeps the half-life to that share of the run so far [released EDM code: 500,000 images and 0.05].
    """
    return float(0.5 ** (1 / max(min(half_life, k * ramp_up), 1e-8)))
