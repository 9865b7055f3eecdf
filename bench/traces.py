"""Episodes of the length and shape that L0's have, made of random token ids: what the learner's benchmarks eat.

A run has one system prompt of 1,500-2,500 tokens; a group has a question of its own; an episode 3-8 turns, each a
response (median 300 tokens) and an output (median 200, 500 or 1,000, by run); groups have 4, 8 or 16 episodes. Lengths
are lognormal. The context of one episode in eight is cut once: the next prompt is system prompt, question and a notepad.
(L0: https://arxiv.org/abs/2506.23667; its contexts, turns and groups.)
"""

from collections.abc import Iterator
from itertools import product

import numpy as np

from l0fast.ids import Ids
from l0fast.types import Group, Task, Trajectory, TrajectoryStatus, Turn

RESPONSE_TOKENS = 300
"""Median."""
OUTPUT_TOKENS = (200, 500, 1000)
"""Medians, one a kind of run."""
GROUP_SIZES = (4, 8, 16)
SPREAD = 0.6
"""Sigma of the lognormal lengths: the 90th percentile is 2.2 times the median."""
TRIM_SHARE = 1 / 8
"""Of the episodes."""


def runs(vocabulary: int, seed: int, groups_per_run: int) -> Iterator[list[Group]]:
    """The mix: groups of every pair of output length and group size."""
    for i, (output_tokens, group_size) in enumerate(product(OUTPUT_TOKENS, GROUP_SIZES)):
        rng = np.random.default_rng([seed, i])
        system = _ids(rng, vocabulary, int(rng.integers(1500, 2501)))
        yield [group(rng, vocabulary, system, output_tokens, group_size, g) for g in range(groups_per_run)]


def group(
    rng: np.random.Generator, vocabulary: int, system: tuple[int, ...], output_tokens: int, group_size: int, number: int
) -> Group:
    task = Task(id=f"t{number}", question="?", answers=("a",))
    prompt = Ids(system) + _ids(rng, vocabulary, _length(rng, 60))
    episodes = tuple(_episode(rng, vocabulary, task, i, prompt, output_tokens) for i in range(group_size))
    return Group(task=task, trajectories=episodes, number=number)


def _episode(
    rng: np.random.Generator, vocabulary: int, task: Task, index: int, first_prompt: Ids, output_tokens: int
) -> Trajectory:
    num_turns = int(rng.integers(3, 9))
    trim_at = int(rng.integers(2, num_turns)) if rng.random() < TRIM_SHARE else None
    turns, prompt = [], first_prompt
    for t in range(num_turns):
        if t == trim_at:
            prompt = first_prompt + _ids(rng, vocabulary, _length(rng, RESPONSE_TOKENS))
        response = _ids(rng, vocabulary, _length(rng, RESPONSE_TOKENS))
        turns.append(
            Turn(
                prompt_ids=prompt,
                response_ids=Ids(response),
                # of a policy that knows nothing
                sampler_logprobs=(-float(np.log(vocabulary)),) * len(response),
                finish_reason="stop",
                policy_version=0,
                text="",
                output="",
                well_formed=True,
            )
        )
        prompt = prompt + response + _ids(rng, vocabulary, _length(rng, output_tokens))
    rewards = [0.0] * (num_turns - 1) + [float(rng.random() < 0.5)]
    return Trajectory(
        task=task,
        index=index,
        status=TrajectoryStatus.COMPLETED,
        turns=tuple(turns),
        rewards=tuple(rewards),
        correct=rewards[-1] == 1.0,
    )


def _length(rng: np.random.Generator, median: int) -> int:
    return max(4, round(float(rng.lognormal(np.log(median), SPREAD))))


def _ids(rng: np.random.Generator, vocabulary: int, n: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, vocabulary, n).tolist())
