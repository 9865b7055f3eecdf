"""The simulated engine: reproducible ids, the protocol's rules, and time that is only counted."""

import asyncio
import statistics
import time

import pytest

from l0fast.engine.base import Engine, Sampling, VersionSpan
from l0fast.engine.distributions import lognormal, recorded
from l0fast.engine.simulated import Clock, CompressedClock, SimulatedClock, SimulatedEngine, Speed


def engine(clock: Clock | None = None, **changes) -> SimulatedEngine:
    return SimulatedEngine(**{"vocab_size": 100, "max_tokens": 400, "clock": clock, **changes})


def sampling(seed=0, *, max_new_tokens=64, stop=(7,)) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, stop_token_ids=stop, seed=seed)


def ask_all(simulated: Engine, jobs, run=asyncio.run):
    async def main():
        async with asyncio.TaskGroup() as tg:
            tasks = [
                tg.create_task(simulated.generate(prompt, ask, conversation=str(i)))
                for i, (prompt, ask) in enumerate(jobs)
            ]
        return [t.result() for t in tasks]

    return run(main())


def test_the_same_seed_says_the_same_whoever_shares_the_engine():
    jobs = [([1, 2, i % 50], sampling(i)) for i in range(200)]
    first = ask_all(engine(seed=3, slots=200), jobs)
    assert ask_all(engine(seed=3, slots=2), jobs) == first
    assert ask_all(engine(seed=3), jobs[:1]) == first[:1]
    assert ask_all(engine(seed=4), jobs) != first
    assert len({s.response_ids for s in first}) > 150


def test_responses_stop_by_themselves_or_at_the_limit():
    sampled = ask_all(engine(mean_response_tokens=32), [([1], sampling(i, max_new_tokens=48)) for i in range(500)])
    for s in sampled:
        assert len(s.sampler_logprobs) == len(s.response_ids) <= 48
        assert (s.finish_reason == "stop") == (s.response_ids[-1] == 7)
        assert 7 not in s.response_ids[:-1]
        assert all(-2 <= logprob <= 0 for logprob in s.sampler_logprobs)
        assert all(0 <= token < 100 for token in s.response_ids)
    assert {s.finish_reason for s in sampled} == {"stop", "length"}


def test_a_script_is_followed_to_its_first_stop_and_to_the_limit():
    def script(prompt_ids, ask, conversation):
        return [*prompt_ids, int(conversation) + 50, 7, 9, 9]

    one, two = ask_all(engine(script=script), [([1, 2], sampling()), ([3, 4, 5], sampling(max_new_tokens=2))])
    assert (one.response_ids, one.finish_reason) == ((1, 2, 50, 7), "stop")
    assert (two.response_ids, two.finish_reason) == ((3, 4), "length")


def test_time_is_counted_in_slots_and_tokens_and_nobody_waits():
    clock = SimulatedClock()
    speed = Speed(prefill_tokens_per_s=1000, step_s=1)
    simulated = engine(clock, slots=2, script=lambda *_: [1] * 10, speed=speed)
    started = time.monotonic()
    ask_all(simulated, [([1] * 100, sampling(i)) for i in range(6)], clock.run)
    # three rounds of two: 0.2 s for two prompts and the first id of each, 9 steps for the others
    assert clock.now_s == pytest.approx(3 * (0.2 + 9))
    assert time.monotonic() - started < 5


def test_a_conversation_finds_its_prefix_until_the_weights_change():
    async def main():
        simulated = engine()
        one = await simulated.generate([1] * 20, sampling(), conversation="a")
        prompt = [*[1] * 20, *one.response_ids, 5]
        two = await simulated.generate(prompt, sampling(), conversation="a")
        await simulated.update_weights(3)
        three = await simulated.generate(prompt, sampling(), conversation="a")
        return one, two, three, await simulated.load()

    one, two, three, load = asyncio.run(main())
    assert (one.cached_tokens, two.cached_tokens, three.cached_tokens) == (0, 19 + len(one.response_ids), 0)
    assert (one.policy_version, three.policy_version) == (0, 3)
    assert two.response_ids == three.response_ids
    assert (load.running, load.waiting) == (0, 0)
    assert load.used_tokens > 0


def test_cancelling_frees_the_slot():
    clock = SimulatedClock()
    simulated = engine(clock, slots=1)

    async def main():
        tasks = [asyncio.create_task(simulated.generate([1], sampling(i), conversation=str(i))) for i in range(3)]
        await asyncio.sleep(0)
        before = await simulated.load()
        for task in tasks[:2]:
            task.cancel()
        await tasks[2]
        return before, await simulated.load()

    before, after = clock.run(main())
    assert (before.running, before.waiting) == (1, 2)
    assert (after.running, after.waiting) == (0, 0)


def test_weights_may_come_while_it_samples():
    clock = SimulatedClock()
    simulated = engine(clock, script=lambda *_: [1] * 10, speed=Speed(step_s=1.0), update_s=3.0)

    async def main():
        running = asyncio.create_task(simulated.generate([1] * 20, sampling(), conversation="a"))
        await clock.sleep(4.5)
        await simulated.update_weights(2)
        return await running, clock.now_s

    sampled, now_s = clock.run(main())
    assert sampled.version_spans == (VersionSpan(0, 0, 5), VersionSpan(2, 5, 10))
    assert sampled.policy_version == 0
    assert sampled.response_ids == (1,) * 10
    assert now_s == pytest.approx(4.5 + 3 + 4, abs=0.1)


def test_replicas_work_side_by_side_and_a_conversation_stays_where_it_was():
    async def main(clock: Clock, replicas: int):
        simulated = engine(clock, slots=1, replicas=replicas, script=lambda *_: [1] * 11, speed=Speed(step_s=1.0))

        async def talk(i: int):
            one = await simulated.generate([1] * 20, sampling(), conversation=str(i))
            two = await simulated.generate([1] * 20 + [*one.response_ids, 2], sampling(), conversation=str(i))
            return two.cached_tokens

        cached = await asyncio.gather(*(talk(i) for i in range(4)))
        return clock.now_s, cached, simulated.slot_s(), await simulated.load()

    one, four = SimulatedClock(), SimulatedClock()
    one_s, cached, slot_s, load = one.run(main(one, 1))
    four_s, cached_4, slot_s_4, load_4 = four.run(main(four, 4))
    assert one_s == pytest.approx(4 * four_s, rel=0.05)
    assert cached == cached_4 == [30] * 4
    assert slot_s == pytest.approx(slot_s_4, rel=0.05)
    assert load_4.max_tokens == 4 * load.max_tokens
    assert load.decoded_tokens == load_4.decoded_tokens == 8 * 11


def test_what_is_forgotten_takes_no_room_unless_it_is_kept_as_sglang_does():
    async def main(forgets: bool):
        simulated = engine(forgets=forgets)
        await simulated.generate([1] * 20, sampling(), conversation="a")
        simulated.forget("a")
        simulated.forget("nobody")
        return (await simulated.load()).used_tokens

    assert asyncio.run(main(True)) == 0
    assert asyncio.run(main(False)) >= 20


def test_lengths_follow_the_distribution_they_are_given():
    def lengths(distribution) -> list[int]:
        simulated = engine(response_tokens=distribution, max_tokens=10_000, vocab_size=10**6)
        jobs = [([1], sampling(i, max_new_tokens=5000)) for i in range(1000)]
        return [len(s.response_ids) for s in ask_all(simulated, jobs)]

    drawn = lengths(lognormal(300, 0.5))
    assert statistics.median(drawn) == pytest.approx(300, rel=0.1)
    assert sorted(drawn)[900] == pytest.approx(300 * 1.9, rel=0.15)
    assert set(lengths(recorded([5, 50, 500]))) == {6, 51, 501}


def test_on_the_loops_own_clock_time_passes_so_many_times_as_fast():
    async def main():
        loop = asyncio.get_running_loop()
        clock = CompressedClock(1000)
        simulated = engine(clock, script=lambda *_: [1] * 20, speed=Speed(step_s=1.0))
        began = loop.time()
        await simulated.generate([1], sampling(), conversation="a")
        took = loop.time() - began
        began_s = clock.now_s
        await clock.sleep(10.0)
        return took, clock.now_s - began_s

    took, slept_s = asyncio.run(main())
    assert 0.019 < took
    assert slept_s >= 10
    with pytest.raises(ValueError, match="time_compression = 0"):
        CompressedClock(0)


def test_a_cache_that_holds_no_conversation_is_refused():
    with pytest.raises(ValueError, match="kv_tokens = 399"):
        engine(kv_tokens=399)


@pytest.mark.parametrize("odd", [100, -1, 2**32, 2**40])
def test_what_a_real_engine_refuses_is_refused(odd: int):
    with pytest.raises(ExceptionGroup) as caught:
        ask_all(engine(), [([1, 2, odd, 3], sampling())])
    assert caught.group_contains(ValueError, match=f"has id {odd}, ")


def test_a_prompt_that_grew_is_checked_where_it_is_new():
    async def main():
        simulated = engine()
        one = await simulated.generate([1] * 20, sampling(), conversation="a")
        with pytest.raises(ValueError, match="has id 100, "):
            await simulated.generate([*[1] * 20, *one.response_ids, 100], sampling(), conversation="a")

    asyncio.run(main())
