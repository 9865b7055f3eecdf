"""The mismatch watch: hand-computed numbers, any cut into packs and ranks, masked tokens, and what is said when."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.config import LearnerConfig
from l0fast.errors import LearnerError
from l0fast.learner.mismatch import TURN_BINS, Mismatch, judge

ALL = ("mismatch_k1", "mismatch_k3", "mismatch_max", "mismatch_outside", "mismatch_ess")


def seen(d, weights=None, turns=None, sampler=-2.0) -> Mismatch:
    """Of tokens whose log-probs differ by `d`."""
    mismatch = Mismatch()
    count(mismatch, d, weights, turns, sampler)
    return mismatch


def count(mismatch: Mismatch, d, weights=None, turns=None, sampler=-2.0) -> None:
    d = np.array(d, np.float64)
    mismatch.add(
        sampler + d,
        np.full(len(d), sampler),
        np.ones(len(d), np.float32) if weights is None else np.array(weights, np.float32),
        np.zeros(len(d), np.int32) if turns is None else np.array(turns, np.int32),
    )


def test_the_numbers_are_those_of_a_hand():
    # ratios 1, 4, 1/4
    metrics = seen(np.log([1.0, 4.0, 0.25])).metrics()
    assert metrics["mismatch_k1"] == pytest.approx(0)
    assert metrics["mismatch_k3"] == pytest.approx((0 + (3 - np.log(4)) + (-0.75 + np.log(4))) / 3)
    assert metrics["mismatch_max"] == pytest.approx(np.log(4))
    assert metrics["mismatch_outside"] == pytest.approx(2 / 3)
    assert metrics["mismatch_ess"] == pytest.approx(5.25**2 / (3 * (1 + 16 + 1 / 16)))


def test_k1_is_positive_where_the_policy_likes_the_samples_less():
    assert seen([-0.1, -0.3]).metrics()["mismatch_k1"] == pytest.approx(0.2)


def test_equal_log_probs_show_no_mismatch():
    metrics = seen([0.0, 0.0]).metrics()
    assert [metrics[name] for name in ALL] == [0, 0, 0, 0, 1]


def test_a_half_and_a_double_are_still_inside():
    assert seen([np.log(2), -np.log(2)], sampler=0.0).metrics()["mismatch_outside"] == 0
    assert seen([np.log(2) + 1e-9, -np.log(2) - 1e-9], sampler=0.0).metrics()["mismatch_outside"] == 1


def test_k3_keeps_its_digits_where_programs_nearly_agree():
    # d^2 / 2; exp(d) - d - 1 in one go would be 0 or noise
    assert seen([1e-9], sampler=0.0).metrics()["mismatch_k3"] == pytest.approx(0.5e-18, rel=1e-2, abs=0)


def test_masked_tokens_are_in_none_of_it():
    masked = seen([0.1, 5.0, -0.2, np.nan], weights=[1, 0, 0.25, 0], turns=[0, 1, 2, 3])
    assert masked.metrics() == seen([0.1, -0.2], turns=[0, 2]).metrics()
    assert seen([5.0], weights=[0]).metrics() == {}
    assert Mismatch().metrics() == {}


def test_a_turn_is_told_apart_and_late_ones_are_counted_together():
    metrics = seen([0.1, 0.2, 0.3, 0.5], turns=[0, 1, TURN_BINS - 1, TURN_BINS + 5]).metrics()
    assert metrics["mismatch_k1/turn_0"] == pytest.approx(-0.1)
    assert metrics["mismatch_k1/turn_1"] == pytest.approx(-0.2)
    assert metrics[f"mismatch_k1/turn_{TURN_BINS - 1}_on"] == pytest.approx(-0.4)
    assert metrics[f"mismatch_max/turn_{TURN_BINS - 1}_on"] == pytest.approx(0.5)
    assert metrics["mismatch_max"] == pytest.approx(0.5)
    assert set(metrics) == {
        name + of for name in ALL for of in ("", "/turn_0", "/turn_1", f"/turn_{TURN_BINS - 1}_on")
    }, "turns without a token have no numbers"


TOKENS = st.lists(
    st.tuples(st.floats(-3, 3, width=32), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 12)), min_size=1, max_size=40
)


@given(TOKENS, st.data())
def test_any_cut_into_packs_and_any_order_of_ranks_is_one_pass(tokens, data):
    whole = seen(*zip(*tokens, strict=True))
    bounds = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4)))
    shuffled = data.draw(st.permutations(tokens))
    parts = [shuffled[a:b] for a, b in zip([0, *bounds], [*bounds, len(tokens)], strict=True)]
    # some packs lie on one rank
    ranks = [Mismatch() for _ in range(data.draw(st.integers(1, 3)))]
    for i, part in enumerate(parts):
        if part:
            count(ranks[i % len(ranks)], *zip(*part, strict=True))
    total = Mismatch()
    for rank in data.draw(st.permutations(ranks)):
        total.sums += rank.sums
        total.maxima = np.maximum(total.maxima, rank.maxima)
    assert total.metrics() == pytest.approx(whole.metrics(), rel=1e-9, abs=1e-12)


@given(TOKENS)
def test_k3_is_never_negative_and_the_sample_size_is_a_share(tokens):
    for name, value in seen(*zip(*tokens, strict=True)).metrics().items():
        if name.startswith("mismatch_k3"):
            assert value >= 0
        if name.startswith(("mismatch_ess", "mismatch_outside")):
            assert 0 <= value <= 1 + 1e-12


def test_one_wild_token_leaves_the_sums_finite():
    metrics = seen([900.0, 0.0], sampler=-950.0).metrics()
    assert all(np.isfinite(list(metrics.values())))
    assert metrics["mismatch_max"] == 900
    assert metrics["mismatch_ess"] == pytest.approx(0.5)


# --- the judge


def verdict(k3, **settings):
    return judge({"mismatch_k3": k3}, LearnerConfig(**settings))


def test_little_mismatch_passes_in_silence():
    assert verdict(0.0) is None
    assert verdict(1e-3) is None, "at the threshold is not above it"


def test_more_is_warned_of_with_the_value_and_the_way_out():
    warning = verdict(2e-3)
    for part in ("mismatch_k3 = 0.002", "learner.mismatch_warn = 0.001", "--learner.mismatch-warn", "0 for never"):
        assert part in warning
    assert "\n" not in warning


def test_too_much_ends_the_run_with_the_value_and_the_way_out():
    with pytest.raises(LearnerError) as caught:
        verdict(0.02)
    for part in ("mismatch_k3 = 0.02 ", "learner.mismatch_stop = 0.01", "--learner.mismatch-stop", "0 for never"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zero_switches_a_threshold_off():
    assert "mismatch_warn" in verdict(5.0, mismatch_stop=0)
    assert verdict(5.0, mismatch_stop=0, mismatch_warn=0) is None
    assert verdict(5e-3, mismatch_warn=0) is None
    with pytest.raises(LearnerError):
        verdict(5.0, mismatch_warn=0)


@pytest.mark.parametrize("k3", [float("nan"), float("inf"), None])
def test_what_is_not_a_number_is_warned_of_and_left_to_the_steps_own_guard(k3):
    assert "not a finite number" in verdict(k3)


@pytest.mark.parametrize("d", [np.nan, np.inf, -np.inf])
def test_log_probs_that_are_not_finite_reach_the_judge(d):
    metrics = seen([0.0, d]).metrics()
    assert not np.isfinite(metrics["mismatch_max"])
    if d != np.inf:
        assert "not a finite number" in judge(metrics, LearnerConfig())
    else:  # the policy is sure of a token that the sampler holds to be impossible: cut, and far above any threshold
        with pytest.raises(LearnerError):
            judge(metrics, LearnerConfig())
