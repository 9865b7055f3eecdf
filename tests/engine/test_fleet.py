"""Several engines as one: requests survive their engine, weights reach all, what is silent is named. Stand-in engines."""

import asyncio
import itertools
from contextlib import asynccontextmanager

import pytest

from l0fast.config import EngineConfig
from l0fast.deadlines import deadlines_of
from l0fast.engine.base import EngineLoad, Sampling, VersionSpan
from l0fast.engine.fleet import MAX_SENDS, Fleet, Response, Silence, fleet
from l0fast.errors import EngineError, UsageError

SAMPLING = Sampling(max_new_tokens=6, stop_token_ids=())


class StandIn:
    """Samples one id a `tick`: the next number after the last id of prompt and response."""

    def __init__(self, number: int, world: "World"):
        self.number, self.world = number, world
        self.failure: str | None = None
        self.policy_version, self.answered, self.running = 0, 0, 0
        self.asleep = False
        self.forgotten: list[str] = []
        self._failed, self._tick = asyncio.Event(), asyncio.Event()

    async def extend(self, response: Response, prompt_ids, sampling, *, conversation) -> None:
        if max(prompt_ids) >= 1000:
            raise ValueError("an id outside the vocabulary")
        self.running += 1
        try:
            while not response.ends(sampling):
                self._check()
                await self._tick.wait()
                self._check()
                if self.world.refuses:
                    raise EngineError("it was not answered in time")
                n = len(response.ids)
                response.policy_version = self.policy_version
                response.add(
                    [[*prompt_ids, *response.ids][-1] + 1], [-1.0], [VersionSpan(self.policy_version, n, n + 1)]
                )
                self.answered += 1
        finally:
            self.running -= 1

    async def tick(self) -> None:
        """Everyone who waits gets an id."""
        tick, self._tick = self._tick, asyncio.Event()
        tick.set()
        await settle()

    def _check(self) -> None:
        if self.failure:
            raise EngineError(self.failure)

    async def update_weights(self, policy_version, weights) -> None:
        self._check()
        if weights in self.world.bad_weights:
            self.fail("it choked on its weights")
            raise EngineError(self.failure)
        self.policy_version, self.asleep = policy_version, False
        self.world.taken.append((self.number, weights))

    async def sleep(self) -> None:
        self._check()
        self.asleep = True

    async def failed(self) -> None:
        await self._failed.wait()

    def fail(self, why: str) -> None:
        self.failure = self.failure or why
        self._failed.set()
        self._tick.set()

    def forget(self, conversation: str) -> None:
        self.forgotten.append(conversation)

    def load(self) -> EngineLoad:
        return EngineLoad(running=self.running, waiting=0, used_tokens=7, max_tokens=100, decoded_tokens=self.answered)

    busy = property(lambda self: self.running > 0)
    progress = property(lambda self: float(self.answered))


class World:
    """What makes engines and weights."""

    def __init__(self):
        self.published = 0
        self.engines: list[StandIn] = []
        self.taken: list[tuple[int, str]] = []
        self.bad_weights: set[str] = set()
        self.refuses = False
        self.starts: list[Exception] = []
        """What the next starts fail with."""
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.log: list[str] = []

    @asynccontextmanager
    async def make(self, number: int):
        await self.may_start.wait()
        if self.starts:
            raise self.starts.pop(0)
        engine = StandIn(number, self)
        self.engines.append(engine)
        try:
            yield engine
        finally:
            engine.fail("it was closed")
            await self.may_end.wait()

    @asynccontextmanager
    async def weights(self, engines):
        yield self.published, {number: f"v{self.published} for {number}" for number in engines}

    async def update(self, running: Fleet, version: int) -> None:
        self.published = version
        await running.update_weights(version)

    def open(self, count: int = 2, **settings):
        config = EngineConfig(**{"slots": 4 * count, "max_rebuilds": 3} | settings)
        return fleet(self.make, count, source=self, config=config, log=self.log.append)


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


async def ask(running: Fleet, names: str) -> dict[str, asyncio.Task]:
    tasks = {name: asyncio.create_task(running.generate([10], SAMPLING, conversation=name)) for name in names}
    await settle()
    return tasks


async def finish(world: World, tasks) -> list:
    for _ in range(60):
        for engine in world.engines:
            await engine.tick()
    return [task.result() for task in (tasks.values() if isinstance(tasks, dict) else tasks)]


def play(main) -> None:
    async def limited():
        async with asyncio.timeout(20):
            await main(World())

    asyncio.run(limited())


def test_requests_of_a_dead_engine_go_on_at_another_one_from_the_ids_they_had():
    async def main(world):
        async with world.open() as running:
            tasks = await ask(running, "abcd")
            first = world.engines[0]
            for engine in world.engines:
                await engine.tick()
                await engine.tick()
            world.may_start.clear()
            first.fail("killed")
            await settle()
            assert world.engines[1].running == 4
            for sampled in await finish(world, tasks):
                assert sampled.response_ids == (11, 12, 13, 14, 15, 16)
                assert len(sampled.sampler_logprobs) == 6
                assert sampled.finish_reason == "length"
            # the dead one's ids were not sampled again
            assert sum(engine.answered for engine in world.engines) == 4 * 6

    play(main)


def test_with_one_engine_requests_wait_for_it_to_be_back():
    async def main(world):
        async with world.open(1) as running:
            world.may_start.clear()
            tasks = await ask(running, "ab")
            world.engines[0].fail("killed")
            await settle()
            late = await ask(running, "c")
            assert not any(task.done() for task in (tasks | late).values())
            world.may_start.set()
            await settle()
            assert all(s.response_ids[-1] == 16 for s in await finish(world, tasks | late))
            assert len(world.engines) == 2
        assert "engine 0 died: killed; rebuild 1 of 3" in world.log[0]

    play(main)


def test_an_episodes_time_stands_still_while_no_engine_is_up():
    async def main(world):
        async with world.open(1) as running:
            world.may_start.clear()
            world.engines[0].fail("killed")
            await settle()
            async with asyncio.timeout(60) as whole:
                with deadlines_of(whole):
                    [asked] = (await ask(running, "a")).values()
                    assert whole.when() is None
                    world.may_start.set()
                    await settle()
                    assert whole.when() is not None
                    await finish(world, [asked])

    play(main)


def test_a_rebuilt_engine_has_the_weights_of_the_others():
    async def main(world):
        async with world.open() as running:
            await world.update(running, 5)
            world.engines[0].fail("killed")
            await settle()
            assert world.engines[2].policy_version == 5
            assert world.taken == [(0, "v5 for 0"), (1, "v5 for 1"), (0, "v5 for 0")]

    play(main)


def test_what_the_learner_published_meanwhile_is_what_a_rebuilt_engine_says_it_has():
    async def main(world):
        async with world.open(1) as running:
            await world.update(running, 5)
            world.published = 6
            world.engines[0].fail("killed")
            await settle()
            assert world.engines[1].policy_version == 6

    play(main)


def test_an_engine_that_can_not_take_weights_is_rebuilt_with_them():
    async def main(world):
        async with world.open() as running:
            world.bad_weights = {"v1 for 0"}
            tasks = await ask(running, "abcd")
            world.may_start.clear()
            await world.update(running, 1)
            assert [e.policy_version for e in world.engines] == [0, 1]
            world.bad_weights = set()
            world.may_start.set()
            await settle()
            assert world.engines[2].policy_version == 1
            assert all(s.version_spans == (VersionSpan(1, 0, 6),) for s in await finish(world, tasks))

    play(main)


def test_an_update_that_no_engine_survives_returns_when_one_is_back_with_it():
    async def main(world):
        async with world.open(1) as running:
            world.bad_weights = {"v1 for 0"}
            world.may_start.clear()
            updating = asyncio.create_task(world.update(running, 1))
            await settle()
            assert not updating.done()
            world.bad_weights = set()
            world.may_start.set()
            await updating
            assert world.engines[1].policy_version == 1

    play(main)


def test_an_update_to_what_the_learner_has_not_is_an_error():
    async def main(world):
        async with world.open() as running:
            with pytest.raises(EngineError, match="version 0, not 3"):
                await running.update_weights(3)

    play(main)


def test_a_request_that_engines_die_of_is_given_up_and_the_others_are_not():
    async def main(world):
        async with world.open(2) as running:
            poison = (await ask(running, "p"))["p"]
            for _ in range(MAX_SENDS):
                assert not poison.done()
                (sick,) = [engine for engine in world.engines if engine.running]
                sick.fail("poisoned")
                await settle()
            with pytest.raises(EngineError, match=f"{MAX_SENDS} engines died .* poisoned"):
                await poison
            assert [s.response_ids[-1] for s in await finish(world, await ask(running, "ab"))] == [16, 16]

    play(main)


def test_rebuilds_are_bounded_and_then_everything_asked_is_an_error():
    async def main(world):
        async with world.open(1, max_rebuilds=2) as running:
            for _ in range(3):
                waiting = await ask(running, "a")
                world.engines[-1].fail("killed")
                await settle()
            with pytest.raises(EngineError, match="no engine is left.*killed"):
                await waiting["a"]
            for call in (running.load(), world.update(running, 1), running.generate([1], SAMPLING, conversation="b")):
                with pytest.raises(EngineError, match="no engine is left"):
                    await call
        assert len(world.engines) == 3

    play(main)


def test_rebuilds_of_another_day_count_no_more(monkeypatch):
    async def main(world):
        async with world.open(1, max_rebuilds=1) as running:
            monkeypatch.setattr("l0fast.engine.fleet.REBUILDS_S", 0.0)
            for _ in range(3):
                world.engines[-1].fail("killed")
                await settle()
            monkeypatch.undo()
            assert [s.response_ids[-1] for s in await finish(world, await ask(running, "a"))] == [16]
            # the last one counts
            waiting = await ask(running, "b")
            world.engines[-1].fail("killed")
            await settle()
            with pytest.raises(EngineError, match="died 2 times in a day and is not rebuilt any more.*killed"):
                await waiting["b"]
        assert len(world.engines) == 4

    play(main)


def test_one_engine_that_is_given_up_leaves_the_others_at_work():
    async def main(world):
        async with world.open(2, max_rebuilds=0) as running:
            tasks = await ask(running, "abcd")
            world.engines[0].fail("killed")
            await settle()
            assert [s.response_ids[-1] for s in await finish(world, tasks)] == [16] * 4

    play(main)


def test_a_rebuild_that_does_not_start_is_tried_again(monkeypatch):
    monkeypatch.setattr("l0fast.engine.fleet._AGAIN_S", 0.0)

    async def main(world):
        async with world.open(1) as running:
            world.starts = [EngineError("no memory"), EngineError("no memory yet")]
            world.engines[0].fail("killed")
            await settle()
            assert len(world.engines) == 2
            assert [s.response_ids[-1] for s in await finish(world, await ask(running, "a"))] == [16]

    play(main)


@pytest.mark.parametrize("error", [EngineError("no memory"), UsageError("no such model")])
def test_a_first_start_that_fails_is_not_tried_again(error):
    async def main(world):
        world.starts = [error]
        with pytest.raises(type(error), match=str(error)):
            async with world.open():
                raise AssertionError("it started")
        assert all(engine.failure for engine in world.engines)

    play(main)


def test_what_an_engine_refuses_is_not_sent_again():
    async def main(world):
        async with world.open() as running:
            with pytest.raises(ValueError, match="vocabulary"):
                await running.generate([1000], SAMPLING, conversation="a")
            world.refuses = True
            late = (await ask(running, "b"))["b"]
            with pytest.raises(EngineError, match="in time"):
                await finish(world, [late])
            assert running._placement.requests == (0, 0)
            assert len(world.engines) == 2

    play(main)


def test_a_cancelled_request_leaves_its_engine():
    async def main(world):
        async with world.open() as running:
            task = (await ask(running, "a"))["a"]
            task.cancel()
            await settle()
            assert [engine.running for engine in world.engines] == [0, 0]
            assert running._placement.requests == (0, 0)

    play(main)


def test_the_watchdog_names_an_engine_that_was_asked_and_says_nothing():
    async def main(world):
        # time that passes is not what is tested here
        async with world.open(stall_timeout_s=0.02) as running:
            task = (await ask(running, "a"))["a"]
            world.may_start.clear()
            (stuck,) = [engine for engine in world.engines if engine.running]
            await stuck.failed()
            assert f"engine {stuck.number} has 1 requests and has said nothing" in stuck.failure
            other = world.engines[1 - stuck.number]
            assert other.failure is None
            await settle()
            assert other.running == 1
            task.cancel()

    play(main)


def test_silence_counts_only_while_something_is_owed_and_nothing_is_said():
    silence = Silence()
    assert silence.observe(100.0, busy=False, progress=1.0) == 0
    assert silence.observe(200.0, busy=False, progress=1.0) == 0
    assert silence.observe(210.0, busy=True, progress=1.0) == 10
    assert silence.observe(230.0, busy=True, progress=1.0) == 30
    assert silence.observe(240.0, busy=True, progress=2.0) == 0
    assert silence.observe(245.0, busy=True, progress=2.0) == 5


def test_sleeping_engines_wake_with_new_weights_and_none_is_rebuilt_meanwhile():
    async def main(world):
        async with world.open() as running:
            await running.sleep()
            assert [engine.asleep for engine in world.engines] == [True, True]
            world.engines[0].fail("killed")
            await settle()
            assert len(world.engines) == 2
            await world.update(running, 1)
            await settle()
            assert [(e.asleep, e.policy_version) for e in world.engines[1:]] == [(False, 1)] * 2

    play(main)


def test_the_learner_waits_for_an_engine_that_is_being_rebuilt_which_then_sleeps_too():
    async def main(world):
        async with world.open() as running:
            await world.update(running, 1)
            world.may_start.clear()
            world.engines[0].fail("killed")
            await settle()
            sleeping = asyncio.create_task(running.sleep())
            await settle()
            assert world.engines[1].asleep
            assert not sleeping.done()
            world.may_start.set()
            await sleeping
            assert [engine.asleep for engine in world.engines[1:]] == [True, True]
            await world.update(running, 2)
            assert [(e.asleep, e.policy_version) for e in world.engines[1:]] == [(False, 2)] * 2
            assert [s.response_ids[-1] for s in await finish(world, await ask(running, "ab"))] == [16, 16]

    play(main)


def test_a_rebuild_that_fails_while_the_learner_waits_is_tried_again_after_the_waking(monkeypatch):
    monkeypatch.setattr("l0fast.engine.fleet._AGAIN_S", 0.0)

    async def main(world):
        async with world.open() as running:
            world.may_start.clear()
            world.starts = [EngineError("no memory")]
            world.engines[0].fail("killed")
            await settle()
            sleeping = asyncio.create_task(running.sleep())
            await settle()
            world.may_start.set()
            await sleeping
            await settle()
            assert len(world.engines) == 2
            await world.update(running, 1)
            await settle()
            assert [(e.asleep, e.policy_version) for e in world.engines[1:]] == [(False, 1)] * 2

    play(main)


def test_the_learner_waits_for_the_memory_of_an_engine_that_is_being_ended():
    async def main(world):
        async with world.open() as running:
            world.may_end.clear()
            world.engines[0].fail("killed")
            sleeping = asyncio.create_task(running.sleep())
            await settle()
            waited = not sleeping.done()
            world.may_end.set()
            await sleeping
            await settle()
            assert waited
            assert len(world.engines) == 2

    play(main)


def test_the_load_is_of_all_engines_and_work_done_by_dead_ones_counts():
    async def main(world):
        async with world.open() as running:
            await finish(world, await ask(running, "ab"))
            world.engines[0].fail("killed")
            await settle()
            load = await running.load()
            assert (load.decoded_tokens, load.used_tokens, load.max_tokens) == (12, 14, 200)

    play(main)


def test_an_episode_that_is_over_is_forgotten_everywhere():
    async def main(world):
        async with world.open() as running:
            await finish(world, await ask(running, "a"))
            running.forget("a")
            assert [engine.forgotten for engine in world.engines] == [["a"], ["a"]]
            assert not running._placement.homes

    play(main)


def test_a_bug_in_making_an_engine_ends_the_block():
    async def main(world):
        async with world.open(1):
            world.starts = [KeyError("bug")]
            world.engines[0].fail("killed")
            await asyncio.sleep(10)

    with pytest.raises(KeyError, match="bug"):
        play(main)


def test_what_the_body_raises_comes_out_as_it_is():
    async def main(world):
        with pytest.raises(KeyError, match="body"):
            async with world.open():
                raise KeyError("body")
        assert all(engine.failure for engine in world.engines)

    play(main)


def test_a_response_ends_at_its_stop_id_or_its_length():
    sampling = Sampling(max_new_tokens=3, stop_token_ids=(9,))
    for ids, reason in (([1, 2], None), ([1, 2, 3], "length"), ([9], "stop"), ([1, 2, 9], "stop"), ([9, 1], None)):
        response = Response()
        response.add(ids, [0.0] * len(ids), [VersionSpan(1, 0, len(ids))])
        assert response.ends(sampling) == (reason is not None)
        assert response.finish_reason == reason


def test_neighbouring_spans_of_one_version_are_one():
    response = Response(finish_reason="length")
    for version, (start, end) in zip((1, 1, 2), itertools.pairwise((0, 2, 5, 6)), strict=True):
        response.add([7] * (end - start), [0.0] * (end - start), [VersionSpan(version, start, end)])
    assert response.sampled().version_spans == (VersionSpan(1, 0, 5), VersionSpan(2, 5, 6))
    assert response.sampled().policy_version == 1
