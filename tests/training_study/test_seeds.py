"""The arithmetic behind every verdict, on numbers whose answer is known."""

import math

import pytest

from comfy_sage3.training_study.seeds import WORDS, Difference, compare, interval


def test_the_interval_is_students_t_on_known_numbers():
    # mean 3, standard deviation sqrt(2.5), t(4) = 2.776: half width 2.776 * 1.58114 / 2.23607
    mean, low, high = interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert (low, high) == (pytest.approx(1.0371, abs=1e-4), pytest.approx(4.9629, abs=1e-4))


def test_one_value_has_no_interval():
    assert interval([0.5]) == (0.5, -math.inf, math.inf)


def test_many_values_use_the_last_quantile():
    values = [0.0, 1.0] * 30
    _, low, high = interval(values)
    assert high - low == pytest.approx(2 * 2.042 * 0.50422 / math.sqrt(60), rel=1e-4)


def test_seeds_are_compared_one_by_one_and_only_where_both_ran():
    d = compare({0: 1.1, 1: 2.1, 2: 3.1, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 3.0, 5: 0.0})
    assert d.seeds == 3
    assert d.mean == pytest.approx(0.1)
    assert (d.low, d.high) == (pytest.approx(0.1), pytest.approx(0.1))  # every seed says the same
    assert d.spread == 1.0
    assert compare({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("low", "high", "spread", "kind"),
    [
        (-0.5, 0.5, 1.0, "within"),
        (0.2, 0.8, 1.0, "small"),
        (-0.8, -0.2, 1.0, "small"),
        (1.1, 1.5, 1.0, "beyond"),
        (-1.5, -1.1, 1.0, "beyond"),
        (0.5, 1.5, 1.0, "open"),
        (-2.0, 2.0, 1.0, "open"),
        (0.0, 0.0, 0.0, "within"),
    ],
)
def test_the_verdict_weighs_the_interval_against_what_seeds_do(low, high, spread, kind):
    assert Difference(3, (low + high) / 2, low, high, spread).kind == kind
    assert kind in WORDS


def test_one_seed_says_nothing():
    assert compare({0: 5.0}, {0: 1.0}).kind == "few"
