"""Dynamic sampling: which finished groups a step learns from. Pure: no tasks, no clock, no memory.

A group whose answers are all right or all wrong carries no group-relative signal. It is dropped with probability `drop_rate`
and another task is played in its place (L0's "filter groups": 0.5, at most 3 rounds; DAPO, arXiv 2503.14476, section 3.2,
drops all of them). Only the first `max_drops` groups played for a step may be dropped, so a step ends. Groups are judged
when complete, so a short episode is no more likely to be kept than a long one; the verdict depends on the group's number
and the first one that is not done with, on_policy the step's first, and not on when anything finished, so a run that goes on
after a kill judges as it would have.
"""

import random
from dataclasses import dataclass

from l0fast.seeding import derive_seed
from l0fast.types import Group


@dataclass(frozen=True, slots=True)
class DynamicSampling:
    drop_rate: float
    max_drops: int
    """In one step [groups]."""
    seed: int

    def keep(self, group: Group, first: int) -> bool:
        """Whether a step may learn from this one of the groups numbered `first` and up."""
        if not group.all_equal or group.number - first >= self.max_drops:
            return True
        return random.Random(derive_seed(self.seed, "keep", group.number)).random() >= self.drop_rate
