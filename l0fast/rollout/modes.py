"""Which groups may begin, and which of them a step learns from: the three modes of a run. Pure: no tasks, no clock.

    admit -> (played) -> take -> close -> learned          synced: the engine has new weights
             |- untaken ---|      a step       |
             |- open --------------------------|

                  tokens are at most   groups begin               the engine takes new weights
    on_policy     0 versions old       for this step alone        when a step is learned; nothing is being played then
    one_step_off  1 version old        for the next step alone,   when the next step has all its groups, so that each
                                       while this one is learned  step is sampled by one policy, that of the step before
    carry_over    `max_staleness`      at any time                when a step is learned; what is being played goes on

The age of a token is counted when it is trained on: optimizer steps taken since the weights that sampled it. A group
admitted while the engine has version v holds nothing older, so the last step that may learn from it is v + bound: there it
is *due*. Two rules keep every group within its bound, and nothing has to be thrown away for being late:

    admit  only while all that no step has taken, this group included, fits into the steps up to the one where it is due
    take   what is finished, lowest number first, as long as the rest still fits into the steps left before each is due

(Hall's condition for unit jobs with deadlines; dues rise with the numbers, so it is enough to look at prefixes.) So when a
step comes whose groups are all due, it waits for them, stragglers included. With a bound of 0 that is each step.

Is that fair to long episodes? Taking what finished first selects short ones where the late are dropped; here none is, each
group that is admitted is learned from exactly once, and its length decides only in which of the bound + 1 steps. That
shifts lengths within these steps and no further: the first step of a run is made of shorter ones, and later steps of what
was admitted, in its proportions. Nor does the end select: where the number of steps is known, the last one is a due date
for all, and no more is admitted than the steps left can take. A straggler can't hold the run up for ever: an episode has a
deadline, and a place that keeps failing ends the run.

Simulated with L0's batch (64 x 4, 1-8 turns, responses lognormal around 300 tokens, learner 30 % of generation, an engine
with half as many slots as a batch has episodes): on_policy keeps 40 % of the slots busy; carry_over with
max_open_groups = 1.5 steps and a bound of 1: 69 %; 2 steps and 2: 91 %; 3 steps and 3: 99 %. The mean age is about
max_open_groups / groups_per_step - 1. In the order of admission alone, 2 steps of open groups give 76 %, and 3 steps 96 %.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

ModeName = Literal["on_policy", "carry_over", "one_step_off"]


@dataclass(frozen=True, slots=True)
class Mode:
    staleness: int
    """Policy versions between the weights that sampled a token and those that a step on it starts from, at most."""
    steps_ahead: int
    """Steps beyond the one being filled that groups may be admitted for."""
    sync: Literal["learned", "taken"]
    """When the engine takes the newest weights: once they are made, or once the step after has all its groups."""


def mode_of(name: ModeName, max_staleness: int) -> Mode:
    match name:
        case "on_policy":
            return Mode(staleness=0, steps_ahead=0, sync="learned")
        case "one_step_off":
            return Mode(staleness=1, steps_ahead=0, sync="taken")
        case "carry_over":
            return Mode(staleness=max_staleness, steps_ahead=max_staleness, sync="learned")


class Schedule:
    """The books of one run's groups. Numbers are admitted in rising order."""

    def __init__(
        self,
        mode: ModeName = "on_policy",
        *,
        groups_per_step: int,
        max_open_groups: int,
        max_staleness: int = 0,
        num_steps: int | None = None,
        step: int = 0,
        position: int = 0,
        consumed: Iterable[int] = (),
    ):
        """
        Args:
            max_open_groups: groups admitted and not yet learned from, at most; no less than `groups_per_step`.
            max_staleness: the bound of carry_over [policy versions].
            num_steps: of the whole run; None for one that has no last step.
            step: optimizer steps taken so far; the engine has their weights.
            position, consumed: of the run that this one goes on with.
        """
        if max_open_groups < groups_per_step:
            raise ValueError(
                f"max_open_groups = {max_open_groups} is less than groups_per_step = {groups_per_step}, so no step could "
                "ever fill: raise it to that or more"
            )
        self.mode = mode_of(mode, max_staleness)
        self.groups_per_step, self.max_open_groups = groups_per_step, max_open_groups
        self.step = self.version = step
        """Number of the step being filled (steps before it), and of the weights that the engine has."""
        self.position = position
        """Number of the first group that no closed step has learned from or dropped."""
        self.consumed = frozenset(consumed)
        """Numbers above it that one has."""
        self._last = None if num_steps is None else num_steps - 1
        self._due: dict[int, int] = {}  # untaken number -> the last step that may learn from it
        self._num_due: Counter[int] = Counter()  # that step -> how many of them
        self._taken: list[int] = []
        self._gone: list[int] = []  # dropped while this step was filled
        self._learning = 0

    @property
    def open(self) -> int:
        """Groups admitted and not yet learned from or dropped."""
        return len(self._due) + len(self._taken) + self._learning

    @property
    def full(self) -> bool:
        """Whether the step has its groups."""
        return len(self._taken) == self.groups_per_step

    def may_admit(self) -> bool:
        """Whether there is room for another group, and a step that may learn from it."""
        steps = min(self.mode.steps_ahead, self._due_if_admitted() - self.step) + 1
        return self.open < self.max_open_groups and len(self._due) + len(self._taken) < steps * self.groups_per_step

    def admit(self, number: int) -> int:
        """Begin a group; it has nothing older than the version that this returns."""
        self._due[number] = due = self._due_if_admitted()
        self._num_due[due] += 1
        return self.version

    def may_take(self, number: int) -> bool:
        """Whether the step may learn from this group, and all others still come before they are due."""
        if self.full:
            return False
        slots, untaken = self.groups_per_step - len(self._taken) - 1, 0
        for due, count in sorted(self._num_due.items()):
            untaken += count - (due == self._due[number])
            if untaken > slots + (due - self.step) * self.groups_per_step:
                return False
        return True

    def take(self, number: int) -> None:
        """The step learns from this group."""
        self._leaves(number)
        self._taken.append(number)

    def drop(self, number: int) -> None:
        """No step does."""
        self._leaves(number)
        self._gone.append(number)

    def close(self) -> None:
        """The step has its groups: from now on the next one is filled."""
        consumed = self.consumed.union(self._taken, self._gone)
        while self.position in consumed:
            self.position += 1
        self.consumed = frozenset(number for number in consumed if number > self.position)
        self._learning += len(self._taken)
        self._taken, self._gone = [], []
        self.step += 1

    def learned(self) -> None:
        """The learner has consumed all groups of closed steps."""
        self._learning = 0

    def synced(self, version: int) -> None:
        """The engine has these weights."""
        self.version = version

    def _leaves(self, number: int) -> None:
        due = self._due.pop(number)
        self._num_due[due] -= 1
        if not self._num_due[due]:
            del self._num_due[due]

    def _due_if_admitted(self) -> int:
        due = self.version + self.mode.staleness
        return due if self._last is None else min(due, self._last)
