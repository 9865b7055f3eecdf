"""The simulated engine: reproducible ids, the protocol's rules, and time that is only counted."""

import asyncio
import time

import pytest

from l0fast.engine.base import Engine, Sampling
from l0fast.engine.simulated import SimulatedClock, SimulatedEngine


def engine(**changes) -> SimulatedEngine:
    return SimulatedEngine(**{"vocab_size": 100, "max_tokens": 400, **changes})


def sampling(seed=0, *, max_new_tokens=64, stop=(7,)) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, stop_token_ids=stop, seed=seed)


def ask_all(simulated: Engine, jobs):
    async def main():
        async with asyncio.TaskGroup() as tg:
            tasks = [
                tg.create_task(simulated.generate(prompt, ask, conversation=str(i)))
                for i, (prompt, ask) in enumerate(jobs)
            ]
        return [t.result() for t in tasks]

    return asyncio.run(main())


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
    simulated = engine(
        slots=2, clock=clock, script=lambda *_: [1] * 10, prefill_tokens_per_s=1000, decode_tokens_per_s=1
    )
    started = time.monotonic()
    ask_all(simulated, [([1] * 100, sampling(i)) for i in range(6)])
    # three rounds of two: 0.1 s of prompt and 10 s of response each
    assert clock.now_s == pytest.approx(30.3)
    assert time.monotonic() - started < 5


def test_sleepers_wake_in_the_order_of_their_times():
    async def main():
        clock, woken = SimulatedClock(), []

        async def sleeper(duration_s):
            await clock.sleep(duration_s)
            woken.append((duration_s, clock.now_s))

        async with asyncio.TaskGroup() as tg:
            tasks = [tg.create_task(sleeper(d)) for d in (3.0, 1.0, 2.0, 9.0)]
            await asyncio.sleep(0)
            tasks[0].cancel()
        return woken

    assert asyncio.run(main()) == [(1.0, 1.0), (2.0, 2.0), (9.0, 9.0)]


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
    async def main():
        simulated = engine(slots=1)
        tasks = [asyncio.create_task(simulated.generate([1], sampling(i), conversation=str(i))) for i in range(3)]
        await asyncio.sleep(0)
        before = await simulated.load()
        for task in tasks[:2]:
            task.cancel()
        await tasks[2]
        return before, await simulated.load()

    before, after = asyncio.run(main())
    assert (before.running, before.waiting) == (1, 2)
    assert (after.running, after.waiting) == (0, 0)


def test_what_a_real_engine_refuses_is_refused():
    with pytest.raises(ExceptionGroup) as caught:
        ask_all(engine(), [([100], sampling())])
    assert caught.group_contains(ValueError, match="has id 100")
