"""Rollouts of one run: tasks in, groups of finished episodes out.

    tasks -> _produce -> _group[n] -> _place[n * group_size] -> Groups -> learner

Who waits for whom:
    _produce   for room to admit a task        freed when the learner is done with a group, or a group is dropped
    learner    for a step's worth of groups    fed by _group
    _group     for its episodes only: the room bounds what is finished and not taken, so handing over never waits
What a failure does:
    a failed trajectory   is kept on its group without a vote, and its place is played again with another seed
    a place that fails
    max_refills + 1 times ends the run with the last cause: the world is broken, not an episode
    anything else         is a bug: every task is cancelled and the run ends with it

What may begin, what a step learns from and when the engine gets new weights is decided by the schedule (modes.py), which is
also the budget: groups open from their admission until the learner has consumed them. A driver goes round like this, in
every mode, and in two of them groups are played all the while:

    async with rollouts(play, tasks, schedule=Schedule("carry_over", ...), sync=engine.update_weights, ...) as groups:
        while ...:
            batch = await groups.take()                 # or stream(): the same groups, as they finish
            await learner.step(batch, ..., version)
            await groups.learned(version)               # the engine takes the new weights, if now is the time
            groups.done()                               # gives the batch's room back

With mode "on_policy" which groups a step gets depends on nothing but their numbers and outcomes, and one number,
`schedule.position`, says how far the run is; in the others the numbers in `schedule.consumed` are done with besides. What is
admitted from there on plays all that was under way when a run was killed once more.
"""

import asyncio
import heapq
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from l0fast.errors import WorldError
from l0fast.rollout.modes import Schedule
from l0fast.rollout.sampling import DynamicSampling
from l0fast.types import Group, Task, Trajectory

T = TypeVar("T")

PlayEpisode = Callable[[Task, int, int, int], Awaitable[Trajectory]]
"""(task, group number, index in the group, attempt) -> trajectory with its rewards."""
Numbered = tuple[int, Task]


@dataclass(slots=True)
class Groups:
    """Finished groups, and the books about them."""

    schedule: Schedule
    sampling: DynamicSampling
    sync: Callable[[int], Awaitable[None]]
    dropped: list[Group] = field(default_factory=list)
    """Groups without a signal that no step learns from, dropped since the step before the last one taken had its groups."""
    too_stale: list[Group] = field(default_factory=list)
    """Groups sampled by weights older than the schedule allows, which only an engine that keeps to old ones makes."""
    _dropped: list[Group] = field(default_factory=list)
    _finished: list[tuple[int, Group]] = field(default_factory=list)
    """A heap by number."""
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _room: asyncio.Event = field(default_factory=asyncio.Event)
    _num_playing: int = 0
    _tasks_left: bool = True
    _made: int = 0
    """The newest weights there are."""

    async def take(self) -> list[Group]:
        """A step's worth of groups, in the order of their admission. Their room stays taken until `done`."""
        async with aclosing(self.stream()) as batches:
            groups = [group async for batch in batches for group in batch]
        return sorted(groups, key=lambda group: group.number)

    async def stream(self) -> AsyncGenerator[list[Group]]:
        """The groups that `take` would return, as they finish: at once all that the step may have.

        Where the tasks come to an end, the last step has fewer groups, or none.

        Raises:
            WorldError: the engine goes on with weights older than it was given.
        """
        schedule, too_stale = self.schedule, []
        while not schedule.full:
            self._arrived.clear()
            taken = []
            # dues rise with the numbers: where the first one has to wait, so have all
            while self._finished and schedule.may_take(self._finished[0][0]):
                number, group = heapq.heappop(self._finished)
                if schedule.step - group.oldest_version <= schedule.mode.staleness:
                    schedule.take(number)
                    taken.append(group)
                else:
                    schedule.drop(number)
                    too_stale.append(group)
                    self._room.set()
                    self._give_up_on(too_stale)
            if taken:
                yield taken
            elif not schedule.full:
                if not self._tasks_left and not self._num_playing and not self._finished:
                    break
                await self._arrived.wait()
        schedule.close()
        self.dropped, self._dropped = sorted(self._dropped, key=lambda group: group.number), []
        self.too_stale = too_stale
        if schedule.mode.sync == "taken":
            await self._sync()
        self._room.set()

    async def learned(self, version: int) -> None:
        """The learner has made these weights of what was taken. Returns when the engine has them, if it is to have them now."""
        self._made = version
        if self.schedule.mode.sync == "learned":
            await self._sync()

    def done(self) -> None:
        """Nothing else is to come before what is admitted next: give back the room of what was learned from."""
        self.schedule.learned()
        self._room.set()

    async def _sync(self) -> None:
        if self._made > self.schedule.version:
            await self.sync(self._made)
            self.schedule.synced(self._made)

    def _finish(self, group: Group) -> None:
        if self.sampling.keep(group, self.schedule.position):
            heapq.heappush(self._finished, (group.number, group))
        else:
            self.schedule.drop(group.number)
            self._dropped.append(group)
            self._room.set()
        self._arrived.set()

    def _give_up_on(self, too_stale: Sequence[Group]) -> None:
        if len(too_stale) > self.schedule.groups_per_step:
            oldest, schedule = min(group.oldest_version for group in too_stale), self.schedule
            raise WorldError(
                f"more than a step's worth of groups ({len(too_stale)}) hold tokens of policy version {oldest}, too old for "
                f"step {schedule.step + 1} by a staleness bound of {schedule.mode.staleness}, though the engine took "
                f"version {schedule.version}: it, or a replica of it, goes on with old weights; look into its log"
            )


@asynccontextmanager
async def rollouts(
    play: PlayEpisode,
    tasks: Iterable[Task],
    *,
    schedule: Schedule,
    sync: Callable[[int], Awaitable[None]],
    group_size: int,
    max_refills: int,
    sampling: DynamicSampling,
    begin: Callable[[Sequence[Numbered]], Sequence[Numbered]] = lambda admitted: admitted,
) -> AsyncIterator[Groups]:
    """Produce groups for as long as the `async with` body runs.

    Args:
        play: plays one episode; a failed one is returned, not raised.
        tasks: taken lazily, one a group; the first is that of number `schedule.position`.
        sync: has the engine take the weights of a version; returns when they are in use.
        group_size: episodes a group [episodes].
        max_refills: times a place is played again after a failure.
        begin: the order in which groups admitted at once begin, theirs unless given. Which are admitted is not its business.

    Raises:
        ExceptionGroup: a bug, or a WorldError that did not go away. By then every episode was cancelled and awaited.
    """
    groups = Groups(schedule=schedule, sampling=sampling, sync=sync, _made=schedule.version)

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

    async def _group(task: Task, number: int, version: int) -> None:
        failures: list[Trajectory] = []
        async with asyncio.TaskGroup() as tg:
            places = [
                tg.create_task(_place(task, number, i, failures), name=f"episode {task.id}/{i}")
                for i in range(group_size)
            ]
        groups._num_playing -= 1
        groups._finish(
            Group(
                task=task,
                trajectories=tuple(place.result() for place in places),
                failures=tuple(failures),
                number=number,
                policy_version=version,
            )
        )

    async def _produce() -> None:
        consumed = schedule.consumed
        numbered = (pair for pair in enumerate(tasks, schedule.position) if pair[0] not in consumed)
        async with asyncio.TaskGroup() as tg:
            while groups._tasks_left:
                groups._room.clear()
                versions: dict[int, int] = {}
                admitted: list[Numbered] = []
                while schedule.may_admit():
                    number, task = next(numbered, (None, None))
                    if number is None or task is None:
                        groups._tasks_left = False
                        groups._arrived.set()
                        break
                    versions[number] = schedule.admit(number)
                    admitted.append((number, task))
                    groups._num_playing += 1
                    # a step's worth of episodes may begin at once: let the loop turn in between
                    await asyncio.sleep(0)
                for number, task in begin(admitted):
                    tg.create_task(_group(task, number, versions[number]), name=f"group {task.id}")
                    await asyncio.sleep(0)
                if groups._tasks_left:
                    await groups._room.wait()

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
