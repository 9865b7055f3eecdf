"""Dynamic sampling: which finished groups a step learns from. Pure: no tasks, no clock.

A group whose exact matches are all equal carries no group-relative signal. It is dropped with probability `drop_rate`
and another task is played in its place, until `max_drops` were dropped in this step (L0's "filter groups": 0.5, at most
3 rounds; DAPO, arXiv 2503.14476, section 3.2, drops all of them). Groups are judged when complete, so a short episode is
no more likely to be kept than a long one; the draw depends on the group's number, not on when it finished.
"""

import random
from dataclasses import dataclass, field

from l0fast.seeding import derive_seed
from l0fast.types import Group


@dataclass(slots=True)
class DynamicSampling:
    drop_rate: float
    max_drops: int
    """In one step [groups]."""
    seed: int
    dropped: int = field(default=0, init=False)
    """In this step so far [groups]."""

    def keep(self, group: Group) -> bool:
        """Whether the step learns from this group. Counts a group that it drops."""
        if not group.all_equal or self.dropped >= self.max_drops:
            return True
        if random.Random(derive_seed(self.seed, "keep", group.number)).random() >= self.drop_rate:
            return True
        self.dropped += 1
        return False

    def next_step(self) -> None:
        self.dropped = 0
