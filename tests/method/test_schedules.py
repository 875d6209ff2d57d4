"""Laws of the schedules: pure functions of the step."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest

from consistency.errors import UserError
from consistency.schedules import (
    constant,
    decay_as_printed,
    decay_as_released,
    doubling,
    doubling_stage_steps,
    falling_in_stages,
    falling_rate,
    fixed_decay,
    half_life_decay,
    halving,
    inverse_root_rate,
    powers,
    rising_rate,
    square_root,
)

K = 800_000
cifar = partial(square_root, s_0=2, s_1=150, total_steps=K)
imagenet = partial(square_root, s_0=2, s_1=200, total_steps=K)


def test_square_root_passes_the_published_points() -> None:
    shares = (0, 0.01, 0.1, 0.25, 0.5, 0.75, 1)
    assert [cifar(int(K * share)) for share in shares] == [2, 16, 48, 76, 107, 131, 151]
    assert [imagenet(int(K * share)) for share in shares] == [2, 21, 64, 101, 143, 175, 201]


def test_square_root_increases_by_one_at_a_time() -> None:
    """N = 2 holds for the first step alone, because of the ceiling."""
    sizes = [n for n, _ in itertools.groupby(cifar(k) for k in range(0, K + 1, 100))]
    assert cifar(0) == 2
    assert cifar(1) == 3
    assert sizes == list(range(2, 152))


def test_doubling_is_the_table_of_the_paper() -> None:
    """Song and Dhariwal 2023, Table 1, CIFAR-10: K' = 50,000."""
    arguments = {"s_0": 10, "s_1": 1280, "total_steps": 400_000}
    assert doubling_stage_steps(**arguments) == 50_000
    sizes = [doubling(50_000 * i, **arguments) for i in range(8)]
    assert sizes == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert doubling(49_999, **arguments) == 11
    assert doubling(10**9, **arguments) == 1281


def test_powers_takes_any_q() -> None:
    """N(k) = 1.5, 2.25, 3.375 in three stages; a whole q keeps N(k) whole."""
    found = [powers(k, q=1.5, stages=3, total_steps=6) for k in range(8)]
    assert found == [1.5, 1.5, 2.25, 2.25, 3.375, 3.375, 3.375, 3.375]
    assert type(powers(3, q=4, stages=3, total_steps=6)) is int


def test_powers_is_the_released_schedule() -> None:
    """Geng et al. 2024: q = 2, a stage of 25,000 steps, 8 stages in 200,000."""
    released = partial(powers, q=2, stages=8, total_steps=200_000)
    assert [released(25_000 * i) for i in range(8)] == [2, 4, 8, 16, 32, 64, 128, 256]
    assert released(24_999) == 2
    assert released(10**9) == 256


def test_halving_ends_with_two_long_stages() -> None:
    published = partial(halving, s_0=4096, total_steps=K)
    assert [published(50_000 * i) for i in range(16)] == [
        4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 2, 1, 1, 1,
    ]  # fmt: skip
    assert published(49_999) == 4096
    assert published(649_999) == 2
    assert published(10**9) == 1


def test_halving_fits_a_short_run() -> None:
    sizes = [halving(k, s_0=16, total_steps=16) for k in range(16)]
    assert sizes == [16, 16, 8, 8, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]
    assert halving(0, s_0=4096, total_steps=2) == 4096


GROWING: list[Callable[[int], int]] = [
    cifar,
    partial(doubling, s_0=10, s_1=1280, total_steps=K),
    partial(powers, q=2, stages=8, total_steps=K),
    partial(constant, num_scales=18),
]


@pytest.mark.parametrize("length", [1, 2, 7, 100])
@pytest.mark.parametrize(
    "schedule",
    [
        partial(square_root, s_0=2, s_1=150),
        partial(square_root, s_0=10, s_1=10),
        partial(square_root, s_0=30, s_1=2),
        partial(doubling, s_0=10, s_1=1280),
        partial(doubling, s_0=10, s_1=10),
        partial(powers, q=2, stages=8),
        partial(powers, q=2, stages=1),
        partial(halving, s_0=4096),
        partial(halving, s_0=2),
    ],
)
def test_a_schedule_of_scales_is_defined_at_any_step(
    schedule: Callable[..., int], length: int
) -> None:
    lowest = 1 if schedule.func is halving else 2
    for k in [*range(3 * length + 2), 10**6 * length]:
        size = schedule(k, total_steps=length)
        assert isinstance(size, int) and size >= lowest


@pytest.mark.parametrize(
    ("schedule", "at_end"),
    [
        (partial(doubling, s_0=10, s_1=1280, total_steps=800), 1281),
        (partial(powers, q=2, stages=8, total_steps=800), 256),
        (partial(halving, s_0=16, total_steps=800), 1),
        (partial(constant, num_scales=18), 18),
    ],
)
def test_scales_stay_at_their_final_value(schedule: Callable[[int], int], at_end: int) -> None:
    assert {schedule(k) for k in range(799, 4000)} == {at_end}


def test_the_square_root_continues_without_a_jump() -> None:
    """As the released code, which bounds it below alone."""
    longer = [cifar(k) for k in range(K - 1000, 2 * K, 100)]
    assert all(0 <= b - a <= 1 for a, b in itertools.pairwise(longer))
    assert cifar(K) == 151
    assert max(longer) == 214


@pytest.mark.parametrize("length", [1, 2, 100])
@pytest.mark.parametrize("start", [0.0, 0.5, 0.999, 1.0, 2.0])
def test_a_rate_is_a_factor_between_0_and_1_and_never_rises_at_any_step(
    start: float, length: int
) -> None:
    rates = [
        falling_rate(k, start=start, total_steps=length)
        for k in [*range(4 * length), 10**6 * length]
    ]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1
    assert rates[-1] == (1 if start >= 1 else 0)


@pytest.mark.parametrize("length", [1, 2, 80])
def test_the_rate_of_distillation_is_a_factor_at_any_step(length: int) -> None:
    rates = [
        falling_in_stages(k, s_0=16, total_steps=length)
        for k in [*range(4 * length), 10**6 * length]
    ]
    assert all(0 <= rate <= 1 for rate in rates)


@pytest.mark.parametrize("decay", [decay_as_released, decay_as_printed])
def test_a_decay_is_below_1_for_any_number_of_scales(decay: Callable[..., float]) -> None:
    found = [decay(n, s_0=2, mu_0=0.9) for n in (1, 2, 10, 1000)]
    assert found == sorted(found)
    assert 0 <= found[0] and found[-1] < 1


def test_invalid_scales_are_refused() -> None:
    with pytest.raises(UserError, match=r"s_0=10, s_1=5"):
        doubling(0, s_0=10, s_1=5, total_steps=10)
    with pytest.raises(UserError, match="s_0 >= 2"):
        halving(0, s_0=1, total_steps=10)


@pytest.mark.parametrize("schedule", GROWING)
def test_scales_never_fall(schedule: Callable[[int], int]) -> None:
    sizes = [schedule(k) for k in range(0, 2 * K, 997)]
    assert sizes == sorted(sizes)
    assert sizes[0] >= 2


def test_decay_as_released_uses_one_scale_less_than_printed() -> None:
    """CIFAR-10, mu_0 = 0.9, at the start, the middle and the end of the run."""
    released = [decay_as_released(cifar(k), s_0=2, mu_0=0.9) for k in (0, K // 2, K)]
    printed = [decay_as_printed(cifar(k), s_0=2, mu_0=0.9) for k in (0, K // 2, K)]
    assert released == pytest.approx([0.81, 0.99801, 0.99860], abs=6e-6)
    assert printed == pytest.approx([0.9, 0.99803, 0.99861], abs=6e-6)
    assert fixed_decay(40, mu=0.95) == 0.95


def test_rates_are_factors_between_0_and_1() -> None:
    assert falling_rate(0, start=0.5, total_steps=100) == 1.0
    assert falling_rate(75, start=0.5, total_steps=100) == pytest.approx(0.5)
    assert falling_rate(100, start=0.5, total_steps=100) == 0.0
    assert falling_rate(100, start=1.0, total_steps=100) == 1.0
    assert rising_rate(5, ramp_steps=10) == 0.5
    assert rising_rate(50, ramp_steps=10) == 1.0
    assert rising_rate(0, ramp_steps=0) == 0.0


def test_the_rate_falls_with_the_root_of_the_steps_after_its_rise() -> None:
    """Closed form of Karras et al. 2024, Eq. 67: 10 M images of warm-up at batch 2048, 35,000 reference steps."""
    published = {"ref_steps": 35_000, "ramp_steps": 1e7 / 2048}
    rates = [
        inverse_root_rate(k, **published) for k in (0, 1e7 / 4096, 1e7 / 2048, 35_000, 140_000)
    ]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5])
    assert inverse_root_rate(8_000, ref_steps=2_000, ramp_steps=0) == 0.5
    assert inverse_root_rate(8_000, ref_steps=0, ramp_steps=0) == 1.0
    assert inverse_root_rate(0, ref_steps=2_000, ramp_steps=0) == 1.0


def test_rate_of_distillation_falls_once_in_every_stage() -> None:
    sizes = [halving(k, s_0=16, total_steps=80) for k in range(80)]
    rates = [falling_in_stages(k, s_0=16, total_steps=80) for k in range(80)]
    starts = [k for k in range(80) if k == 0 or sizes[k] != sizes[k - 1]]
    assert [rates[k] for k in starts] == [1.0] * len(starts)
    assert all(rates[k] < rates[k - 1] for k in range(1, 70) if k not in starts)


def test_the_weight_halves_after_the_half_life() -> None:
    decay = half_life_decay(10**6, half_life=1000, ramp_up=0.05)
    assert decay**1000 == pytest.approx(0.5)
    assert half_life_decay(0, half_life=1000, ramp_up=0.05) == 0.0
    assert half_life_decay(100, half_life=1000, ramp_up=0.05) == pytest.approx(0.5 ** (1 / 5))


def test_stages_have_a_length_of_their_own() -> None:
    """FastGen: 12,500 steps a stage in a run of 350,000."""
    ours = [
        powers(k, q=2, stages=28, total_steps=350_000, stage_steps=12_500)
        for k in (0, 12_499, 12_500, 400_000)
    ]
    assert ours == [2, 2, 4, 2**28]
    shared = [powers(k, q=2, stages=28, total_steps=350_000) for k in range(0, 400_000, 5_000)]
    assert shared == [
        powers(k, q=2, stages=28, total_steps=1, stage_steps=12_500)
        for k in range(0, 400_000, 5_000)
    ]
