"""How much better than expected a turn was. Pure functions of rewards; a step has a few hundred numbers.

    REINFORCE++      R_t = r_t + gamma R_{t+1};  A = (R - mean) / (std + 1e-8) over all turns of the batch, one vote a turn
                     Hu, "REINFORCE++", https://arxiv.org/abs/2501.03262, over turns as in L0, https://arxiv.org/abs/2506.23667
    group-relative   A = (R - mean) / (std + 1e-8) within the group, the same for every turn of an episode (GRPO)
                     Shao et al., "DeepSeekMath", https://arxiv.org/abs/2402.03300, section 4.1
    leave-one-out    A = R - mean of the others of the group (RLOO)
                     Ahmadian et al., "Back to Basics", https://arxiv.org/abs/2402.14740; Kool et al., 2019
    GAE              delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  return = A + V
                     Schulman et al., https://arxiv.org/abs/1506.02438

All standard deviations are unbiased, which leaves them undefined for one number: where there is nothing to compare with
the advantage is 0. Failed trajectories are not looked at: they have no vote and no tokens in the loss.
"""

from collections.abc import Sequence

import numpy as np

from l0fast.config import LearnerConfig
from l0fast.types import Group, Trajectory

EPSILON = 1e-8
"""Added to a standard deviation before dividing by it."""


def discounted_returns(rewards: Sequence[float], gamma: float) -> np.ndarray:
    """[n] float64: R_t = r_t + gamma R_{t+1}, for each of n turns."""
    returns = np.array(rewards, np.float64)
    for t in reversed(range(len(returns) - 1)):
        returns[t] += gamma * returns[t + 1]
    return returns


def normalise(values: np.ndarray) -> np.ndarray:
    """[n] -> [n]: (x - mean) / (unbiased std + 1e-8). One number has nothing to be compared with and gives 0."""
    if len(values) < 2:
        return np.zeros_like(values)
    return (values - values.mean()) / (values.std(ddof=1) + EPSILON)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """[n] -> [n]: each reward minus the mean of the others; 0 for one alone."""
    n = len(rewards)
    return np.zeros_like(rewards) if n < 2 else (rewards - rewards.mean()) * n / (n - 1)


def gae(
    rewards: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimates of one episode's turns, or of one turn's tokens.

    Args:
        rewards, values: [n]; the value after the last is 0.

    Returns:
        advantages and returns (advantages + values), both [n] float64.
    """
    value = np.array(values, np.float64)
    advantages = np.zeros(len(rewards))
    following = 0.0
    for t in reversed(range(len(rewards))):
        next_value = value[t + 1] if t + 1 < len(value) else 0.0
        following = rewards[t] + gamma * next_value - value[t] + gamma * lam * following
        advantages[t] = following
    return advantages, advantages + value


def gae_over_tokens(
    turn_return: float, token_values: Sequence[float], gamma: float = 0.99, lam: float = 0.99
) -> tuple[np.ndarray, np.ndarray]:
    """GAE within one turn: the turn's return is the reward of its last token, the others earn nothing. [n], [n]"""
    rewards = np.zeros(len(token_values))
    if len(rewards):
        rewards[-1] = turn_return
    return gae(rewards, token_values, gamma, lam)


def compute_advantages(
    groups: Sequence[Group], config: LearnerConfig, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """Advantages of a batch: [group][trajectory] -> [turns] float64. `group.failures` are not in it.

    With `permute_advantages`, what one trajectory earned goes, whole, to another, drawn over the entire batch: the same
    numbers, nothing to learn. Where the receiver has more turns than the giver the first number is repeated in front,
    where it has fewer the first ones are left out, so that the last turn's goes to a last turn. Whitening comes after,
    so that the mean over turns is 0 as ever and permuted advantages neither encourage nor discourage on the whole.

    Args:
        rng: used by `permute_advantages` alone.

    Raises:
        ValueError: a trajectory without one reward a turn.
    """
    per_turn = [turns for group in groups for turns in _before_whitening(group, config)]
    if config.permute_advantages:
        givers = rng.permutation(len(per_turn))
        per_turn = [_stretch(per_turn[giver], len(own)) for giver, own in zip(givers, per_turn, strict=True)]
    if config.advantage == "reinforce_pp" and config.whiten == "batch" and per_turn:
        ends = np.cumsum([len(turns) for turns in per_turn])
        per_turn = np.split(normalise(np.concatenate(per_turn)), ends[:-1])
    remaining = iter(per_turn)
    return [[next(remaining) for _ in group.trajectories] for group in groups]


def _before_whitening(group: Group, config: LearnerConfig) -> list[np.ndarray]:
    for trajectory in group.trajectories:
        _check_rewards(trajectory)
    if config.advantage == "reinforce_pp":
        return [discounted_returns(trajectory.rewards, config.gamma) for trajectory in group.trajectories]
    rewards = np.array([trajectory.reward for trajectory in group.trajectories], np.float64)
    scores = normalise(rewards) if config.advantage == "group" else leave_one_out(rewards)
    return [np.full(len(t.turns), score) for t, score in zip(group.trajectories, scores, strict=True)]


def _stretch(values: np.ndarray, length: int) -> np.ndarray:
    """The last `length` values; the first is repeated in front if there are fewer. A giver without turns gives 0."""
    if not len(values):
        return np.zeros(length)
    return np.concatenate([np.full(max(length - len(values), 0), values[0]), values[max(len(values) - length, 0) :]])


def _check_rewards(trajectory: Trajectory) -> None:
    if len(trajectory.rewards) != len(trajectory.turns):
        raise ValueError(
            f"trajectory {trajectory.index} of task {trajectory.task.id!r} has {len(trajectory.turns)} turns but "
            f"{len(trajectory.rewards)} rewards; score it before training on it"
        )
