"""How much better than expected a turn was. Pure functions of rewards; a step has a few hundred numbers.

    REINFORCE++      R_t = r_t + gamma R_{t+1};  A = (R - mean) / (std + 1e-8) over all turns of the batch, one vote a turn
                     Hu, "REINFORCE++", https://arxiv.org/abs/2501.03262, over turns as in L0, https://arxiv.org/abs/2506.23667
    group-relative   A = (R - mean) / (std + 1e-8) within the group, the same for every turn of an episode (GRPO)
                     Shao et al., "DeepSeekMath", https://arxiv.org/abs/2402.03300, section 4.1
    centred          A = R - mean within the group: no division, which would favour the groups that nearly agree (Dr. GRPO)
                     Liu et al., "Understanding R1-Zero-Like Training", https://arxiv.org/abs/2503.20783, section 3.2
    leave-one-out    A = R - mean of the others of the group (RLOO)
                     Ahmadian et al., "Back to Basics", https://arxiv.org/abs/2402.14740; Kool et al., 2019
    running mean     A = R - b, b the decaying mean of what earlier steps earned, so that it knows nothing of the actions it
                     is a baseline for, and the gradient stays unbiased (Williams, 1992); leave-one-out before there is one
    GAE              delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  return = A + V
                     Schulman et al., https://arxiv.org/abs/1506.02438, over turns as in L0, whitened like REINFORCE++

All standard deviations are unbiased, which leaves them undefined for one number: where there is nothing to compare with
the advantage is 0. Failed trajectories are not looked at: they have no vote and no tokens in the loss.

What looks at one group only (`streams`) can be trained on as groups finish, in any order, with the same result.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from l0fast.config import LearnerConfig
from l0fast.types import Group, Trajectory

EPSILON = 1e-8
"""Added to a standard deviation before dividing by it."""
MEMORY = 0.8
"""Share of the running mean that is kept at a step: about the last five steps count."""

Values = Sequence[Sequence[Sequence[float] | np.ndarray]]
"""[group][trajectory] -> [turns]: what the critic expects from a turn on, itself included."""


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


def centre(rewards: np.ndarray) -> np.ndarray:
    """[n] -> [n]: each reward minus the mean of all; 0 for one alone."""
    return rewards - rewards.mean() if len(rewards) else rewards


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """[n] -> [n]: each reward minus the mean of the others; 0 for one alone."""
    n = len(rewards)
    return np.zeros_like(rewards) if n < 2 else (rewards - rewards.mean()) * n / (n - 1)


def gae(
    rewards: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimates of one episode's turns.

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


@dataclass(slots=True, kw_only=True)
class RunningMean:
    """The baseline of "running_mean". It moves between steps only, so a step's advantages don't depend on who finished first."""

    total: float = 0.0
    weight: float = 0.0
    """Of the steps in `total`; below 1 at first, and dividing by it keeps the start from counting as 0."""

    @property
    def baseline(self) -> float | None:
        """None before the first step."""
        return self.total / self.weight if self.weight else None

    def observe(self, groups: Sequence[Group]) -> None:
        """Take in what a step's trajectories earned, one vote each, after that step's advantages were computed."""
        rewards = [trajectory.reward for group in groups for trajectory in group.trajectories]
        if rewards:
            # fsum: the same sum in any order
            self.total = MEMORY * self.total + (1 - MEMORY) * math.fsum(rewards) / len(rewards)
            self.weight = MEMORY * self.weight + (1 - MEMORY)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, float]) -> "RunningMean":
        return cls(**state)


def streams(config: LearnerConfig) -> bool:
    """Whether a group can be trained on when it is done: its advantages are the same alone as in its step's batch, and it is
    in the same optimizer step whatever order groups finish in."""
    whitens = config.advantage in ("reinforce_pp", "gae") and config.whiten == "batch"
    # which groups are in which of several steps is known when all are there
    return not whitens and not config.permute_advantages and config.minibatches == 1


def compute_advantages(
    groups: Sequence[Group],
    config: LearnerConfig,
    rng: np.random.Generator,
    *,
    running: RunningMean | None = None,
    values: Values | None = None,
) -> list[list[np.ndarray]]:
    """Advantages of a batch: [group][trajectory] -> [turns] float64. `group.failures` are not in it.

    With `permute_advantages`, what one trajectory earned goes, whole, to another, drawn over the entire batch: the same
    numbers, nothing to learn. Where the receiver has more turns than the giver the first number is repeated in front,
    where it has fewer the first ones are left out, so that the last turn's goes to a last turn. Whitening comes after,
    so that the mean over turns is 0 as ever and permuted advantages neither encourage nor discourage on the whole.

    Args:
        rng: used by `permute_advantages` alone.
        running: the baseline; needed by "running_mean" alone, and not changed.
        values: of the critic; needed by "gae" alone.

    Raises:
        ValueError: a trajectory without one reward a turn, or (gae) one value a turn; no `running` or `values` where needed.
    """
    _check_rewards(groups)
    match config.advantage:
        case "reinforce_pp":
            per_turn = [discounted_returns(t.rewards, config.gamma) for group in groups for t in group.trajectories]
        case "gae":
            per_turn = [advantages for advantages, _ in _gae_over_turns(groups, config, values)]
        case "group" | "dr_grpo" | "rloo" | "running_mean":
            per_turn = [turns for group in groups for turns in _compare(group, config, running)]
    if config.permute_advantages:
        givers = rng.permutation(len(per_turn))
        per_turn = [_stretch(per_turn[giver], len(own)) for giver, own in zip(givers, per_turn, strict=True)]
    if config.advantage in ("reinforce_pp", "gae") and config.whiten == "batch" and per_turn:
        ends = np.cumsum([len(turns) for turns in per_turn])
        per_turn = np.split(normalise(np.concatenate(per_turn)), ends[:-1])
    return _by_group(per_turn, groups)


def critic_targets(groups: Sequence[Group], config: LearnerConfig, values: Values | None) -> list[list[np.ndarray]]:
    """What the critic should have said of each turn: GAE's returns, indexed as `compute_advantages` is. Raises as it does."""
    _check_rewards(groups)
    return _by_group([returns for _, returns in _gae_over_turns(groups, config, values)], groups)


def number_turns(groups: Sequence[Group]) -> list[list[np.ndarray]]:
    """All turns of a batch, counted through, indexed as `compute_advantages` is.

    Laid out in packs in place of advantages, they say which turn each sampled token belongs to.
    """
    per_trajectory = [trajectory for group in groups for trajectory in group.trajectories]
    ends = np.cumsum([len(trajectory.turns) for trajectory in per_trajectory], dtype=int)
    numbers = [np.arange(end - len(t.turns), end, dtype=float) for t, end in zip(per_trajectory, ends, strict=True)]
    return _by_group(numbers, groups)


def values_of_turns(groups: Sequence[Group], turn_numbers: np.ndarray, token_values: np.ndarray) -> Values:
    """What the critic said at the first token of each turn, having read all that came before; 0 for a turn without tokens.

    Args:
        turn_numbers: [tokens], of `number_turns`, as they lie in packs (exact in float32 up to 16 million turns).
        token_values: [tokens], in the same order, a turn's tokens in theirs.
    """
    numbers = number_turns(groups)
    flat = np.zeros(sum(len(turns) for group in numbers for turns in group))
    turns, first = np.unique(turn_numbers.astype(int), return_index=True)
    flat[turns] = token_values[first]
    return [[flat[turns.astype(int)] for turns in group] for group in numbers]


def _compare(group: Group, config: LearnerConfig, running: RunningMean | None) -> list[np.ndarray]:
    """Episodes against each other or against the running mean; every turn of an episode gets its episode's."""
    rewards = np.array([trajectory.reward for trajectory in group.trajectories], np.float64)
    if config.advantage == "running_mean":
        if running is None:
            raise ValueError("learner.advantage = 'running_mean' has no running mean; pass the one the run keeps")
        scores = leave_one_out(rewards) if running.baseline is None else rewards - running.baseline
    else:
        scores = {"group": normalise, "dr_grpo": centre, "rloo": leave_one_out}[config.advantage](rewards)
    return [np.full(len(t.turns), score) for t, score in zip(group.trajectories, scores, strict=True)]


def _gae_over_turns(
    groups: Sequence[Group], config: LearnerConfig, values: Values | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    if values is None:
        raise ValueError("learner.advantage = 'gae' has no values; ask the critic for one a turn first")
    pairs = [
        (trajectory, of_turns)
        for group, per_trajectory in zip(groups, values, strict=True)
        for trajectory, of_turns in zip(group.trajectories, per_trajectory, strict=True)
    ]
    for trajectory, of_turns in pairs:
        if len(of_turns) != len(trajectory.turns):
            raise ValueError(
                f"{_name(trajectory)} has {len(trajectory.turns)} turns but {len(of_turns)} values; give each one"
            )
    return [gae(trajectory.rewards, of_turns, config.gamma, config.gae_lambda) for trajectory, of_turns in pairs]


def _by_group(per_trajectory: Sequence[np.ndarray], groups: Sequence[Group]) -> list[list[np.ndarray]]:
    remaining = iter(per_trajectory)
    return [[next(remaining) for _ in group.trajectories] for group in groups]


def _stretch(values: np.ndarray, length: int) -> np.ndarray:
    """The last `length` values; the first is repeated in front if there are fewer. A giver without turns gives 0."""
    if not len(values):
        return np.zeros(length)
    return np.concatenate([np.full(max(length - len(values), 0), values[0]), values[max(len(values) - length, 0) :]])


def _check_rewards(groups: Sequence[Group]) -> None:
    for trajectory in (t for group in groups for t in group.trajectories):
        if len(trajectory.rewards) != len(trajectory.turns):
            raise ValueError(
                f"{_name(trajectory)} has {len(trajectory.turns)} turns but {len(trajectory.rewards)} rewards; "
                "score it before training on it"
            )


def _name(trajectory: Trajectory) -> str:
    return f"trajectory {trajectory.index} of task {trajectory.task.id!r}"
