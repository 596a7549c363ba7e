"""Bootstrap intervals over images."""

import _intervals
import numpy as np
import pytest


VALUES = np.random.default_rng(1).gamma(2.0, size=60)


def naive_interval(statistic, images: int) -> tuple[float, float]:
    """Images drawn again one sample at a time, with other random numbers."""
    draws = np.random.default_rng(99).integers(images, size=(4000, images))
    found = sorted(statistic(draw) for draw in draws)
    return found[100], found[-100]


def test_mean_interval_agrees_with_drawing_the_images_again():
    found = _intervals.mean_interval(VALUES)
    low, high = naive_interval(lambda draw: VALUES[draw].mean(), 60)
    assert found.value == pytest.approx(VALUES.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_ratio_interval_draws_both_sides_together():
    other = VALUES * np.random.default_rng(2).uniform(1.9, 2.1, size=60)
    found = _intervals.ratio_interval(other, VALUES)
    low, high = naive_interval(lambda draw: other[draw].mean() / VALUES[draw].mean(), 60)
    assert found.value == pytest.approx(other.mean() / VALUES.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_a_difference_is_paired():
    """Noise that both sides share does not widen the interval."""
    shifted = VALUES + np.random.default_rng(3).uniform(0.01, 0.03, size=60)
    found = _intervals.difference_interval(shifted, VALUES)
    assert 0.01 < found.low < found.value < found.high < 0.03 and found.differs
    assert not _intervals.difference_interval(VALUES, VALUES).differs


@pytest.mark.parametrize(
    ("low", "high", "differs"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False)]
)
def test_a_difference_counts_where_zero_is_outside(low, high, differs):
    estimate = _intervals.Estimate((low + high) / 2, low, high)
    assert estimate.differs is differs
    assert _intervals.Estimate(0.25, -0.125, 1).text(3, "+") == "+0.250 [-0.125, +1.000]"
