"""Advantages: L0's golden numbers, hand-computed ones, the deviations from L0 that are meant, what streams, and the control."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.config import LearnerConfig, RunConfig
from l0fast.learner.advantage import (
    MEMORY,
    RunningMean,
    centre,
    compute_advantages,
    critic_targets,
    discounted_returns,
    gae,
    leave_one_out,
    normalise,
    number_turns,
    streams,
    values_of_turns,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "l0_golden.json").read_text())["reinforce_pp"]
TOLERANCE = {"rtol": 0, "atol": 1e-6}


def episodes(make, *rewards):
    """A group with an episode for each list of rewards of turns."""
    turn = make.turn([1], [2])
    return make.group([make.trajectory([turn] * len(r), r, i) for i, r in enumerate(rewards)])


def advantages(groups, seed=0, running=None, values=None, **settings):
    rng = np.random.default_rng(seed)
    return compute_advantages(groups, LearnerConfig(**settings), rng, running=running, values=values)


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


def test_dr_grpo_centres_and_does_not_divide(make):
    (group,) = advantages([episodes(make, [1.0, 1.0], [0.0], [0.4])], advantage="dr_grpo")
    for turns, expected in zip(group, [[1.2, 1.2], [-0.8], [-0.4]], strict=True):
        np.testing.assert_allclose(turns, expected, atol=1e-12)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=16))
def test_within_a_group_advantages_cancel_and_the_three_kinds_are_multiples_of_each_other(rewards):
    rewards = np.array(rewards)
    n = len(rewards)
    for advantages_of in (normalise, centre, leave_one_out):
        assert advantages_of(rewards).sum() == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(leave_one_out(rewards), centre(rewards) * n / (n - 1), atol=1e-12)
    others = [(rewards.sum() - r) / (n - 1) for r in rewards]
    np.testing.assert_allclose(leave_one_out(rewards), rewards - others, atol=1e-9)
    np.testing.assert_allclose(normalise(rewards) * (rewards.std(ddof=1) + 1e-8), centre(rewards), atol=1e-12)


@pytest.mark.parametrize("alone", [normalise, centre, leave_one_out])
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


# --- a running mean


def test_the_running_mean_is_of_earlier_steps_only(make):
    running = RunningMean()
    assert running.baseline is None
    running.observe([episodes(make, [0.0, 1.0], [0.5]), episodes(make, [0.0])])
    assert running.baseline == pytest.approx(0.5), "the first step's mean, not a part of it"
    running.observe([episodes(make, [2.0])])
    assert running.baseline == pytest.approx((MEMORY * 0.5 + 2.0) / (MEMORY + 1))
    before = running.baseline
    (group,) = advantages([episodes(make, [1.0, 1.0], [0.0])], advantage="running_mean", running=running)
    for turns, expected in zip(group, [[2 - before] * 2, [-before]], strict=True):
        np.testing.assert_allclose(turns, expected)
    assert running.baseline == before, "computing advantages does not move it"


def test_the_first_step_is_compared_with_its_own_others(make):
    group = episodes(make, [1.0], [0.0], [0.5])
    first = advantages([group], advantage="running_mean", running=RunningMean())
    np.testing.assert_array_equal(first, advantages([group], advantage="rloo"))


def test_a_step_that_lost_all_its_episodes_leaves_the_running_mean_where_it_was(make):
    running = RunningMean(total=0.1, weight=0.2)
    running.observe([make.group([])])
    assert running.baseline == 0.5


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=6), st.randoms())
def test_a_restored_running_mean_goes_on_alike_and_the_order_of_groups_is_nothing_to_it(make, rewards, random):
    groups = [episodes(make, *[[r] for r in of_group]) for of_group in rewards]
    running = RunningMean()
    running.observe(groups)
    restored = RunningMean.from_state(json.loads(json.dumps(running.state())))
    assert restored == running
    running.observe(groups)
    random.shuffle(groups)
    restored.observe(groups)
    assert restored == running


def test_a_running_mean_that_nobody_keeps_is_refused(make):
    with pytest.raises(ValueError, match="pass the one the run keeps"):
        advantages([episodes(make, [1.0])], advantage="running_mean")


# --- a critic


def test_gae_is_computed_over_the_turns_and_whitened_over_the_batch(make):
    trajs = GOLDEN["trajs"]
    groups = [episodes(make, *[t["step_level_rewards"] for t in part]) for part in (trajs[:2], trajs[2:])]
    values = [[t["step_level_values"] for t in part] for part in (trajs[:2], trajs[2:])]
    settings = {"advantage": "gae", "gamma": GOLDEN["gamma"], "gae_lambda": GOLDEN["lam"]}
    plain = [turns for group in advantages(groups, values=values, whiten="none", **settings) for turns in group]
    for ours, theirs in zip(plain, GOLDEN["gae_adv"], strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    targets = [turns for group in critic_targets(groups, LearnerConfig(**settings), values) for turns in group]
    for ours, theirs in zip(targets, GOLDEN["gae_ret"], strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    whitened = [turns for group in advantages(groups, values=values, **settings) for turns in group]
    np.testing.assert_allclose(np.concatenate(whitened), normalise(np.concatenate(plain)))


def test_a_turns_value_is_that_of_its_first_token_wherever_its_row_was_packed(make):
    sampled = [[3, 1], [2], [0, 2]]  # tokens of each turn of each episode; one turn sampled nothing
    group = make.group([make.trajectory([make.turn([1], [2] * n) for n in turns]) for turns in sampled[:2]])
    groups = [group, make.group([make.trajectory([make.turn([1], [2] * n) for n in sampled[2]])])]
    numbers = number_turns(groups)
    assert [[turns.tolist() for turns in group] for group in numbers] == [[[0, 1], [2]], [[3, 4]]]
    # packed: the last group's episode, then the first one's second and first
    tokens = np.array([4, 4, 2, 2, 0, 0, 0, 1], np.float32)
    said = np.array([0.4, 9, 0.2, 9, 0.1, 9, 9, 0.3], np.float32)
    found = values_of_turns(groups, tokens, said)
    for ours, expected in zip([v for group in found for v in group], [[0.1, 0.3], [0.2], [0, 0.4]], strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_values_that_do_not_fit_are_refused(make):
    with pytest.raises(ValueError, match="ask the critic"):
        advantages([episodes(make, [1.0])], advantage="gae")
    with pytest.raises(ValueError, match="has 2 turns but 1 values"):
        advantages([episodes(make, [0.0, 1.0])], values=[[[0.5]]], advantage="gae")


def test_gae_without_a_critic_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"set --learner\.critic to head or copy"):
        RunConfig(learner=LearnerConfig(advantage="gae"))
    assert RunConfig(learner=LearnerConfig(advantage="gae", critic="head")).learner.critic == "head"


# --- what streams

EVERY_KIND = [
    {"advantage": advantage, **more}
    for advantage in ("reinforce_pp", "group", "dr_grpo", "rloo", "running_mean", "gae")
    for more in ({}, {"whiten": "none"}, {"permute_advantages": True})
]


@pytest.mark.parametrize("settings", EVERY_KIND, ids=str)
def test_what_streams_is_the_same_for_a_group_alone_as_in_its_batch_and_nothing_else_is(make, settings):
    rng = np.random.default_rng(0)
    groups = [episodes(make, *[rng.random(rng.integers(1, 4)).tolist() for _ in range(4)]) for _ in range(5)]
    values = [[rng.random(len(t.turns)) for t in group.trajectories] for group in groups]
    running = RunningMean(total=0.3, weight=0.5)
    together = advantages(groups, values=values, running=running, **settings)
    alone = [
        advantages([group], values=[v], running=running, **settings)[0] for group, v in zip(groups, values, strict=True)
    ]
    same = all(np.array_equal(np.concatenate(a), np.concatenate(b)) for a, b in zip(together, alone, strict=True))
    assert streams(LearnerConfig(**settings)) == same
    # which groups are in which of several optimizer steps is not to depend on which finish first
    assert not streams(LearnerConfig(**settings, minibatches=2))


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
