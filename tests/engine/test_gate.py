"""The gate: who waits goes when it is named, fails at its deadline, and leaves nothing behind when cancelled."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.engine.base import Engine, EngineLoad, Sampling
from l0fast.engine.clock import EventClock
from l0fast.engine.gate import Gate, GatedEngine, gated
from l0fast.engine.simulated import SimulatedClock, SimulatedEngine
from l0fast.errors import EngineError
from l0fast.rollout.admission import Admission

SAMPLING = Sampling(max_new_tokens=50, stop_token_ids=(7,))


def simulated(clock: SimulatedClock, **changes) -> SimulatedEngine:
    return SimulatedEngine(**{"vocab_size": 100, "max_tokens": 400, "kv_tokens": 1000, "clock": clock, **changes})


async def open_gate(engine: Engine, clock: SimulatedClock, timeout_s=60.0, **changes) -> tuple[GatedEngine, Admission]:
    admission = Admission(new_tokens=50, **changes)
    return await gated(engine, admission, timeout_s=timeout_s, clock=clock), admission


async def episode(gate: Engine, clock: SimulatedClock, name: str, turns: int = 3) -> int:
    prompt = [1] * 100
    for turn in range(turns):
        sampled = await gate.generate(prompt, SAMPLING, conversation=name)
        prompt += [*sampled.response_ids, 2, 3]
        await clock.sleep(0.1 * (turn + 1))
    gate.forget(name)
    return len(prompt)


def test_fewer_are_inside_than_ask_and_all_are_served():
    clock = SimulatedClock()

    async def main():
        gate, admission = await open_gate(simulated(clock), clock)
        most = 0

        async def watched(name: str):
            nonlocal most
            await episode(gate, clock, name)
            most = max(most, admission.num_in_flight)

        async with asyncio.TaskGroup() as tg:
            for i in range(100):
                tg.create_task(watched(str(i)))
            await asyncio.sleep(0)
            waiting = (await gate.load()).waiting
        return most, waiting, admission, await gate.load()

    most, waiting, admission, load = clock.run(main())
    assert 1 < most < 12
    assert waiting > 80
    assert (admission.num_in_flight, admission.num_waiting, load.running, load.waiting) == (0, 0, 0, 0)
    assert load.recomputed_tokens < 0.2 * load.prefill_tokens


def test_who_waits_too_long_fails_and_the_line_goes_on():
    clock = SimulatedClock()

    async def main():
        gate, admission = await open_gate(simulated(clock), clock, timeout_s=0.05)
        # it comes back never, and is not forgotten
        await gate.generate([1] * 340, SAMPLING, conversation="first")
        await gate.generate([1] * 340, SAMPLING, conversation="second")
        with pytest.raises(EngineError, match=r"waited 0\.05 s for room"):
            await gate.generate([1] * 340, SAMPLING, conversation="third")
        gate.forget("first")
        await gate.generate([1] * 340, SAMPLING, conversation="fourth")
        return admission

    admission = clock.run(main())
    assert (admission.num_waiting, admission.num_in_flight) == (0, 2)


def test_who_waits_does_not_fail_over_new_weights_while_which_the_line_can_not_move():
    clock = SimulatedClock()

    class Slow(SimulatedEngine):
        async def update_weights(self, policy_version: int) -> None:
            await clock.sleep(0.4)
            await super().update_weights(policy_version)

    async def main():
        engine = Slow(vocab_size=100, max_tokens=400, kv_tokens=1000, clock=clock)
        gate, _ = await open_gate(engine, clock, timeout_s=0.05)
        # it comes back never, and is not forgotten
        await gate.generate([1] * 340, SAMPLING, conversation="first")
        await gate.generate([1] * 340, SAMPLING, conversation="second")
        waiting = asyncio.create_task(gate.generate([1] * 340, SAMPLING, conversation="third"))
        await asyncio.sleep(0)
        start = clock.now_s
        await gate.update_weights(1)
        assert not waiting.done()
        with pytest.raises(EngineError, match=r"the last 0\.05 s without"):
            await waiting
        return clock.now_s - start

    assert clock.run(main()) == pytest.approx(0.45)


def test_who_waits_while_the_line_moves_waits_as_long_as_it_takes():
    clock = SimulatedClock()

    async def main():
        gate, _ = await open_gate(simulated(clock), clock, timeout_s=2.0)
        longest_s = 0.0

        async def watched(name: str):
            nonlocal longest_s
            began_s = clock.now_s
            await episode(gate, clock, name)
            longest_s = max(longest_s, clock.now_s - began_s)

        async with asyncio.TaskGroup() as tg:
            for i in range(100):
                tg.create_task(watched(str(i)))
        return longest_s

    assert clock.run(main()) > 10


def test_nobody_waits_for_an_episode_that_is_gone_for_good():
    clock = SimulatedClock()

    async def main():
        gate, admission = await open_gate(simulated(clock), clock, idle_limit_s=30.0)
        for name in ("first", "second"):
            await gate.generate([1] * 340, SAMPLING, conversation=name)
        await gate.generate([1] * 340, SAMPLING, conversation="third")
        return clock.now_s, admission

    now_s, admission = clock.run(main())
    assert 30 <= now_s < 40
    # both of them had been idle for long enough when somebody looked
    assert admission.num_in_flight == 1


@pytest.mark.parametrize("what", ["forget", "observe", "withdraw", "ran"])
def test_who_may_go_goes_in_the_very_moment(what):
    clock, went = EventClock(), []
    gate = Gate(Admission(max_tokens=100, new_tokens=50), clock)
    assert gate.ask("first", 60, lambda: went.append("first"))
    if what == "forget":
        gate.ran("first", 80, 0)
    assert not gate.ask("second", 60, lambda: went.append("second"))
    assert (gate.num_waiting, went) == (1, [])
    match what:
        case "forget":
            gate.forget("first")
        case "observe":
            gate.observe(EngineLoad(running=1, waiting=0, used_tokens=60, max_tokens=1000))
        case "withdraw":
            gate.withdraw("first")
        case "ran":
            # over already when its turn ends
            gate.forget("first")
            gate.ran("first", 80, 0)
    assert (gate.num_waiting, went, clock.now_s) == (0, ["second"], 0.0)


def test_the_engine_is_asked_for_its_load_once_a_second():
    clock = EventClock()
    gate = Gate(Admission(), clock)
    asked = []
    for hundredths in range(0, 300, 25):
        clock.move_to(hundredths / 100)
        if gate.wants_load():
            asked.append(clock.now_s)
    assert asked == [0.0, 1.0, 2.0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_cancelling_at_any_moment_leaves_nothing_behind(seed):
    clock, rng = SimulatedClock(), random.Random(seed)

    async def main():
        engine = simulated(clock)
        gate, admission = await open_gate(engine, clock)
        tasks = []

        async def player(name: str):
            try:
                await episode(gate, clock, name)
            finally:
                gate.forget(name)

        for i in range(30):
            tasks.append(asyncio.create_task(player(str(i))))
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            if rng.random() < 0.5:
                rng.choice(tasks).cancel()
            if rng.random() < 0.1:
                await gate.update_weights(i)
        while not all(task.done() for task in tasks):
            if rng.random() < 0.1:
                rng.choice(tasks).cancel()
            await clock.sleep(0.1 * rng.random())
        await asyncio.gather(*tasks, return_exceptions=True)
        return tasks, admission, gate, await gate.load()

    tasks, admission, gate, load = clock.run(main())
    assert all(task.cancelled() or task.exception() is None for task in tasks)
    assert (admission.num_in_flight, admission.num_waiting, admission.tokens_in_flight) == (0, 0, 0)
    assert (load.running, load.waiting, load.used_tokens) == (0, 0, 0)
    assert not gate._under_way


def test_a_second_turn_of_a_conversation_at_the_same_time_is_not_an_episodes():
    clock = SimulatedClock()

    async def main():
        gate, admission = await open_gate(simulated(clock), clock)
        async with asyncio.TaskGroup() as tg:
            turns = [tg.create_task(gate.generate([1], SAMPLING, conversation="a")) for _ in range(3)]
        gate.forget("a")
        return [t.result() for t in turns], admission

    sampled, admission = clock.run(main())
    assert sampled[0].response_ids == sampled[1].response_ids == sampled[2].response_ids
    assert admission.num_in_flight == 0


def test_a_refused_prompt_gives_its_place_back():
    clock = SimulatedClock()

    async def main():
        gate, admission = await open_gate(simulated(clock), clock)
        with pytest.raises(ValueError, match="has id 100"):
            await gate.generate([100], SAMPLING, conversation="a")
        return admission

    assert clock.run(main()).num_in_flight == 0


def test_the_load_behind_a_gate_says_what_admission_did():
    clock = SimulatedClock()

    async def main():
        gate, _ = await open_gate(simulated(clock, kv_tokens=500), clock)
        for name in ("first", "second"):
            await gate.generate([1] * 100, SAMPLING, conversation=name)
        before = await gate.load()
        # both have grown: there is no room for the turns of two
        turns = [asyncio.create_task(gate.generate([1] * 300, SAMPLING, conversation=n)) for n in ("first", "second")]
        await asyncio.sleep(0)
        load = await gate.load()
        for turn in turns:
            turn.cancel()
        await asyncio.wait(turns)
        return before, load

    before, load = clock.run(main())
    assert (before.in_flight, before.parked, before.waiting) == (2, 0, 0)
    assert (load.in_flight, load.parked, load.waiting) == (1, 1, 1)
