"""Schedule: what may begin, what a step learns from, and how old it is by then. No loop, no time."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.rollout.modes import ModeName, Schedule

seeds = st.integers(0, 2**32)
MODES: tuple[ModeName, ...] = ("on_policy", "carry_over", "one_step_off")


class Books:
    """A run that has no episodes: groups finish when `draw` says so."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.next = schedule.position
        self.playing: dict[int, int] = {}
        """Group -> version it was admitted under."""
        self.finished: dict[int, int] = {}
        self.steps: list[dict[int, int]] = [{}]
        """Of each step, group -> age when it was taken."""
        self.dropped: list[int] = []

    def admit(self) -> None:
        while self.schedule.may_admit():
            if self.next not in self.schedule.consumed:
                self.playing[self.next] = self.schedule.admit(self.next)
            self.next += 1
        assert self.schedule.open <= self.schedule.max_open_groups

    def finish(self, number: int, *, drop: bool = False) -> None:
        version = self.playing.pop(number)
        if drop:
            self.schedule.drop(number)
            self.dropped.append(number)
        else:
            self.finished[number] = version

    def take(self) -> bool:
        """All that the step may have, now; whether it is full."""
        for number in sorted(self.finished):
            if self.schedule.may_take(number):
                self.schedule.take(number)
                self.steps[-1][number] = self.schedule.step - self.finished.pop(number)
        return self.schedule.full

    def close(self) -> None:
        self.schedule.close()
        self.steps.append({})

    def learn(self) -> None:
        self.schedule.learned()

    def sync(self) -> None:
        self.schedule.synced(self.schedule.step)


def play(rng: Random, books: Books, num_steps: int, *, drops: bool) -> None:
    """All steps of a run; between any two events others finish, by chance."""
    schedule = books.schedule

    def some_finish(at_least: int = 0) -> None:
        books.admit()
        assert len(books.playing) >= at_least, "nothing is played, nothing may begin, and the step is not full"
        for _ in range(rng.randint(at_least, max(at_least, len(books.playing)))):
            number = rng.choice(sorted(books.playing))
            books.finish(number, drop=drops and rng.random() < 0.25)
            books.admit()

    for _ in range(num_steps):
        while not books.take():
            some_finish(at_least=1)
        books.close()
        if schedule.mode.sync == "taken":
            # what was learned is what the step before has
            schedule.synced(schedule.step - 1)
        some_finish()
        if schedule.mode.sync == "learned":
            books.sync()
        some_finish()
        books.learn()


def a_schedule(rng: Random, mode: ModeName, num_steps: int | None) -> Schedule:
    per_step = rng.randint(1, 4)
    return Schedule(
        mode,
        groups_per_step=per_step,
        max_open_groups=rng.randint(per_step, 5 * per_step),
        max_staleness=rng.randint(1, 4),
        num_steps=num_steps,
    )


@pytest.mark.parametrize("mode", MODES)
@given(seed=seeds)
def test_nothing_is_trained_on_later_than_allowed_and_no_step_waits_for_ever(mode: ModeName, seed: int):
    schedule = a_schedule(rng := Random(seed), mode, rng.choice([None, 6]))
    books = Books(schedule)
    play(rng, books, 6, drops=True)
    *steps, _ = books.steps
    assert all(len(step) == schedule.groups_per_step for step in steps)
    assert all(0 <= age <= schedule.mode.staleness for step in steps for age in step.values())
    trained = [number for step in steps for number in step]
    open_now = [*books.playing, *books.finished]
    # each number once: trained, dropped or open
    assert sorted([*trained, *books.dropped, *open_now]) == list(range(books.next))


@pytest.mark.parametrize(("mode", "ages"), [("on_policy", [0, 0, 0, 0]), ("one_step_off", [0, 1, 1, 1])])
@given(seed=seeds)
def test_two_modes_have_one_age_a_step(mode: ModeName, ages: list[int], seed: int):
    books = Books(a_schedule(rng := Random(seed), mode, None))
    if mode == "one_step_off":
        books.schedule.max_open_groups = 2 * books.schedule.groups_per_step
    play(rng, books, 4, drops=True)
    assert [set(step.values()) for step in books.steps[:-1]] == [{age} for age in ages]


@given(seed=seeds)
def test_all_that_was_admitted_is_learned_from_whatever_its_length(seed: int):
    schedule = a_schedule(rng := Random(seed), "carry_over", 6)
    books = Books(schedule)
    play(rng, books, 6, drops=False)
    assert sorted(number for step in books.steps for number in step) == list(range(6 * schedule.groups_per_step))
    assert not schedule.may_admit()
    assert schedule.open == 0


def test_a_straggler_is_carried_over_until_it_is_due_and_then_waited_for():
    books = Books(Schedule("carry_over", groups_per_step=2, max_open_groups=6, max_staleness=2))
    for step in range(2):
        books.admit()
        for number in sorted(set(books.playing) - {0}):
            books.finish(number)
        assert books.take(), f"step {step} does not wait for group 0"
        books.close()
        books.sync()
        books.learn()
    books.admit()
    for number in sorted(set(books.playing) - {0}):
        books.finish(number)
    assert not books.take()
    books.finish(0)
    assert books.take()
    assert books.steps[2][0] == 2


def test_finished_groups_of_later_dates_leave_room_for_those_that_are_due():
    books = Books(Schedule("carry_over", groups_per_step=2, max_open_groups=8, max_staleness=1))
    books.admit()  # four, due in step 1 at the latest
    for number in (2, 3):
        books.finish(number)
    assert books.take()
    books.close()
    books.sync()
    books.learn()
    books.admit()  # two more, due in step 2: 0 and 1 have all of step 1
    for number in (4, 5):
        books.finish(number)
    books.take()
    assert books.steps[1] == {}
    for number in (0, 1):
        books.finish(number)
    assert books.take()
    assert books.steps[1] == {0: 1, 1: 1}


@given(st.integers(1, 4), st.integers(1, 3), st.integers(4, 12))
def test_carry_over_keeps_as_many_open_as_its_dates_allow(per_step: int, max_staleness: int, max_open_groups: int):
    schedule = Schedule(
        "carry_over", groups_per_step=per_step, max_open_groups=max_open_groups, max_staleness=max_staleness
    )
    Books(schedule).admit()
    assert schedule.open == min(max_open_groups, (max_staleness + 1) * per_step)


@pytest.mark.parametrize("mode", MODES)
@given(seed=seeds)
def test_a_run_that_goes_on_plays_what_is_not_done_with_and_nothing_twice(mode: ModeName, seed: int):
    first = Books(a_schedule(rng := Random(seed), mode, 6))
    stop = rng.randint(0, 5)
    play(rng, first, stop, drops=True)
    kept = first.schedule
    done = {number for step in first.steps[:stop] for number in step}
    # what was dropped since the last step had its groups is judged once more
    dropped = {number for number in first.dropped if number < kept.position or number in kept.consumed}
    later = Books(
        Schedule(
            mode,
            groups_per_step=kept.groups_per_step,
            max_open_groups=kept.max_open_groups,
            max_staleness=kept.mode.staleness,
            num_steps=6,
            step=stop,
            position=kept.position,
            consumed=kept.consumed,
        )
    )
    play(rng, later, 6 - stop, drops=False)
    done_later = [number for step in later.steps for number in step]
    assert not done & set(done_later)
    assert len(done) + len(done_later) == 6 * kept.groups_per_step
    everything = sorted([*done, *dropped, *done_later])
    assert everything == list(range(len(everything)))


def test_a_budget_below_a_step_is_refused():
    with pytest.raises(ValueError, match="max_open_groups = 3 is less than groups_per_step = 4"):
        Schedule(groups_per_step=4, max_open_groups=3)
