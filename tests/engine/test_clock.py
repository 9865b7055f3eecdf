"""The simulated clock: it moves when its loop has nothing else to do, and only then."""

import asyncio
import math
import socket
import threading

import pytest

from l0fast.engine.clock import EventClock, SimulatedClock


def test_sleepers_wake_in_the_order_of_their_times():
    clock, woken = SimulatedClock(), []

    async def sleeper(duration_s: float):
        await clock.sleep(duration_s)
        woken.append((duration_s, clock.now_s))

    async def main():
        async with asyncio.TaskGroup() as tg:
            tasks = [tg.create_task(sleeper(d)) for d in (3.0, 1.0, 2.0, 9.0, 1.0)]
            await asyncio.sleep(0)
            tasks[0].cancel()

    clock.run(main())
    assert woken == [(1.0, 1.0), (1.0, 1.0), (2.0, 2.0), (9.0, 9.0)]


def test_events_of_one_moment_happen_in_the_order_they_were_asked_for_each_with_all_that_follows_from_it():
    clock, happened = SimulatedClock(), []

    async def chain(name: str):
        await clock.sleep(1.0)
        for link in range(3):
            happened.append((name, link))
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*map(chain, "abc"))

    clock.run(main())
    assert happened == [(name, link) for name in "abc" for link in range(3)]


@pytest.mark.parametrize("turns", [1, 50, 1000])
def test_time_stands_still_however_many_turns_of_the_loop_something_takes(turns: int):
    clock, seen = SimulatedClock(), []

    async def busy():
        await clock.sleep(1.0)
        for _ in range(turns):
            await asyncio.sleep(0)
        # asked for last, and due first
        await clock.sleep(0.5)
        seen.append(clock.now_s)

    async def main():
        async with asyncio.TaskGroup() as tg:
            tg.create_task(busy())
            await clock.sleep(2.0)
            seen.append(clock.now_s)

    clock.run(main())
    assert seen == [1.5, 2.0]


def test_a_callback_of_a_callback_runs_before_the_next_event():
    clock, seen = SimulatedClock(), []

    async def main():
        loop = asyncio.get_running_loop()

        def link(left: int) -> None:
            seen.append(clock.now_s)
            if left:
                loop.call_soon(link, left - 1)

        clock.call_at(1.0, lambda: link(49))
        clock.call_at(1.0 + 1e-9, lambda: seen.append("next"))
        await clock.sleep(3.0)

    clock.run(main())
    assert seen == [1.0] * 50 + ["next"]


def test_what_lies_in_the_past_happens_now_and_time_never_goes_back():
    clock, seen = SimulatedClock(), []

    async def main():
        await clock.sleep(5.0)
        clock.call_at(1.0, lambda: seen.append(clock.now_s))
        await clock.sleep(0.0)
        await clock.sleep(-1.0)
        return clock.now_s

    assert clock.run(main()) == 5.0
    assert seen == [5.0]


def test_what_was_cancelled_neither_happens_nor_moves_time():
    clock = SimulatedClock()

    async def main():
        timers = [clock.call_at(at_s, lambda: pytest.fail("it was cancelled")) for at_s in (1.0, 2.0, 99.0)]
        for timer in timers:
            timer.cancel()
        # nothing is left to happen: a real wait
        await asyncio.sleep(0.001)
        before_s = clock.now_s
        await clock.sleep(3.0)
        return before_s, clock.now_s

    assert clock.run(main()) == (0.0, 3.0)


def test_what_comes_over_a_socket_is_served_between_events():
    """A thread writes when the first event has happened; an endless row of events is still to come."""
    clock, begun = SimulatedClock(), threading.Event()
    ours, theirs = socket.socketpair()

    def write() -> None:
        assert begun.wait(30)
        theirs.sendall(b"hello")

    async def ticks():
        while True:
            await clock.sleep(1.0)
            begun.set()

    async def main():
        reader, writer = await asyncio.open_connection(sock=ours)
        ticking = asyncio.create_task(ticks())
        try:
            async with asyncio.timeout(30):
                return await reader.readexactly(5)
        finally:
            ticking.cancel()
            writer.close()
            await writer.wait_closed()

    writing = threading.Thread(target=write)
    writing.start()
    with theirs:
        assert clock.run(main()) == b"hello"
        writing.join()
    assert clock.now_s >= 1.0


def test_a_thread_is_heard_while_events_are_pending():
    clock = SimulatedClock()

    async def main():
        async def ticks():
            while True:
                await clock.sleep(1.0)

        ticking = asyncio.create_task(ticks())
        said = await asyncio.to_thread(lambda: "done")
        ticking.cancel()
        return said

    assert clock.run(main()) == "done"


def test_a_deadline_in_real_seconds_passes_while_events_are_pending():
    clock = SimulatedClock()

    async def endless():
        async with asyncio.timeout(0.001):
            while True:
                await clock.sleep(1.0)

    with pytest.raises(TimeoutError):
        clock.run(endless())


def test_a_deadline_that_is_far_away_is_not_waited_for():
    clock = SimulatedClock()

    async def main():
        async with asyncio.timeout(3600):
            await clock.sleep(86_400.0)

    clock.run(main())
    assert clock.now_s == 86_400.0


def test_an_event_that_raises_ends_the_run_with_that():
    clock, ended = SimulatedClock(), []

    def event() -> None:
        raise KeyError("a bug")

    async def main():
        clock.call_at(1.0, event)
        try:
            await clock.sleep(2.0)
        finally:
            ended.append(clock.now_s)

    with pytest.raises(KeyError, match="a bug"):
        clock.run(main())
    assert ended == [1.0]


def test_who_cleans_up_at_the_end_may_still_take_its_time():
    clock, cleaned = SimulatedClock(), []

    async def slow():
        try:
            await clock.sleep(100.0)
        finally:
            await clock.sleep(1.0)
            cleaned.append(clock.now_s)

    async def main():
        task = asyncio.create_task(slow())
        await clock.sleep(2.0)
        return task

    assert clock.run(main()).cancelled()
    assert cleaned == [3.0]


def test_a_second_run_goes_on_where_the_first_stopped_without_what_that_left():
    clock = SimulatedClock()

    async def first():
        clock.call_at(1.5, lambda: pytest.fail("its loop is gone"))
        await clock.sleep(1.0)

    async def second():
        await clock.sleep(1.0)
        return clock.now_s

    clock.run(first())
    assert clock.run(second()) == 2.0


def test_on_a_loop_that_does_not_move_it_one_sentence_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"start with clock\.run\(main\(\)\)"):
        asyncio.run(SimulatedClock().sleep(1.0))


def test_two_runs_of_the_same_program_are_the_same():
    def history() -> list[tuple[int, float]]:
        clock, seen = SimulatedClock(), []

        async def worker(number: int):
            for turn in range(20):
                await clock.sleep(hash((number, turn)) % 1000 / 100)
                for _ in range(hash((turn, number)) % 7):
                    await asyncio.sleep(0)
                seen.append((number, clock.now_s))

        async def main():
            async with asyncio.TaskGroup() as tg:
                for number in range(30):
                    tg.create_task(worker(number))

        clock.run(main())
        return seen

    first = history()
    assert history() == first
    assert [at_s for _, at_s in first] == sorted(at_s for _, at_s in first)


def test_moved_by_hand_it_lets_happen_what_is_due_and_no_more():
    clock, happened = EventClock(), []

    def note(name: str, and_then: float | None = None):
        happened.append((name, clock.now_s))
        if and_then is not None:
            clock.call_at(clock.now_s + and_then, lambda: note(f"after {name}"))
        # nothing set going: not a reason to go on past the end
        return False

    clock.call_at(3.0, lambda: note("c"))
    clock.call_at(1.0, lambda: note("a", 1.0))
    clock.call_at(2.5, lambda: note("never")).cancel()
    clock.call_at(2.0, lambda: note("b", 7.0))
    clock.move_to(2.0)
    assert happened == [("a", 1.0), ("b", 2.0), ("after a", 2.0)]
    clock.move_to(2.75)
    assert (clock.now_s, len(happened)) == (2.75, 3)
    clock.move_to(10.0)
    assert happened[3:] == [("c", 3.0), ("after b", 9.0)]
    assert clock.now_s == 10.0
    assert not clock.has_events()


def test_a_time_that_is_no_number_is_refused_and_holds_nobody_up():
    clock = EventClock()
    with pytest.raises(ValueError, match="at_s = nan: .* give a number of seconds"):
        clock.call_at(math.nan, lambda: None)
    assert not clock.has_events()

    simulated = SimulatedClock()

    async def main() -> float:
        with pytest.raises(ValueError, match="at_s = nan"):
            await simulated.sleep(math.nan)
        await simulated.sleep(1.0)
        return simulated.now_s

    assert simulated.run(main()) == 1.0
