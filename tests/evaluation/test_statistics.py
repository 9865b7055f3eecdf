"""Intervals, pass@k and paired comparison against hand-computed cases and against chance itself."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.evaluation.report import comparison_table
from l0fast.evaluation.statistics import compare, interval, pass_at_k


def test_the_interval_is_over_questions_and_not_over_samples():
    one = interval({"a": [1.0], "b": [0.0], "c": [1.0], "d": [1.0]})
    assert one.mean == 0.75
    assert one.half_width == pytest.approx(1.959964 * 0.5 / 2)
    # the same questions asked a hundred times tell no more about other questions
    many = interval({"a": [1.0] * 100, "b": [0.0] * 100, "c": [1.0] * 100, "d": [1.0] * 100})
    assert (many.mean, many.half_width) == (one.mean, one.half_width)


def test_few_questions_have_no_interval_and_none_no_mean():
    one = interval({"a": [1.0, 0.0]})
    assert one.mean == 0.5
    assert math.isnan(one.half_width)
    assert math.isnan(interval({}).mean)
    assert interval({"a": [], "b": [1.0]}).questions == 1


def test_pass_at_k_by_hand():
    # of 4 samples 1 is right: 1 in 4 alone, 1 - C(3,2)/C(4,2) = 1/2 of two
    assert pass_at_k({"a": [True, False, False, False]}, 1) == 0.25
    assert pass_at_k({"a": [True, False, False, False]}, 2) == 0.5
    assert pass_at_k({"a": [True, False, False, False]}, 4) == 1.0
    assert pass_at_k({"a": [True, False], "b": [False, False]}, 2) == 0.5
    assert math.isnan(pass_at_k({"a": [True]}, 2))


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_is_what_drawing_k_of_the_samples_gives(samples, k):
    if k <= len(samples):
        draws = list(itertools.combinations(samples, k))
        assert pass_at_k({"q": samples}, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_a_clear_difference_is_real_and_none_is_none():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    a = {str(i): [float(rng.random() < min(1.0, p + 0.15))] for i, p in enumerate(hard)}
    b = {str(i): [float(rng.random() < p)] for i, p in enumerate(hard)}
    found = compare(a, b)
    assert found.real
    assert found.low < found.a - found.b < found.high
    assert found.low > 0
    same = compare(a, a)
    assert (same.p_value, same.low, same.high) == (1.0, 0.0, 0.0)
    mirrored = compare(b, a)
    assert mirrored.a - mirrored.b == pytest.approx(found.b - found.a)


def test_equal_policies_are_called_different_as_rarely_as_promised():
    rng = np.random.default_rng(1)
    called = 0
    for trial in range(200):
        a = {str(i): [float(rng.random() < 0.5)] for i in range(60)}
        b = {str(i): [float(rng.random() < 0.5)] for i in range(60)}
        called += compare(a, b, seed=trial).real
    assert called <= 22


@pytest.mark.parametrize("num_questions", [1, 2, 3, 4, 5, 6])
def test_that_few_questions_all_go_one_way_is_as_likely_as_as_many_coins(num_questions):
    a, b = {str(i): [1.0] for i in range(num_questions)}, {str(i): [0.0] for i in range(num_questions)}
    same = {"same": [1.0, 0.0]}
    for one, other in ((a, b), (b, a), (a | same, b | same)):
        found = compare(one, other)
        assert found.p_value == 2 / 2**num_questions
        assert found.real == (num_questions > 5)


def test_a_sampled_p_value_is_near_the_exact_one(monkeypatch):
    rng = np.random.default_rng(2)
    a = {str(i): [float(rng.random()) + 0.1] for i in range(12)}
    b = {str(i): [float(rng.random())] for i in range(12)}
    exact = compare(a, b).p_value
    assert 0.01 < exact < 0.5
    monkeypatch.setattr("l0fast.evaluation.statistics.RESAMPLES", 2000)
    sampled = compare(a, b).p_value
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=0.03)


def test_a_single_question_has_no_interval_of_the_difference():
    found = compare({"a": [1.0]}, {"a": [0.0]})
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert "| +1.000 |  | 1.0000 | no |" in comparison_table({"geography": found}, "A", "B")


def test_only_common_questions_are_compared():
    found = compare({"a": [1.0], "b": [1.0], "c": []}, {"a": [0.0], "c": [1.0], "d": [1.0]})
    assert (found.questions, found.a, found.b) == (1, 1.0, 0.0)
    with pytest.raises(ValueError, match="no question in common"):
        compare({"a": [1.0]}, {"b": [1.0]})
