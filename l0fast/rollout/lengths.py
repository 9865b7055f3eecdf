"""How long an episode of a task will be, from those played before: long ones begin first. Pure.

What begins last decides when a step ends, so of groups admitted at once those begin first that will take longest (Graham,
"Bounds on multiprocessing timing anomalies", 1969: within 4/3 of the best schedule when lengths are known). Only the order
changes: which groups are admitted, and which a step learns from, does not look at lengths.

    expected(task) = decaying mean of the task's own trajectories, else of its kind's, else of all
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from l0fast.types import Task, Trajectory

MEMORY = 0.7
"""Share of the mean that is kept when a trajectory comes in: a policy under training changes its ways."""
MAX_TASKS = 100_000
"""Tasks remembered; those heard of least recently go first [tasks]."""


@dataclass(slots=True)
class Lengths:
    _by_task: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _by_kind: dict[str, float] = field(default_factory=dict)
    _overall: float | None = None

    def observe(self, trajectory: Trajectory) -> None:
        """Take in how many tokens an episode sampled. What failed was not played to its end."""
        if trajectory.status.failed:
            return
        task, tokens = trajectory.task, float(sum(len(turn.response_ids) for turn in trajectory.turns))
        self._by_task[task.id] = _mean(self._by_task.get(task.id), tokens)
        self._by_task.move_to_end(task.id)
        if len(self._by_task) > MAX_TASKS:
            self._by_task.popitem(last=False)
        self._by_kind[task.kind] = _mean(self._by_kind.get(task.kind), tokens)
        self._overall = _mean(self._overall, tokens)

    def expected(self, task: Task) -> float:
        """Of one episode; 0 before anything is known [tokens]."""
        return self._by_task.get(task.id, self._by_kind.get(task.kind, self._overall or 0.0))

    def long_first(self, admitted: Sequence[tuple[int, Task]]) -> Sequence[tuple[int, Task]]:
        """Numbered tasks, the longest first; those of equal length as they were."""
        return sorted(admitted, key=lambda pair: -self.expected(pair[1]))


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else MEMORY * mean + (1 - MEMORY) * value
