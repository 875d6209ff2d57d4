"""Laws of the weightings."""

import torch

from consistency.weightings import (
    inverse_c_out,
    inverse_gap,
    inverse_root_gap,
    karras,
    snr,
    snr_plus_one,
    truncated_snr,
    uniform,
)

T = torch.tensor([0.002, 0.5, 1.0, 3.0, 80.0], dtype=torch.float64)
R = T / 2


def test_the_weightings_are_their_formulas() -> None:
    assert torch.equal(uniform(T, R), torch.ones_like(T))
    assert torch.allclose(snr(T, R) * T**2, torch.ones_like(T))
    assert torch.allclose(snr_plus_one(T, R), snr(T, R) + 1)
    assert torch.equal(truncated_snr(T, R), torch.maximum(snr(T, R), torch.ones_like(T)))
    assert torch.allclose(inverse_gap(T, R), 2 / T)
    assert torch.allclose(inverse_root_gap(T, R) ** 2, inverse_gap(T, R))


def test_all_but_one_depend_on_the_noisier_time_alone() -> None:
    for weighting in (uniform, snr, snr_plus_one, truncated_snr):
        assert torch.equal(weighting(T, R), weighting(T, 0 * R))
    assert not torch.equal(inverse_gap(T, R), inverse_gap(T, 0 * R))


def test_the_weight_of_karras_undoes_c_out() -> None:
    """lambda c_out^2 = 1 [Karras et al. 2022, Appendix B.6]."""
    c_out = T * 0.5 / (T**2 + 0.25).sqrt()
    assert torch.allclose(karras(T, R, sigma_data=0.5) * c_out**2, torch.ones_like(T))
    assert torch.allclose(inverse_c_out(T, R, sigma_data=0.5) * c_out, torch.ones_like(T))
    assert torch.allclose(karras(T, R, sigma_data=1.0), snr_plus_one(T, R))
