"""Predictions: the scaling law's own invariants, and what measured points do to a band."""

from __future__ import annotations

import pytest

from fewbits.quant.allocate.predict import predict_kl, prior, scaling_law, tokens_at


def test_the_scaling_law_and_its_inverse() -> None:
    assert scaling_law(7e9, tokens_at(0.2, 7e9, 3.0), [(1, 3.0)]) == pytest.approx(0.2)
    base = scaling_law(7e9, 1e12, [(1, 3.0)])
    assert scaling_law(7e9, 2e12, [(1, 3.0)]) > base > scaling_law(14e9, 1e12, [(1, 3.0)])
    assert scaling_law(7e9, 1e12, [(1, 4.0)]) < base
    mixed = scaling_law(7e9, 1e12, [(1, 2.0), (1, 4.0)])
    assert mixed / base == pytest.approx(4.7, rel=0.02)  # losses average, not bits
    assert tokens_at(0.2, 7e9, 3.0) == pytest.approx(0.187e12, rel=0.02)


def test_points_sharpen_the_band() -> None:
    wide, sharp = predict_kl(0.2, "measured"), predict_kl(0.2, "measured", [(0.2, 0.31)])
    assert wide.high / wide.low > 1.5 >= sharp.high / sharp.low
    assert sharp.kl == pytest.approx(0.31) and sharp.low < 0.31 < sharp.high
    two = predict_kl(0.1, "hessian", [(20.0, 0.4), (0.02, 0.04)])
    assert 0.04 < two.kl < 0.4


def test_points_recover_a_power_law() -> None:
    def law(d: float) -> float:
        return 2.1 * d**1.2

    points = [(d, law(d)) for d in (0.01, 0.1, 1.0)]
    for d in (0.03, 0.3):
        assert predict_kl(d, "fisher", points).kl == pytest.approx(law(d), rel=0.05)


def test_nothing_changed_costs_nothing() -> None:
    assert predict_kl(0.0, "fisher").kl == 0
    known, unknown = prior(1e9, 1e13, [(1, 3.0)]), prior(1e9, None, [(1, 3.0)])
    assert unknown.high / unknown.low > known.high / known.low


def test_mixed_widths_lie_between_their_mean_and_the_mean_of_their_losses() -> None:
    mixed, uniform = prior(1e9, 1e13, [(1, 2.0), (1, 4.0)]), prior(1e9, 1e13, [(2, 3.0)])
    assert mixed.low == pytest.approx(uniform.low) and mixed.high > 4 * uniform.high
