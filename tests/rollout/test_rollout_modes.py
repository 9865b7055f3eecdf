"""The modes at work: who sampled what, how old it is when it is learned from, and that nothing is lost or left behind.

Episodes have a fake session of a fake pool each and sample from a fake engine, a token a turn of the loop, that writes
down which weights it had; the learner takes a few turns, too. Nothing waits for time.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
from blockbuster import blockbuster_ctx
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.engine.base import Sampling
from l0fast.engine.simulated import SimulatedClock, SimulatedEngine
from l0fast.errors import WorldError
from l0fast.ids import Ids
from l0fast.rollout.modes import ModeName, Schedule
from l0fast.rollout.rollouts import Groups, rollouts
from l0fast.rollout.sampling import DynamicSampling
from l0fast.types import Group, Task, Trajectory, TrajectoryStatus, Turn

MODES: tuple[ModeName, ...] = ("on_policy", "carry_over", "one_step_off")
seeds = st.integers(0, 2**32)


def task(n: int) -> Task:
    return Task(id=f"t{n}", question="?", answers=("a",))


class World:
    """An engine, a pool of sessions and a learner, made up."""

    def __init__(self, rng: Random, *, fails: float = 0.0, old_weights: bool = False):
        self.rng, self.fails, self.old_weights = rng, fails, old_weights
        self.version = 0
        """Of the engine."""
        self.leases = self.requests = self.syncs = 0
        """Under way."""
        self.sampled: dict[tuple[int, int, int], list[list[int]]] = {}
        """(group, index, attempt) -> for each turn, the version of each token."""

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        self.leases += 1
        try:
            await asyncio.sleep(0)
            yield
        finally:
            # giving back takes a while, and may be cancelled itself
            try:
                await asyncio.sleep(0)
            finally:
                self.leases -= 1

    async def generate(self, tokens: int) -> list[int]:
        self.requests += 1
        try:
            versions = []
            for _ in range(tokens):
                await asyncio.sleep(0)
                versions.append(0 if self.old_weights else self.version)
            return versions
        finally:
            self.requests -= 1

    async def update_weights(self, version: int) -> None:
        self.syncs += 1
        try:
            await asyncio.sleep(0)
            self.version = version
            await asyncio.sleep(0)
        finally:
            self.syncs -= 1

    async def play(self, task: Task, number: int, index: int, attempt: int) -> Trajectory:
        rng = Random(f"{self.rng.random()} {number} {index} {attempt}")
        log = self.sampled[number, index, attempt] = []
        turns = []
        async with self.session():
            # heavy tail: one in ten is a straggler
            for _ in range(rng.randint(1, 3) * (1 if rng.random() < 0.9 else 8)):
                versions = await self.generate(rng.randint(1, 4))
                log.append(versions)
                runs = [(version, len(list(run))) for version, run in itertools.groupby(versions)]
                ends = list(itertools.accumulate(length for _, length in runs))
                spans = tuple((v, end - n, end) for (v, n), end in zip(runs, ends, strict=True))
                turns.append(turn(versions[0], len(versions), spans if len(spans) > 1 else ()))
        failed = rng.random() < self.fails
        return Trajectory(
            task=task,
            index=index,
            status=TrajectoryStatus.FAILED_ENGINE if failed else TrajectoryStatus.COMPLETED,
            turns=tuple(turns),
            correct=not failed and rng.random() < 0.7,
            cause="gone" if failed else None,
        )


def turn(version: int, tokens: int, spans: tuple[tuple[int, int, int], ...]) -> Turn:
    return Turn(
        prompt_ids=Ids((1,)), response_ids=Ids((2,) * tokens), sampler_logprobs=(-1.0,) * tokens, finish_reason="stop",
        policy_version=version, version_spans=spans, text="", output=None, well_formed=True,
    )  # fmt: skip


class Run:
    """Rollouts in a mode, with a learner that takes some turns of the loop."""

    def __init__(
        self, mode: ModeName, world: World, rng: Random, *, num_steps: int, stream: bool = False, drop_rate: float = 0.0
    ):
        self.mode, self.world, self.rng, self.num_steps, self.stream = mode, world, rng, num_steps, stream
        self.drop_rate = drop_rate
        self.steps: list[list[Group]] = []
        self.dropped: list[Group] = []
        self.groups: Groups | None = None

    def schedule(self) -> Schedule:
        per_step = self.rng.randint(1, 3)
        return Schedule(
            self.mode,
            groups_per_step=per_step,
            max_open_groups=self.rng.randint(per_step, 4 * per_step),
            max_staleness=self.rng.randint(1, 3),
            num_steps=self.num_steps,
        )

    async def __call__(self, schedule: Schedule | None = None) -> None:
        async with rollouts(
            self.world.play,
            map(task, itertools.count()),
            schedule=schedule or self.schedule(),
            sync=self.world.update_weights,
            group_size=2,
            max_refills=20,
            sampling=DynamicSampling(drop_rate=self.drop_rate, max_drops=6, seed=0),
        ) as self.groups:
            for step in range(1, self.num_steps + 1):
                if self.stream:
                    batch = [group async for some in self.groups.stream() for group in some]
                else:
                    batch = await self.groups.take()
                self.dropped += self.groups.dropped + self.groups.too_stale
                for _ in range(self.rng.randint(0, 8)):
                    await asyncio.sleep(0)
                self.steps.append(batch)
                await self.groups.learned(step)
                self.groups.done()


def ages(run: Run) -> list[list[int]]:
    """Of each step, the ages of its tokens, as the engine wrote down their versions."""
    return [
        [
            step - version
            for group in batch
            for i in range(2)
            for tokens in run.world.sampled[group.number, i, attempts(group, i) - 1]
            for version in tokens
        ]
        for step, batch in enumerate(run.steps)
    ]


def attempts(group: Group, index: int) -> int:
    return 1 + sum(failure.index == index for failure in group.failures)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25)
@given(seeds, st.booleans())
def test_each_turn_says_who_sampled_what_and_no_token_is_older_than_allowed(mode: ModeName, seed: int, stream: bool):
    rng = Random(seed)
    run = Run(mode, World(rng, fails=0.1), rng, num_steps=5, stream=stream, drop_rate=0.5)
    asyncio.run(run())
    assert run.groups is not None
    bound = run.groups.schedule.mode.staleness
    assert not run.groups.too_stale
    for step, (batch, of_step) in enumerate(zip(run.steps, ages(run), strict=True)):
        assert all(0 <= age <= bound for age in of_step)
        assert len(batch) == run.groups.schedule.groups_per_step
        for group in batch:
            assert group.oldest_version >= group.policy_version >= step - bound
            for t in group.trajectories:
                log = run.world.sampled[group.number, t.index, attempts(group, t.index) - 1]
                told = [[v for v, start, end in turn.spans for _ in range(end - start)] for turn in t.turns]
                assert told == log
                assert all(turn.policy_version == turn.oldest_version for turn in t.turns)
    numbers = [group.number for batch in [*run.steps, run.dropped] for group in batch]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(("mode", "expected"), [("on_policy", [0, 0, 0, 0]), ("one_step_off", [0, 1, 1, 1])])
@given(seeds)
@settings(max_examples=20)
def test_a_step_of_two_modes_is_sampled_by_one_policy(mode: ModeName, expected: list[int], seed: int):
    rng = Random(seed)
    run = Run(mode, World(rng), rng, num_steps=4, drop_rate=0.5)
    asyncio.run(run(Schedule(mode, groups_per_step=2, max_open_groups=4, num_steps=4)))
    assert [set(of_step) for of_step in ages(run)] == [{age} for age in expected]


def test_carry_over_plays_on_through_new_weights_and_says_so():
    rng = Random(3)
    run = Run("carry_over", World(rng), rng, num_steps=8)
    asyncio.run(run(Schedule("carry_over", groups_per_step=3, max_open_groups=7, max_staleness=2, num_steps=8)))
    turns = [turn for batch in run.steps for group in batch for t in group.trajectories for turn in t.turns]
    assert any(len(turn.spans) > 1 for turn in turns)
    # all that was admitted was learned from
    assert sorted(group.number for batch in run.steps for group in batch) == list(range(24))


def test_one_step_off_plays_the_next_step_while_one_is_learned():
    async def main() -> None:
        world = World(Random(0))
        async with rollouts(
            world.play,
            map(task, itertools.count()),
            schedule=Schedule("one_step_off", groups_per_step=2, max_open_groups=4),
            sync=world.update_weights,
            group_size=2,
            max_refills=0,
            sampling=DynamicSampling(drop_rate=0.0, max_drops=0, seed=0),
        ) as groups:
            assert [group.number for group in await groups.take()] == [0, 1]
            # the learner takes for ever, and the next two are played meanwhile, not more
            for _ in range(300):
                await asyncio.sleep(0)
            assert {number for number, _, _ in world.sampled} == {0, 1, 2, 3}

    asyncio.run(main())


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=30)
@given(seeds, st.integers(0, 250))
def test_cancelling_a_run_at_any_await_leaves_nothing_behind(mode: ModeName, seed: int, turns: int):
    rng = Random(seed)
    run = Run(mode, World(rng, fails=0.1), rng, num_steps=1000, stream=rng.random() < 0.5, drop_rate=0.3)

    async def main() -> None:
        with blockbuster_ctx():
            running = asyncio.create_task(run())
            for _ in range(turns):
                await asyncio.sleep(0)
            assert not running.done()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert (run.world.leases, run.world.requests, run.world.syncs) == (0, 0, 0)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(seeds, st.integers(0, 120))
def test_a_bug_anywhere_ends_the_run_and_leaves_nothing_behind(mode: ModeName, seed: int, turns: int):
    rng = Random(seed)
    run = Run(mode, World(rng), rng, num_steps=1000)
    generate, left = run.world.generate, turns

    async def breaks(tokens: int) -> list[int]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyError("bug")
        return await generate(tokens)

    run.world.generate = breaks

    async def main() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:
            await run()
        assert caught.value.subgroup(KeyError)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert (run.world.leases, run.world.requests) == (0, 0)


def test_what_an_engine_samples_with_old_weights_is_dropped_and_played_again():
    rng = Random(1)
    world = World(rng)
    run = Run("on_policy", world, rng, num_steps=3)
    play = world.play

    async def a_replica_lags(task: Task, number: int, index: int, attempt: int) -> Trajectory:
        trajectory = await play(task, number, index, attempt)
        return replace(trajectory, turns=(turn(0, 3, ()),)) if (number, index) == (2, 1) else trajectory

    world.play = a_replica_lags
    asyncio.run(run(Schedule("on_policy", groups_per_step=2, max_open_groups=2)))
    assert [group.oldest_version for group in run.dropped] == [0]
    assert [[group.oldest_version for group in batch] for batch in run.steps] == [[0, 0], [1, 1], [2, 2]]
    numbers = [group.number for batch in [*run.steps, run.dropped] for group in batch]
    assert sorted(numbers) == list(range(7))


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_that_keeps_to_old_weights_ends_the_run_with_its_diagnosis(mode: ModeName):
    rng = Random(2)
    run = Run(mode, World(rng, old_weights=True), rng, num_steps=1000)
    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(run(Schedule(mode, groups_per_step=2, max_open_groups=4, max_staleness=1)))
    error = caught.value.subgroup(WorldError)
    assert error is not None
    assert "hold tokens of policy version 0, too old" in repr(error)
    assert "look into its log" in repr(error)
    assert run.world.leases == 0


@pytest.mark.parametrize("mode", MODES)
def test_where_the_tasks_end_the_last_step_has_what_there_is(mode: ModeName):
    async def main() -> list[int]:
        world, sizes = World(Random(0)), []
        async with rollouts(
            world.play,
            map(task, range(5)),
            schedule=Schedule(mode, groups_per_step=2, max_open_groups=4, max_staleness=2),
            sync=world.update_weights,
            group_size=2,
            max_refills=0,
            sampling=DynamicSampling(drop_rate=0.0, max_drops=0, seed=0),
        ) as groups:
            async with asyncio.timeout(10):
                while batch := await groups.take():
                    sizes.append(len(batch))
                    await groups.learned(len(sizes))
                    groups.done()
        return sizes

    assert asyncio.run(main()) == [2, 2, 1]


def test_groups_that_begin_together_begin_in_the_order_asked_for():
    async def main() -> list[int]:
        begun = []

        async def play(task: Task, number: int, index: int, attempt: int) -> Trajectory:
            begun.append(number)
            return Trajectory(task=task, index=index, status=TrajectoryStatus.COMPLETED, turns=())

        async with rollouts(
            play,
            map(task, itertools.count()),
            schedule=Schedule(groups_per_step=4, max_open_groups=4),
            sync=World(Random(0)).update_weights,
            group_size=1,
            max_refills=0,
            sampling=DynamicSampling(drop_rate=0.0, max_drops=0, seed=0),
            begin=lambda admitted: admitted[::-1],
        ) as groups:
            assert [group.number for group in await groups.take()] == [0, 1, 2, 3]
        return begun

    assert asyncio.run(main()) == [3, 2, 1, 0]


# --- on the simulated engine's clock ----------------------------------------------------------------------------------


def busy(schedule: Callable[[], Schedule], *, num_steps: int = 12) -> tuple[float, list[Group]]:
    """Share of the engine's slots in use, with L0-like episodes and a learner that takes 30 % of what a step's tokens do."""
    clock, slots, batch = SimulatedClock(), 16, []
    engine = SimulatedEngine(
        vocab_size=1_000_000, max_tokens=4096, slots=slots, mean_response_tokens=300, seed=1, clock=clock,
    )  # fmt: skip

    async def play(task: Task, number: int, index: int, attempt: int) -> Trajectory:
        rng, turns = Random(f"{number} {index}"), []
        for n in range(rng.randint(1, 8)):
            sampling = Sampling(max_new_tokens=1500, stop_token_ids=(0,), seed=rng.getrandbits(32))
            sampled = await engine.generate((1,) * (5 + n), sampling, conversation=f"{number}/{index}")
            assert engine.policy_version == (
                sampled.version_spans[-1].policy_version if sampled.version_spans else sampled.policy_version
            )
            spans = tuple((s.policy_version, s.start, s.end) for s in sampled.version_spans)
            turns.append(turn(sampled.policy_version, len(sampled.response_ids), spans))
            await clock.sleep(rng.lognormvariate(-0.2, 1.0))
        return Trajectory(task=task, index=index, status=TrajectoryStatus.COMPLETED, turns=tuple(turns))

    async def main() -> float:
        async with rollouts(
            play,
            map(task, itertools.count()),
            schedule=schedule(),
            sync=engine.update_weights,
            group_size=4,
            max_refills=0,
            sampling=DynamicSampling(drop_rate=0.0, max_drops=0, seed=0),
        ) as groups:
            from_s = from_slot_s = 0.0
            for step in range(1, num_steps + 1):
                if step == 3:
                    from_s, from_slot_s = clock.now_s, engine.slot_s()
                batch.extend(await groups.take())
                await clock.sleep(0.3 * 8 * 4 * 4.5 * 300 * 0.01 / slots)
                await groups.learned(step)
                groups.done()
            return (engine.slot_s() - from_slot_s) / (slots * (clock.now_s - from_s))

    return clock.run(main()), batch


def test_carrying_groups_over_keeps_an_engine_busy_that_on_policy_leaves_waiting():
    waits, _ = busy(lambda: Schedule("on_policy", groups_per_step=8, max_open_groups=8))
    works, batch = busy(lambda: Schedule("carry_over", groups_per_step=8, max_open_groups=16, max_staleness=2))
    hides, _ = busy(lambda: Schedule("one_step_off", groups_per_step=8, max_open_groups=16))
    assert waits + 0.04 < hides
    assert works > 0.8
    assert works > 1.6 * waits
    turns = [turn for group in batch for t in group.trajectories for turn in t.turns]
    assert any(len(turn.spans) > 1 for turn in turns)
    for t in turns:
        starts, ends = [start for _, start, _ in t.spans], [end for _, _, end in t.spans]
        assert starts == [0, *ends[:-1]]
        assert ends[-1] == len(t.response_ids)
