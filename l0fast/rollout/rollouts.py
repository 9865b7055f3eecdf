"""Rollouts of one run: tasks in, groups of finished episodes out.

    tasks -> _produce -> _group[n] -> _place[n * group_size] -> Groups -> learner

Who waits for whom:
    _produce   for room to admit a task        freed when the learner is done with a group, or a group is dropped
    learner    for a step's worth of groups    fed by _group
    _group     for its episodes only: `room` bounds what is finished and not taken, so handing over never waits
What a failure does:
    a failed trajectory   is kept on its group without a vote, and its place is played again with another seed
    a place that fails
    max_refills + 1 times ends the run with the last cause: the world is broken, not an episode
    anything else         is a bug: every task is cancelled and the run ends with it

One semaphore bounds the pipeline from admission to consumption. The learner gives room back only after the engine has
its new weights (`Groups.done`), so with max_open_groups == groups_per_step every token is sampled from the current
policy.

A step learns from the next groups in the order of admission, not from those that finished first: that would select short
episodes. So which groups a step gets depends on nothing but their numbers and outcomes, and one number, `position`, says
how far the run is: what is admitted from there on plays all that was under way when a run was killed once more.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from l0fast.errors import WorldError
from l0fast.rollout.sampling import DynamicSampling
from l0fast.types import Group, Task, Trajectory

T = TypeVar("T")

PlayEpisode = Callable[[Task, int, int, int], Awaitable[Trajectory]]
"""(task, group number, index in the group, attempt) -> trajectory with its rewards."""


@dataclass(slots=True)
class Groups:
    """Finished groups, and the place in their order that the learner has come to."""

    room: asyncio.Semaphore
    sampling: DynamicSampling
    position: int = 0
    """Number of the first group that no step has learned from or dropped."""
    dropped: list[Group] = field(default_factory=list)
    """Groups dropped in the last step that was taken, or the one that is being taken."""
    _finished: dict[int, Group] = field(default_factory=dict)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self, num_groups: int) -> list[Group]:
        """A step's worth of groups, in the order of their admission. Their room stays taken until `done`."""
        async with aclosing(self.stream(num_groups)) as batches:
            groups = [group async for batch in batches for group in batch]
        return sorted(groups, key=lambda group: group.number)

    async def stream(self, num_groups: int) -> AsyncGenerator[list[Group]]:
        """The groups that `take` would return, as they finish: at once all that have since the last time."""
        first, following = self.position, self.position + num_groups
        self.dropped = []
        awaited = set(range(first, following))
        while awaited:
            self._arrived.clear()
            kept: list[Group] = []
            for number in sorted(awaited & self._finished.keys()):
                group = self._finished.pop(number)
                awaited.remove(number)
                if self.sampling.keep(group, first):
                    kept.append(group)
                else:
                    self.dropped.append(group)
                    self.room.release()
                    awaited.add(following)
                    following += 1
            if kept:
                yield kept
            elif awaited.isdisjoint(self._finished):
                await self._arrived.wait()
        self.dropped.sort(key=lambda group: group.number)
        self.position = following

    def finished(self, group: Group) -> None:
        """Hand over a group."""
        self._finished[group.number] = group
        self._arrived.set()

    def done(self, num_groups: int) -> None:
        """The learner has consumed these, and the engine has the weights it made of them: admit as many."""
        for _ in range(num_groups):
            self.room.release()


@asynccontextmanager
async def rollouts(
    play: PlayEpisode,
    tasks: Iterable[Task],
    *,
    group_size: int,
    max_open_groups: int,
    max_refills: int,
    sampling: DynamicSampling,
    position: int = 0,
) -> AsyncIterator[Groups]:
    """Produce groups for as long as the `async with` body runs.

    Args:
        play: plays one episode; a failed one is returned, not raised.
        tasks: endless; taken lazily, one a group.
        group_size: episodes a group [episodes].
        max_open_groups: groups admitted and not yet learned from [groups].
        max_refills: times a place is played again after a failure.
        position: `Groups.position` of the run that this one goes on with: the number of the first of `tasks`.

    Raises:
        ExceptionGroup: a bug, or a WorldError that did not go away. By then every episode was cancelled and awaited.
    """
    groups = Groups(room=asyncio.Semaphore(max_open_groups), sampling=sampling, position=position)

    async def _place(task: Task, number: int, index: int, failures: list[Trajectory]) -> Trajectory:
        for attempt in range(max_refills + 1):
            trajectory = await play(task, number, index, attempt)
            if not trajectory.status.failed:
                return trajectory
            failures.append(trajectory)
        raise WorldError(
            f"an episode of task {task.id!r} failed {max_refills + 1} times in a row, last as {failures[-1].status}: "
            f"{failures[-1].cause}"
        )

    async def _group(task: Task, number: int) -> None:
        failures: list[Trajectory] = []
        async with asyncio.TaskGroup() as tg:
            places = [
                tg.create_task(_place(task, number, i, failures), name=f"episode {task.id}/{i}")
                for i in range(group_size)
            ]
        groups.finished(
            Group(task=task, trajectories=tuple(p.result() for p in places), failures=tuple(failures), number=number)
        )

    async def _produce() -> None:
        async with asyncio.TaskGroup() as tg:
            for number, task in enumerate(tasks, position):
                await groups.room.acquire()
                tg.create_task(_group(task, number), name=f"group {task.id}")

    async with asyncio.TaskGroup() as tg:
        producer = tg.create_task(_produce(), name="produce groups")
        try:
            yield groups
        finally:
            producer.cancel()  # one cancel reaches the whole tree; leaving the TaskGroup waits for it to unwind


async def play_all(
    play: Callable[[T], Awaitable[Trajectory]], tasks: Iterable[T], *, max_open: int
) -> list[Trajectory]:
    """Play one episode of every task, at most `max_open` at once; in the order of the tasks. For evaluation."""
    room = asyncio.Semaphore(max_open)

    async def one(task: T) -> Trajectory:
        async with room:
            return await play(task)

    async with asyncio.TaskGroup() as tg:
        running = [tg.create_task(one(task)) for task in tasks]
    return [task.result() for task in running]
