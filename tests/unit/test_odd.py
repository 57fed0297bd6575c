"""The odd one out: found when it is far off, and rarely where there is none."""

import numpy as np
import pytest

from dreambooth.scoring.odd import CHANCE, LEAST, odd_one, student_tail


@pytest.mark.parametrize(
    "t, freedom, tail",  # from tables
    [(0, 7, 0.5), (12.706, 1, 0.025), (2.920, 2, 0.05), (4.541, 3, 0.01), (2.764, 10, 0.01), (1.980, 120, 0.025)],
)
def test_the_tail_of_student_s_t(t, freedom, tail):
    assert student_tail(t, freedom) == pytest.approx(tail, rel=2e-3)


@pytest.mark.parametrize("number", [4, 6, 12])
def test_values_that_are_alike_are_called_odd_as_rarely_as_is_said(number):
    draws = np.random.default_rng(number).normal(0.8, 0.05, (800, number))
    alarms = np.mean([odd_one(values) is not None for values in draws])
    assert CHANCE / 3 < alarms < 2 * CHANCE


@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_value_far_above_the_others_is_found_and_one_below_is_not(place):
    values = np.random.default_rng(0).normal(0.8, 0.01, 6)
    values[place] = 0.95
    assert odd_one(values) == place
    values[place] = 0.65
    assert odd_one(values) is None


@pytest.mark.parametrize(
    "values", [[], [0.7], [0.7, 0.9], [0.8] * 5, [0.8] * 5 + [0.8 + LEAST / 2], [0.8, np.nan, 0.8, 1]]
)
def test_what_is_too_few_too_close_or_no_number_has_none(values):
    assert odd_one(values) is None


def test_one_among_copies_is_odd():
    assert odd_one([0.8, 0.8, 0.9, 0.8]) == 2
