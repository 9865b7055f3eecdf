"""What is to happen, soonest first: as a list that is sorted anew each time has it."""

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from l0fast.engine.schedule import Schedule

TIMES = st.sampled_from([-1.0, -0.0, 0.0, 1, 2.0, 2.5, 7.0, math.inf]) | st.floats(allow_nan=False)


class Schedules(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.schedule, self.added, self.entries = Schedule(), 0, []

    @rule(at=TIMES)
    def add(self, at):
        self.schedule.add(at, self.added)
        # sort is stable: what was added first stays first
        self.entries = sorted([*self.entries, (at, self.added)], key=lambda entry: entry[0])
        self.added += 1

    @rule(by=TIMES)
    def take(self, by):
        due = bool(self.entries) and self.entries[0][0] <= by
        assert self.schedule.take(by) == (self.entries.pop(0)[1] if due else None)

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def remove(self, data):
        entry = data.draw(st.sampled_from(self.entries))
        self.schedule.remove(entry[1])
        self.entries.remove(entry)

    @rule()
    def remove_what_is_not_there(self):
        with pytest.raises(ValueError, match="not in list"):
            self.schedule.remove(self.added)

    @rule()
    def clear(self):
        self.schedule.clear()
        self.entries.clear()

    @invariant()
    def the_first_one_is_shown(self):
        at, thing = self.entries[0] if self.entries else (math.inf, None)
        assert (self.schedule.next_at(), self.schedule.first()) == (at, thing)


TestSchedules = Schedules.TestCase
