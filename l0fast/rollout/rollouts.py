"""Rollouts of one run: tasks in, groups of finished episodes out.

    tasks -> _produce -> _group[n] -> _place[n * group_size] -> Groups -> learner

Who waits for whom:
    _produce   for room to admit a task        freed when the learner is done with a group, or a group is dropped
    learner    for a step's worth of groups    fed by _group
    _group     for its episodes only: `room` bounds the queue, so handing over never waits
What a failure does:
    a failed trajectory   is kept on its group without a vote, and its place is played again with another seed
    a place that fails
    max_refills + 1 times ends the run with the last cause: the world is broken, not an episode
    anything else         is a bug: every task is cancelled and the run ends with it

One semaphore bounds the pipeline from admission to consumption. The learner gives room back only after the engine has
its new weights (`Groups.done`), so with max_open_groups == groups_per_step every token is sampled from the current
policy.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
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
    """Finished groups, first finished first."""

    room: asyncio.Semaphore
    sampling: DynamicSampling
    queue: "asyncio.Queue[Group]" = field(default_factory=asyncio.Queue)
    dropped: list[Group] = field(default_factory=list)
    """Groups dropped since the last `take`."""

    async def take(self, num_groups: int) -> list[Group]:
        """A step's worth of groups, in the order of their admission. Their room stays taken until `done`."""
        self.dropped = []
        self.sampling.next_step()
        kept: list[Group] = []
        while len(kept) < num_groups:
            group = await self.queue.get()
            if self.sampling.keep(group):
                kept.append(group)
            else:
                self.dropped.append(group)
                self.room.release()
        return sorted(kept, key=lambda group: group.number)

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
) -> AsyncIterator[Groups]:
    """Produce groups for as long as the `async with` body runs.

    Args:
        play: plays one episode; a failed one is returned, not raised.
        tasks: endless; taken lazily, one a group.
        group_size: episodes a group [episodes].
        max_open_groups: groups admitted and not yet learned from [groups].
        max_refills: times a place is played again after a failure.

    Raises:
        ExceptionGroup: a bug, or a WorldError that did not go away. By then every episode was cancelled and awaited.
    """
    groups = Groups(room=asyncio.Semaphore(max_open_groups), sampling=sampling)

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
        groups.queue.put_nowait(
            Group(task=task, trajectories=tuple(p.result() for p in places), failures=tuple(failures), number=number)
        )

    async def _produce() -> None:
        async with asyncio.TaskGroup() as tg:
            for number, task in enumerate(tasks):
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
