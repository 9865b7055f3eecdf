"""Dynamic sampling: which finished groups a step learns from. Pure: no tasks, no clock; randomness is passed in.

A group whose exact matches are all equal carries no group-relative signal. It is dropped with probability `drop_rate`
and another task is played in its place, until `max_drops` were dropped in this step (L0's "filter groups": 0.5, at most
3 rounds; DAPO, arXiv 2503.14476, section 3.2, drops all of them). Groups are judged when complete, so a short episode is
no more likely to be kept than a long one.
"""

import random
from dataclasses import dataclass, field

from l0fast.types import Group


@dataclass(slots=True)
class DynamicSampling:
    drop_rate: float
    max_drops: int
    """In one step [groups]."""
    rng: random.Random
    dropped: int = field(default=0, init=False)
    """In this step so far [groups]."""

    def keep(self, group: Group) -> bool:
        """Whether the step learns from this group. Counts a group that it drops."""
        if not group.all_equal or self.dropped >= self.max_drops:
            return True
        if self.rng.random() >= self.drop_rate:
            return True
        self.dropped += 1
        return False

    def next_step(self) -> None:
        self.dropped = 0
