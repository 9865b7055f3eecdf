"""rollouts(): what starts, what stops, and what a failure does. Nothing waits for time, no engine is needed."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.errors import WorldError
from l0fast.rollout.modes import Schedule
from l0fast.rollout.rollouts import Groups, play_all, rollouts
from l0fast.rollout.sampling import DynamicSampling
from l0fast.types import Group, Task, Trajectory, TrajectoryStatus


def task(n: int) -> Task:
    return Task(id=f"t{n}", question=f"question {n}", answers=("a",))


def endless():
    return (task(n) for n in itertools.count())


class World:
    """Episodes that take a few loop turns, and count how many are alive."""

    def __init__(self, *, right=lambda task, index: index % 2 == 0, fails=lambda task, index, attempt: False, bug=None):
        self.right, self.fails, self.bug = right, fails, bug
        self.alive = self.started = 0

    async def play(self, task: Task, number: int, index: int, attempt: int) -> Trajectory:
        self.alive += 1
        self.started += 1
        try:
            for _ in range(1 + index % 3):
                await asyncio.sleep(0)
            if self.bug:
                raise self.bug
            failed = self.fails(task, index, attempt)
            return Trajectory(
                task=task,
                index=index,
                status=TrajectoryStatus.FAILED_SANDBOX if failed else TrajectoryStatus.COMPLETED,
                turns=(),
                correct=not failed and self.right(task, index),
                cause="gone" if failed else None,
            )
        finally:
            self.alive -= 1


async def no_weights(version: int) -> None:
    """An engine that has its weights at once."""


def start(
    play,
    tasks=None,
    *,
    groups_per_step=3,
    max_open_groups=None,
    group_size=4,
    max_refills=2,
    drop_rate=0.0,
    max_drops=100,
    position=0,
    seed=0,
):
    return rollouts(
        play,
        tasks or endless(),
        schedule=Schedule(
            groups_per_step=groups_per_step, max_open_groups=max_open_groups or groups_per_step, position=position
        ),
        sync=no_weights,
        group_size=group_size,
        max_refills=max_refills,
        sampling=DynamicSampling(drop_rate=drop_rate, max_drops=max_drops, seed=seed),
    )


async def finish(groups: Groups) -> None:
    """Learn from what was taken, in no time."""
    await groups.learned(groups.schedule.step)
    groups.done()


def test_leaving_the_body_ends_every_episode():
    world = World()

    async def main():
        async with start(world.play, groups_per_step=2) as groups:
            taken = await groups.take()
            await finish(groups)
            for _ in range(5):
                await asyncio.sleep(0)
            assert world.alive
            return taken

    taken = asyncio.run(main())
    assert [[t.index for t in group.trajectories] for group in taken] == [[0, 1, 2, 3]] * 2
    assert world.alive == 0


def test_nothing_is_admitted_before_the_learner_is_done():
    world = World()

    async def main():
        async with start(world.play, max_open_groups=9) as groups:
            await groups.take()
            for _ in range(100):
                await asyncio.sleep(0)
            before = world.started
            await finish(groups)
            for _ in range(100):
                await asyncio.sleep(0)
            return before

    assert asyncio.run(main()) == 3 * 4
    assert world.started == 6 * 4


def test_a_failed_episode_is_kept_without_a_vote_and_its_place_is_played_again():
    world = World(fails=lambda task, index, attempt: index == 1 and attempt < 2)

    async def main():
        async with start(world.play, groups_per_step=1) as groups:
            return await groups.take()

    (group,) = asyncio.run(main())
    assert [t.status for t in group.trajectories] == [TrajectoryStatus.COMPLETED] * 4
    assert [(t.index, t.cause) for t in group.failures] == [(1, "gone")] * 2


def test_a_place_that_keeps_failing_ends_the_run_with_the_cause():
    world = World(fails=lambda task, index, attempt: True)

    async def main():
        async with start(world.play, groups_per_step=1) as groups:
            await groups.take()

    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(main())
    error = caught.value.subgroup(WorldError)
    assert error is not None
    assert "failed 3 times in a row" in repr(error)
    assert "gone" in repr(error)
    assert world.alive == 0


def test_a_bug_ends_the_run_and_leaves_nothing():
    world = World(bug=KeyError("bug"))

    async def main():
        async with start(world.play, groups_per_step=1) as groups:
            await groups.take()

    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(main())
    assert caught.value.subgroup(KeyError)
    assert world.alive == 0


def test_a_step_has_its_groups_in_the_order_of_admission():
    world = World()

    async def play(task: Task, number: int, index: int, attempt: int) -> Trajectory:
        for _ in range(20 - 5 * number):  # the later ones finish first
            await asyncio.sleep(0)
        return await world.play(task, number, index, attempt)

    async def main():
        async with start(play, group_size=2) as groups:
            return [group.number for group in await groups.take()]

    assert asyncio.run(main()) == [0, 1, 2]


def test_dropped_groups_make_room_for_others():
    world = World(right=lambda task, index: int(task.id[1:]) % 2 == 0 or index == 0)  # every other group all right

    async def main():
        async with start(world.play, drop_rate=1.0) as groups:
            kept = []
            for _ in range(5):
                kept += await groups.take()
                await finish(groups)
            return kept

    kept = asyncio.run(main())
    assert len(kept) == 15
    assert not any(group.all_equal for group in kept)


def test_play_all_keeps_the_order_and_the_limit():
    world, most = World(), 0

    async def play(task: Task) -> Trajectory:
        nonlocal most
        result = await world.play(task, 0, int(task.id[1:]), 0)
        most = max(most, world.alive + 1)
        return result

    played = asyncio.run(play_all(play, [task(n) for n in range(20)], max_open=4))
    assert [t.task.id for t in played] == [f"t{n}" for n in range(20)]
    assert most <= 4


def group(*right: bool) -> Group:
    trajectories = tuple(
        Trajectory(task=task(0), index=i, status=TrajectoryStatus.COMPLETED, turns=(), correct=r)
        for i, r in enumerate(right)
    )
    return Group(task=task(0), trajectories=trajectories)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), max_size=30), st.floats(0, 1), st.integers(0, 5))
def test_dynamic_sampling_drops_only_equal_groups_and_never_too_many(rights, drop_rate, max_drops):
    sampling = DynamicSampling(drop_rate=drop_rate, max_drops=max_drops, seed=1)
    verdicts = [
        (sampling.keep(replace(group(*right), number=7 + n), 7), len(set(right)) == 1) for n, right in enumerate(rights)
    ]
    assert all(keep or equal for keep, equal in verdicts)
    assert sum(not keep for keep, _ in verdicts) <= max_drops


def test_a_drop_rate_of_a_half_drops_about_half():
    sampling = DynamicSampling(drop_rate=0.5, max_drops=10**6, seed=2)
    kept = sum(sampling.keep(replace(group(True, True), number=n), 0) for n in range(2000))
    assert 900 < kept < 1100


# --- which groups make a step, whoever finishes first -----------------------------------------------------------------


def taken(
    durations: Sequence[int], *, stream: bool = False, position: int = 0, max_open_groups: int = 3
) -> list[tuple[list[int], list[int], int]]:
    """Three steps of 3 groups, of which every other one is all right, and most of those dropped, as far as they may be; group n takes
    `durations[n % len]` loop turns. For each step: its numbers, those dropped, the position after it."""
    steps = []

    async def play(task: Task, number: int, index: int, attempt: int) -> Trajectory:
        for _ in range(durations[number % len(durations)]):
            await asyncio.sleep(0)
        right = number % 2 == 0 or index == 0
        return Trajectory(task=task, index=index, status=TrajectoryStatus.COMPLETED, turns=(), correct=right)

    async def main():
        async with start(
            play,
            itertools.islice(endless(), position, None),
            group_size=2,
            max_open_groups=max_open_groups,
            max_refills=0,
            drop_rate=0.8,
            max_drops=3,
            seed=3,
            position=position,
        ) as groups:
            for _ in range(3):
                if stream:
                    batch = [group async for groups_now in groups.stream() for group in groups_now]
                else:
                    batch = await groups.take()
                assert all(group.task == task(group.number) for group in batch)
                numbers = [group.number for group in batch]
                steps.append((numbers, [group.number for group in groups.dropped], groups.schedule.position))
                await finish(groups)

    asyncio.run(main())
    return steps


any_durations = st.lists(st.integers(0, 30), min_size=1, max_size=20)


@settings(max_examples=60)
@given(any_durations, st.integers(3, 9))
def test_a_step_is_made_of_the_same_groups_whoever_finishes_first(durations, max_open_groups):
    steps = taken(durations, max_open_groups=max_open_groups)
    assert steps == taken([1])
    assert any(dropped for _, dropped, _ in steps)
    # no number is skipped, none comes twice
    assert sorted(n for kept, dropped, _ in steps for n in (*kept, *dropped)) == list(range(steps[-1][2]))


@settings(max_examples=30)
@given(any_durations)
def test_streamed_groups_are_those_that_a_step_would_take(durations):
    streamed = taken(durations, stream=True)
    assert [(sorted(kept), dropped, position) for kept, dropped, position in streamed] == taken(durations)


@given(any_durations)
@settings(max_examples=30)
def test_going_on_from_a_position_gives_the_steps_that_would_have_followed(durations):
    first, *later = taken([1])
    assert taken(durations, position=first[2])[:2] == later


def test_a_finished_group_is_streamed_while_another_is_still_played():
    slow = asyncio.Event()

    async def play(task: Task, number: int, index: int, attempt: int) -> Trajectory:
        if number == 0:
            await slow.wait()
        return Trajectory(task=task, index=index, status=TrajectoryStatus.COMPLETED, turns=(), correct=index == 0)

    async def main():
        order = []
        async with (
            start(play, groups_per_step=2, group_size=2) as groups,
            asyncio.timeout(10),
        ):
            async for batch in groups.stream():
                order += [group.number for group in batch]
                slow.set()
        return order

    assert asyncio.run(main()) == [1, 0]
