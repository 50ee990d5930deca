"""Laws of pipelines.intervals: closed forms, scipy, and that they cover what they say they cover."""

import numpy as np
import pytest
from scipy.stats import norm

from pipelines.intervals import Interval, mean_interval, paired_interval, rate_interval


def test_one_value_and_equal_values_are_their_own_interval():
    assert mean_interval([3.0]) == Interval(3, 3, 3)
    assert mean_interval([0.1] * 7) == Interval(pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))


def test_of_many_normal_values_it_is_the_normal_interval():
    values = np.random.default_rng(3).normal(30, 2, 400)
    found = mean_interval(values.tolist())
    half = norm.ppf(0.975) * values.std() / 20
    assert found.mean == pytest.approx(values.mean()) and found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)
    wider = mean_interval(values.tolist(), level=0.99)
    assert wider.low < found.low and wider.high > found.high


def test_nineteen_of_twenty_intervals_hold_the_true_mean_also_of_skewed_scores():
    random = np.random.default_rng(0)
    held = sum(low <= 1 <= high for _, low, high in (mean_interval(random.exponential(1, 60)) for _ in range(100)))
    assert 88 <= held <= 99


def test_the_same_scores_have_the_same_interval_and_their_order_does_not_move_its_centre():
    values = np.random.default_rng(1).normal(0, 1, 50).tolist()
    assert mean_interval(values) == mean_interval(list(values))
    turned = mean_interval(values[::-1])
    assert turned.low == pytest.approx(mean_interval(values).low, abs=0.03)


def test_pairing_takes_out_what_both_share():
    random = np.random.default_rng(2)
    scene = random.normal(30, 5, 40)
    better = (scene + 0.2 + random.normal(0, 0.1, 40)).tolist()
    found = paired_interval(better, scene.tolist())
    assert 0.1 < found.low < 0.2 < found.high < 0.3
    alone = mean_interval(better)
    assert alone.high - alone.low > 10 * (found.high - found.low)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (5, 10), (10, 10), (27, 50), (1, 1)])
def test_a_rate_has_wilsons_interval(successes, trials):
    z, rate = norm.ppf(0.975), successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * np.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    found = rate_interval(successes, trials)
    assert found == Interval(rate, pytest.approx(centre - half, abs=1e-12), pytest.approx(centre + half, abs=1e-12))


def test_what_is_no_number_and_counts_that_cannot_be_are_errors():
    for wrong in ([], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite numbers"):
            mean_interval(wrong)
    with pytest.raises(ValueError, match="same images"):
        paired_interval([1.0, 2.0], [1.0])
    for successes, trials in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="successes"):
            rate_interval(successes, trials)


def test_thousands_of_images_have_the_normal_interval_too():
    found = mean_interval(np.random.default_rng(0).normal(0, 1, 6_000))
    assert found.high - found.low == pytest.approx(2 * 1.96 / 6_000**0.5, rel=0.1)
