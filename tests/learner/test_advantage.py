"""Advantages: L0's golden numbers, hand-computed ones, the deviations from L0 that are meant, and the control."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.config import LearnerConfig
from l0fast.learner.advantage import (
    compute_advantages,
    discounted_returns,
    gae,
    gae_over_tokens,
    leave_one_out,
    normalise,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "l0_golden.json").read_text())["reinforce_pp"]
TOLERANCE = {"rtol": 0, "atol": 1e-6}


def episodes(make, *rewards):
    """A group with an episode for each list of rewards of turns."""
    turn = make.turn([1], [2])
    return make.group([make.trajectory([turn] * len(r), r, i) for i, r in enumerate(rewards)])


def advantages(groups, seed=0, **settings):
    return compute_advantages(groups, LearnerConfig(**settings), np.random.default_rng(seed))


def test_returns_and_whitening_are_those_of_l0(make):
    rewards = [t["step_level_rewards"] for t in GOLDEN["trajs"]]
    for ours, theirs in zip(rewards, GOLDEN["returns"], strict=True):
        np.testing.assert_allclose(discounted_returns(ours, GOLDEN["gamma"]), theirs, **TOLERANCE)
    # two groups: the statistics are those of the batch
    groups = [episodes(make, *rewards[:2]), episodes(make, *rewards[2:])]
    flat = [turns for group in advantages(groups) for turns in group]
    for ours, theirs in zip(flat, GOLDEN["whitened"], strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_gae_over_turns_is_that_of_l0():
    for episode, adv, ret in zip(GOLDEN["trajs"], GOLDEN["gae_adv"], GOLDEN["gae_ret"], strict=True):
        ours = gae(episode["step_level_rewards"], episode["step_level_values"], GOLDEN["gamma"], GOLDEN["lam"])
        np.testing.assert_allclose(ours[0], adv, **TOLERANCE)
        np.testing.assert_allclose(ours[1], ret, **TOLERANCE)


def test_gae_over_tokens_pays_the_turns_return_at_its_last_token():
    adv, ret = gae_over_tokens(1.0, [0.2, 0.5], gamma=0.9, lam=0.8)
    last = 1.0 - 0.5
    first = (0.9 * 0.5 - 0.2) + 0.9 * 0.8 * last
    np.testing.assert_allclose(adv, [first, last])
    np.testing.assert_allclose(ret, [first + 0.2, 1.0])
    assert len(gae_over_tokens(1.0, [])[0]) == 0


def test_with_lambda_one_and_no_critic_gae_is_the_discounted_return():
    rewards = [0.1, 0.0, 0.7]
    np.testing.assert_allclose(gae(rewards, [0.0] * 3, 0.9, 1.0)[0], discounted_returns(rewards, 0.9))


def test_one_turn_whitens_to_zero_where_l0_gives_nan(make):
    assert advantages([episodes(make, [0.9])])[0][0].tolist() == [0.0]


def test_equal_turns_whiten_to_zero(make):
    assert np.abs(np.concatenate(advantages([episodes(make, [0.3], [0.3], [0.3])])[0])).max() < 1e-6


def test_whitening_gives_each_turn_one_vote(make):
    flat = np.concatenate(advantages([episodes(make, [0.1, 0.2, 0.3], [1.0])])[0])
    assert flat.mean() == pytest.approx(0, abs=1e-12)
    assert flat.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_without_whitening_the_returns_are_the_advantages(make):
    (group,) = advantages([episodes(make, [0.0, 1.0], [0.5])], whiten="none", gamma=0.5)
    assert [turns.tolist() for turns in group] == [[0.5, 1.0], [0.5]]


def test_group_relative_is_grpos(make):
    (group,) = advantages([episodes(make, [0.0, 1.0], [0.0], [0.5, 0.0])], advantage="group")
    # rewards 1, 0, .5: mean .5, unbiased std .5; every turn of an episode gets its episode's
    for turns, expected in zip(group, [[1, 1], [-1], [0, 0]], strict=True):
        np.testing.assert_allclose(turns, expected, atol=1e-7)


def test_leave_one_out_compares_with_the_others(make):
    (group,) = advantages([episodes(make, [1.0], [0.0], [0.5])], advantage="rloo")
    np.testing.assert_allclose(np.concatenate(group), [1 - 0.25, 0 - 0.75, 0.5 - 0.5], atol=1e-12)


def test_relative_advantages_do_not_look_at_other_groups(make):
    small, large = episodes(make, [0.0], [0.1]), episodes(make, [100.0], [300.0])
    for advantage in ("group", "rloo"):
        alone = advantages([small], advantage=advantage)[0]
        together = advantages([small, large], advantage=advantage)[0]
        np.testing.assert_array_equal(np.concatenate(alone), np.concatenate(together))


@pytest.mark.parametrize("alone", [normalise, leave_one_out])
def test_nobody_to_compare_with_gives_zero(alone):
    assert alone(np.array([0.7])).tolist() == [0.0]
    assert len(alone(np.array([]))) == 0


def test_failed_episodes_have_no_vote(make):
    group = episodes(make, [0.0], [1.0])
    lost = make.trajectory([make.turn([1], [2])], [50.0], 2)
    with_failure = make.group(group.trajectories, failures=[lost])
    assert len(advantages([with_failure])[0]) == 2
    np.testing.assert_array_equal(advantages([with_failure])[0], advantages([group])[0])


def test_an_unscored_trajectory_is_refused(make):
    group = make.group([make.trajectory([make.turn([1], [2])], [])])
    with pytest.raises(ValueError, match="1 turns but 0 rewards; score it"):
        advantages([group])


# --- the control


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 100))
def test_permuted_advantages_fit_their_episodes_and_average_to_nothing(make, turn_counts, seed):
    group = episodes(make, *[[i + t / 10 for t in range(n)] for i, n in enumerate(turn_counts)])
    (permuted,) = advantages([group], seed=seed, permute_advantages=True)
    assert [len(turns) for turns in permuted] == turn_counts
    assert np.concatenate(permuted).mean() == pytest.approx(0, abs=1e-9)


def test_permuting_episodes_of_equal_length_only_exchanges_them(make):
    groups = [episodes(make, *[[10 * g + i, 10 * g + i + 0.5] for i in range(4)]) for g in range(3)]
    own = [tuple(turns) for group in advantages(groups, whiten="none") for turns in group]
    permuted = [tuple(t) for group in advantages(groups, whiten="none", permute_advantages=True) for t in group]
    assert permuted != own
    assert sorted(permuted) == sorted(own)
    crossed = [abs(a[0] - b[0]) > 5 for a, b in zip(permuted, own, strict=True)]
    assert any(crossed), "advantages cross groups"


def test_a_permuted_vector_is_aligned_at_the_last_turn(make):
    group = episodes(make, [1.0, 2.0, 3.0], [7.0])
    seen = {
        tuple(map(tuple, advantages([group], seed=seed, whiten="none", gamma=0, permute_advantages=True)[0]))
        for seed in range(20)
    }
    assert seen == {((1.0, 2.0, 3.0), (7.0,)), ((7.0, 7.0, 7.0), (3.0,))}


def test_permuted_rewards_are_unrelated_to_the_episode(make):
    rng = np.random.default_rng(1)
    groups = [episodes(make, *[[float(r)] for r in rng.integers(0, 2, 8)]) for _ in range(64)]
    own = np.concatenate([turns for group in advantages(groups) for turns in group])
    permuted = np.concatenate([turns for group in advantages(groups, permute_advantages=True) for turns in group])
    # 512 pairs: the standard error of a correlation of 0 is 0.044
    assert abs(np.corrcoef(own, permuted)[0, 1]) < 0.15
