import asyncio
import contextlib
import dataclasses
import gc
import itertools
import logging
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stamina
from hypothesis import given
from hypothesis import strategies as st

from l0fast.errors import ToolError, UsageError
from l0fast.sandbox.base import HostTool, ToolSpec
from l0fast.tools import cache
from l0fast.tools.broker import Passing, ToolPolicy, open_broker


@pytest.fixture(autouse=True)
def no_backoff() -> Iterator[None]:
    with stamina.set_testing(True, attempts=10, cap=True):
        yield


def tool(call: HostTool, signature: str = "(query: str) -> str", name: str = "search") -> ToolSpec:
    return ToolSpec(name=name, signature=signature, doc="Finds things.", call=call)


class Held:
    """A tool whose calls answer when they are told to."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self.running = self.most_running = 0
        self.go = asyncio.Event()

    async def __call__(self, query: str) -> list[str]:
        self.started.append(query)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            # ending takes a while
            await settle()
            self.cancelled.append(query)
            raise
        finally:
            self.running -= 1
        return [query]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def brokered(
    call: HostTool, policy: ToolPolicy | None = None, file: Path | None = None, mode: Any = "use"
) -> Any:
    async with open_broker(file, mode) as broker:
        return await broker.wrap(tool(call), policy or ToolPolicy()).call("Oslo")


def failing(*errors: BaseException) -> tuple[HostTool, list[str]]:
    """A tool that raises these, then answers; and its calls."""
    calls: list[str] = []

    async def call(query: str) -> str:
        calls.append(query)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return "found"

    return call, calls


def test_a_wrapped_tool_looks_the_same_and_answers():
    async def call(query: str, k: int = 3) -> dict[str, Any]:
        return {"query": query, "k": k, "pair": (1, 2.5)}

    async def main() -> None:
        spec = tool(call, "(query: str, k: int = 3) -> dict")
        async with open_broker() as broker:
            wrapped = broker.wrap(spec)
            assert (wrapped.name, wrapped.signature, wrapped.doc) == (spec.name, spec.signature, spec.doc)
            assert await wrapped.call("Oslo", k=4) == {"query": "Oslo", "k": 4, "pair": [1, 2.5]}

    asyncio.run(main())


# one running call


def test_identical_calls_share_one_and_later_ones_are_answered_from_memory():
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held)).call
            async with asyncio.TaskGroup() as group:
                same = [group.create_task(search("Oslo")), group.create_task(search(query="Oslo"))]
                other = group.create_task(search("Rome"))
                await settle()
                held.go.set()
            assert [task.result() for task in same] == [["Oslo"], ["Oslo"]]
            assert other.result() == ["Rome"]
            assert await search("Oslo") == ["Oslo"]
            assert held.started == ["Oslo", "Rome"]
            step = broker.take_step()
            assert (step["tools/search/calls"], step["tools/search/shared"], step["tools/search/hits"]) == (4, 1, 1)

    asyncio.run(main())


def test_calls_that_ended_are_not_held_on_to():
    def num_tasks() -> int:
        gc.collect()
        # by type: isinstance would ask objects of other libraries, which may answer with a warning
        return len([o for o in gc.get_objects() if type(o) is asyncio.Task])

    async def main() -> None:
        held = Held()
        held.go.set()
        # other tests may have left some that nobody awaits
        before = num_tasks()
        async with open_broker(max_entries=1) as broker:
            search = broker.wrap(tool(held)).call
            for i in range(50):
                await search(str(i))
            await settle()
            assert num_tasks() - before <= 5

    asyncio.run(main())


def test_every_caller_gets_a_copy_of_its_own():
    async def main() -> None:
        held = Held()
        held.go.set()
        async with open_broker() as broker:
            search = broker.wrap(tool(held)).call
            first, second = await asyncio.gather(search("Oslo"), search("Oslo"))
            first.append("mine")
            assert second == ["Oslo"] == await search("Oslo")

    asyncio.run(main())


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_cancelled_waiter_leaves_the_others_their_answer(leaver: int):
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held)).call
            waiters = [asyncio.create_task(search("Oslo")) for _ in range(2)]
            await settle()
            waiters[leaver].cancel()
            await settle()
            assert waiters[leaver].cancelled()
            held.go.set()
            assert await waiters[1 - leaver] == ["Oslo"]
            assert held.cancelled == []

    asyncio.run(main())


def test_the_last_waiter_to_leave_ends_the_call_and_waits_for_its_end():
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held), ToolPolicy(max_concurrent=1)).call
            waiters = [asyncio.create_task(search("Oslo")) for _ in range(3)]
            await settle()
            for waiter in waiters:
                waiter.cancel()
            await asyncio.wait(waiters)
            assert all(waiter.cancelled() for waiter in waiters)
            assert held.cancelled == ["Oslo"]
            # its slot is free and nothing is kept
            held.go.set()
            assert await search("Oslo") == ["Oslo"]
            assert held.started == ["Oslo", "Oslo"]

    asyncio.run(main())


def test_a_caller_that_comes_while_an_abandoned_call_ends_gets_a_new_one():
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held)).call
            leaver = asyncio.create_task(search("Oslo"))
            await settle()
            leaver.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert held.cancelled == []
            newcomer = asyncio.create_task(search("Oslo"))
            await settle()
            assert held.cancelled == ["Oslo"]
            # the end of the first did not forget the second
            third = asyncio.create_task(search("Oslo"))
            await settle()
            held.go.set()
            assert await asyncio.gather(newcomer, third) == [["Oslo"], ["Oslo"]]
            assert held.started == ["Oslo", "Oslo"]

    asyncio.run(main())


@pytest.mark.parametrize("cache", [True, False])
def test_a_caller_that_is_cancelled_already_is_cancelled(cache: bool):
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held), ToolPolicy(cache=cache)).call

            async def cancelled_already() -> None:
                me = asyncio.current_task()
                assert me is not None
                me.cancel()
                await search("Oslo")

            waiter = asyncio.create_task(cancelled_already())
            await asyncio.wait([waiter])
            assert waiter.cancelled()
            held.go.set()
            assert await search("Oslo") == ["Oslo"]

    asyncio.run(main())


def test_a_call_that_has_not_begun_ends_with_the_broker():
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            waiter = asyncio.create_task(broker.wrap(tool(held)).call("Oslo"))
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="the broker was left"):
            await waiter
        assert held.started == []

    asyncio.run(main())


def test_an_answer_that_comes_with_the_cancelling_is_kept():
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held)).call
            waiter = asyncio.create_task(search("Oslo"))
            await settle()
            held.go.set()
            # the tool's task runs in the next round, its waiter in a later one
            await asyncio.sleep(0)
            waiter.cancel()
            await asyncio.wait([waiter])
            assert waiter.cancelled()
            assert await search("Oslo") == ["Oslo"]
            assert held.started == ["Oslo"]

    asyncio.run(main())


@given(st.lists(st.tuples(st.sampled_from(["call", "cancel", "finish", "turn"]), st.integers(0, 5)), max_size=30))
def test_whoever_stays_is_answered_whatever_the_others_do(events: list[tuple[str, int]]):
    async def main() -> None:
        held: dict[str, list[asyncio.Future[None]]] = {"a": [], "b": []}
        running = {"a": 0, "b": 0}

        async def call(query: str) -> str:
            running[query] += 1
            # one abandoned call may still be ending, but only one that somebody waits for runs
            try:
                held[query].append(future := asyncio.get_running_loop().create_future())
                await future
            finally:
                running[query] -= 1
            return query.upper()

        async with open_broker() as broker:
            search = broker.wrap(tool(call)).call
            waiters: list[tuple[str, asyncio.Task[str]]] = []
            left: set[asyncio.Task[str]] = set()
            for event, i in events:
                query = "ab"[i % 2]
                match event:
                    case "call":
                        waiters.append((query, asyncio.create_task(search(query))))
                    case "cancel" if i < len(waiters) and waiters[i][1].cancel():
                        left.add(waiters[i][1])
                    case "finish":
                        for future in held[query]:
                            if not future.done():
                                future.set_result(None)
                    case "turn":
                        await asyncio.sleep(0)
                assert max(running.values()) <= 2
            await settle()
            assert max(running.values()) <= 1
            assert sum(running.values()) <= len([w for _, w in waiters if not w.done()])
            for future in itertools.chain(*held.values()):
                if not future.done():
                    future.set_result(None)
            await settle()
            for query, waiter in waiters:
                assert waiter.done()
                assert waiter.cancelled() if waiter in left else waiter.result() == query.upper()
            assert sum(running.values()) == 0

    asyncio.run(main())


def test_a_bug_in_a_tools_ending_reaches_the_last_to_leave():
    async def call(query: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise KeyError("bug")

    async def main() -> None:
        async with open_broker() as broker:
            waiter = asyncio.create_task(broker.wrap(tool(call)).call("Oslo"))
            await settle()
            waiter.cancel()
            with pytest.raises(KeyError, match="bug"):
                await waiter

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "cache"),
    # in its caller's own task a tool's ToolError has the last word, as without a broker
    [(ConnectionResetError("last words"), True), (ConnectionResetError("last words"), False), (ToolError("no"), True)],
)
def test_the_worlds_last_words_do_not_undo_a_cancelling(error: Exception, cache: bool):
    calls = []

    async def call(query: str) -> None:
        calls.append(query)
        try:
            await asyncio.Event().wait()
        finally:
            raise error

    async def main() -> None:
        async with open_broker() as broker:
            waiter = asyncio.create_task(broker.wrap(tool(call), ToolPolicy(cache=cache)).call("Oslo"))
            await settle()
            waiter.cancel()
            await asyncio.wait([waiter])
            assert waiter.cancelled()
            assert calls == ["Oslo"]

    asyncio.run(main())


def test_leaving_the_broker_ends_what_runs_and_tells_who_waits():
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held)).call
            waiter = asyncio.create_task(search("Oslo"))
            await settle()
        assert held.cancelled == ["Oslo"]
        with pytest.raises(RuntimeError, match=r"left while search\(\) was running"):
            await waiter
        with pytest.raises(RuntimeError, match="after its broker was left"):
            await search("Oslo")
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_cancelling_nobody_asked_for_is_a_bug():
    async def call(query: str) -> None:
        raise asyncio.CancelledError

    for policy in ToolPolicy(), ToolPolicy(cache=False):
        with pytest.raises(RuntimeError, match="nobody cancelled it"):
            asyncio.run(brokered(call, policy))


def test_a_tool_without_a_cache_is_called_every_time():
    async def main() -> None:
        call, calls = failing()
        async with open_broker() as broker:
            search = broker.wrap(tool(call), ToolPolicy(cache=False)).call
            await asyncio.gather(search("Oslo"), search("Oslo"))
            await search("Oslo")
            assert len(calls) == 3

    asyncio.run(main())


# slots, time, tries


@pytest.mark.parametrize("cache", [True, False])
def test_no_more_run_than_there_are_slots(cache: bool):
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held), ToolPolicy(max_concurrent=2, cache=cache)).call
            async with asyncio.TaskGroup() as group:
                for i in range(7):
                    group.create_task(search(str(i)))
                await settle()
                assert held.running == 2
                held.go.set()
            assert held.most_running == 2
            assert sorted(held.started) == list("0123456")

    asyncio.run(main())


def test_waiting_for_a_slot_has_a_deadline_and_is_not_tried_again():
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held), ToolPolicy(max_concurrent=1, queue_timeout_s=0.01)).call
            first = asyncio.create_task(search("Oslo"))
            await settle()
            with pytest.raises(
                ToolError, match=r"search\(\) gave no answer in 1 attempt \(no free slot within 0.01 s\)"
            ):
                await search("Rome")
            held.go.set()
            assert await first == ["Oslo"]
            assert await search("Rome") == ["Rome"]
            step = broker.take_step()
            assert (step["tools/search/failures"], step["tools/search/retries"]) == (1, 0)

    asyncio.run(main())


def test_a_tool_that_does_not_answer_is_tried_again_and_given_up():
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held), ToolPolicy(timeout_s=0.01, attempts=2)).call
            with pytest.raises(ToolError, match=r"search\(\) gave no answer in 2 attempts \(timeout after 0.01 s\)"):
                await search("Oslo")
            assert held.cancelled == ["Oslo", "Oslo"]
            assert held.running == 0

    asyncio.run(main())


def test_passing_failures_are_tried_again():
    async def main() -> None:
        call, calls = failing(ConnectionResetError(), TimeoutError())
        async with open_broker() as broker:
            assert await broker.wrap(tool(call)).call("Oslo") == "found"
            assert len(calls) == 3
            step = broker.take_step()
            assert (step["tools/search/retries"], step["tools/search/failures"]) == (2, 0)

    asyncio.run(main())


def test_failures_that_stay_become_one_sentence_without_their_text():
    call, calls = failing(*[ConnectionResetError("https://example.org/?key=hush")] * 9)
    with pytest.raises(ToolError) as caught:
        asyncio.run(brokered(call, ToolPolicy(attempts=4)))
    assert str(caught.value) == (
        "search() gave no answer in 4 attempts (ConnectionResetError): try later, or do without"
    )
    assert len(calls) == 4


def test_a_slot_is_free_while_a_failed_call_waits_for_its_next_try():
    order: list[str] = []

    async def call(query: str) -> str:
        order.append(query)
        await asyncio.sleep(0)
        if order == ["a"]:
            raise OSError
        return query

    async def main() -> None:
        async with open_broker() as broker:
            search = broker.wrap(tool(call), ToolPolicy(max_concurrent=1)).call
            assert await asyncio.gather(search("a"), search("b")) == ["a", "b"]

    asyncio.run(main())
    assert order == ["a", "b", "a"]


def test_cancelling_between_two_tries_ends_the_call():
    async def main() -> None:
        call, calls = failing(OSError(), OSError())
        async with open_broker() as broker:
            waiter = asyncio.create_task(broker.wrap(tool(call), ToolPolicy(backoff_s=3600)).call("Oslo"))
            await settle()
            waiter.cancel()
            await asyncio.wait([waiter])
            assert waiter.cancelled()
            assert calls == ["Oslo"]

    with stamina.set_testing(False):
        asyncio.run(main())


def test_retries_are_not_written_to_stderr(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    # without pytest's own handlers, as in a run
    monkeypatch.setattr(logging.getLogger("stamina"), "propagate", False)
    call, _ = failing(OSError())
    asyncio.run(brokered(call))
    assert capfd.readouterr() == ("", "")


# who is told what


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("error", [ToolError("no such page"), KeyError("bug")], ids=["ToolError", "bug"])
def test_other_errors_reach_the_caller_after_one_try_and_are_never_kept(error: Exception, cache: bool):
    async def main() -> None:
        call, calls = failing(error)
        async with open_broker() as broker:
            search = broker.wrap(tool(call), ToolPolicy(cache=cache)).call
            with pytest.raises(type(error), match=str(error)):
                await search("Oslo")
            assert await search("Oslo") == "found"
            assert len(calls) == 2
            assert broker.take_step()["tools/search/failures"] == 0

    asyncio.run(main())


def test_wrong_arguments_are_a_type_error_and_call_nothing():
    async def main() -> None:
        call, calls = failing()
        async with open_broker() as broker:
            search = broker.wrap(tool(call), ToolPolicy(cache=False)).call
            for args, kw in [((), {}), ((5,), {}), (("x", "y"), {}), (("x",), {"self": 1}), (("x",), {"query": "y"})]:
                with pytest.raises(TypeError, match=r"search\(\) does not take these arguments"):
                    await search(*args, **kw)
            assert calls == []
            assert broker.take_step()["tools/search/calls"] == 0

    asyncio.run(main())


def test_a_type_error_for_right_arguments_is_a_bug_that_agents_never_see():
    with pytest.raises(RuntimeError, match="tool search failed"):
        asyncio.run(brokered(failing(TypeError("deep inside"))[0]))


@dataclasses.dataclass
class Page:
    title: str
    words: set[str]


def giving(result: Any) -> HostTool:
    async def call(query: str) -> Any:
        return result

    return call


@pytest.mark.parametrize("secrets", [(), ("hush",)])
@pytest.mark.parametrize(
    ("result", "arrives"),
    [
        ("a\ud800b", "a\ufffdb"),
        ({"\udfff": [("\ud83d\ude00", {"x\udc80"}), None]}, {"\ufffd": [["\U0001f600", ["x\ufffd"]], None]}),
        ([Page("\ud800", {"b", "a"}), Page("c", set())], [{"title": "\ufffd", "words": ["a", "b"]}, {"title": "c", "words": []}]),
        (np.array(["\ud800"]), ["\ufffd"]),
        ({10, 9, 2}, [2, 9, 10]),
        ({"b", 1, "a"}, ["a", "b", 1]),
        ({"n": np.int64(3), "a": np.arange(4.0).reshape(2, 2)}, {"n": 3, "a": [[0.0, 1.0], [2.0, 3.0]]}),
        ([math.nan, -math.inf, np.float32("nan"), 1.5], [None, None, None, 1.5]),
    ],
)  # fmt: skip
def test_what_json_can_say_of_a_result_arrives(result: Any, arrives: Any, secrets: tuple[str, ...]):
    assert asyncio.run(brokered(giving(result), ToolPolicy(secrets=secrets))) == arrives


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (object(), "object object at .* not JSON serializable: object"),
        ({2020: 3.5}, r"\{2020: 3.5\}, .*Dict key must be str"),
        ({2020: "\ud800"}, "Dict key must be str"),
        (b"text", "not JSON serializable: bytes"),
        ({"key": "hush", "value": b""}, r"\{'key': '\*\*\*'"),
    ],
)
def test_a_result_that_json_can_not_say_is_shown_with_the_way_out(result: Any, why: str):
    with pytest.raises(UsageError, match=f"the tool search gave .*{why}.*: return text, numbers, .* keys are text"):
        asyncio.run(brokered(giving(result), ToolPolicy(secrets=("hush",))))


def test_an_integer_beyond_64_bits_is_told_to_the_agent_whose_arguments_led_there():
    with pytest.raises(ToolError, match=r"search\(\) found an integer beyond 64 bits"):
        asyncio.run(brokered(giving([2**64])))


@pytest.mark.parametrize("error", [ToolError("no \ud800"), Passing("no \ud800")])
def test_half_of_a_surrogate_pair_in_what_a_tool_says_of_a_failure_is_no_end_of_a_run(error: Exception):
    with pytest.raises(ToolError, match="no \ufffd"):
        asyncio.run(brokered(failing(*[error] * 9)[0]))


@pytest.mark.parametrize("cache", [True, False])
def test_secrets_are_blanked_in_results(cache: bool):
    async def call(query: str) -> Any:
        return {
            "url": "https://x.org/?key=s3/cr+et&short=s3",
            "s3/cr+et": [1, ("s3%2Fcr%2Bet", "s3/cr%2Bet")],
            "n": None,
        }

    result = asyncio.run(brokered(call, ToolPolicy(secrets=("s3", "s3/cr+et"), cache=cache)))
    assert result == {"url": "https://x.org/?key=***&short=***", "***": [1, ["***", "***"]], "n": None}


def test_secrets_are_blanked_in_tool_errors():
    with pytest.raises(ToolError) as caught:
        asyncio.run(brokered(failing(ToolError("GET /?key=hush: 404"))[0], ToolPolicy(secrets=("hush",))))
    assert str(caught.value) == "GET /?key=***: 404"


def test_secrets_are_blanked_in_what_is_left_of_passing_failures():
    call, _ = failing(*[Passing("GET /?key=hush: 503")] * 9)
    with pytest.raises(ToolError) as caught:
        asyncio.run(brokered(call, ToolPolicy(secrets=("hush",), attempts=2)))
    assert str(caught.value) == ("search() gave no answer in 2 attempts (GET /?key=***: 503): try later, or do without")


def test_a_policy_does_not_show_its_secrets():
    assert "hush" not in repr(ToolPolicy(secrets=("hush",)))


# the file


def test_a_recording_is_replayed_without_a_call(tmp_path: Path):
    file = tmp_path / "recording.db"
    call, calls = failing()
    assert asyncio.run(brokered(call, file=file, mode="record")) == "found"

    async def never(query: str) -> None:
        raise AssertionError("called")

    async def replay() -> None:
        async with open_broker(file, "replay") as broker:
            search = broker.wrap(tool(never)).call
            assert await search("Oslo") == await search(query="Oslo") == "found"
            with pytest.raises(ToolError, match=r"the recording has no answer to this call of search\(\)"):
                await search("Rome")
            step = broker.take_step()
            assert (step["tools/search/hits"], step["tools/search/failures"]) == (2, 1)

    asyncio.run(replay())
    assert [p.name for p in tmp_path.iterdir()] == ["recording.db"]


def test_a_recorder_makes_every_call_anew(tmp_path: Path):
    file, counter = tmp_path / "recording.db", itertools.count()

    async def call(query: str) -> int:
        return next(counter)

    async def main(mode: Any) -> list[int]:
        async with open_broker(file, mode) as broker:
            search = broker.wrap(tool(call)).call
            return [await search("Oslo"), await search("Oslo")]

    assert asyncio.run(main("record")) == [0, 1]
    assert asyncio.run(main("record")) == [2, 3]
    assert asyncio.run(main("use")) == [3, 3]
    assert asyncio.run(main("replay")) == [3, 3]


def test_answers_outlive_the_broker_and_a_new_version_does_not_get_them(tmp_path: Path):
    call, calls = failing()
    for version, num_calls in [("1", 1), ("1", 1), ("2", 2), ("1", 2)]:
        asyncio.run(brokered(call, ToolPolicy(version=version), tmp_path / "cache.db"))
        assert len(calls) == num_calls


def test_tool_errors_are_not_recorded(tmp_path: Path):
    call, calls = failing(ToolError("not yet"))
    with pytest.raises(ToolError, match="not yet"):
        asyncio.run(brokered(call, file=tmp_path / "cache.db"))
    assert asyncio.run(brokered(call, file=tmp_path / "cache.db")) == "found"


def test_secrets_never_reach_the_file_nor_come_out_of_an_older_one(tmp_path: Path):
    async def call(query: str) -> str:
        return "key=hush"

    def recorded(policy: ToolPolicy, mode: Any) -> str:
        return asyncio.run(brokered(call, policy, tmp_path / "cache.db", mode))

    assert recorded(ToolPolicy(secrets=("hush",)), "record") == "key=***"
    assert b"hush" not in (tmp_path / "cache.db").read_bytes()
    assert recorded(ToolPolicy(), "record") == "key=hush"
    assert recorded(ToolPolicy(secrets=("hush",)), "replay") == "key=***"


def test_two_brokers_share_a_file(tmp_path: Path):
    async def main() -> None:
        call, calls = failing()
        async with open_broker(tmp_path / "cache.db") as a, open_broker(tmp_path / "cache.db") as b:
            here, there = a.wrap(tool(call)).call, b.wrap(tool(call)).call
            for i in range(20):
                assert await here(f"a{i}") == await there(f"a{i}") == "found"
                assert await there(f"b{i}") == await here(f"b{i}") == "found"
            assert len(calls) == 40

    asyncio.run(main())
    assert [p.name for p in tmp_path.iterdir()] == ["cache.db"]


def test_concurrent_callers_share_one_look_into_the_file(tmp_path: Path):
    call, calls = failing()
    asyncio.run(brokered(call, file=tmp_path / "cache.db"))

    async def main() -> None:
        async with open_broker(tmp_path / "cache.db") as broker:
            search = broker.wrap(tool(call)).call
            await asyncio.gather(*(search("Oslo") for _ in range(5)))
            step = broker.take_step()
            assert (step["tools/search/hits"], step["tools/search/shared"]) == (1, 4)

    asyncio.run(main())
    assert len(calls) == 1


def test_a_broken_file_is_a_usage_error_before_anything_is_called(tmp_path: Path):
    (tmp_path / "cache.db").write_bytes(b"garbage" * 1000)
    call, calls = failing()
    with pytest.raises(UsageError, match="file is not a database"):
        asyncio.run(brokered(call, file=tmp_path / "cache.db"))
    assert calls == []


def test_a_file_that_can_not_be_written_any_further_ends_who_records_and_nobody_else(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cache, "BUSY_S", 0.01)
    path, said = tmp_path / "cache.db", []

    async def ask(mode: Any) -> list[str]:
        async with open_broker(path, mode, log=said.append) as broker:
            call, _ = failing()
            search = broker.wrap(tool(call)).call
            # as a full disk refuses it, too
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            try:
                return [*await asyncio.gather(search("Oslo"), search("Bergen")), await search("Oslo")]
            finally:
                other.close()

    assert asyncio.run(ask("use")) == ["found"] * 3
    (line,) = said
    assert f"the tool cache '{path}' can't be used: database is locked; name another file" in line
    assert line.endswith("what tools answer is in memory alone")
    with pytest.raises(UsageError, match="database is locked"):
        asyncio.run(ask("record"))


# what can't be asked for


def test_misuse_is_one_sentence(tmp_path: Path):
    call, _ = failing()

    async def main() -> None:
        with pytest.raises(UsageError, match="mode 'replay' has no file"):
            async with open_broker(mode="replay"):
                pass
        async with open_broker(tmp_path / "cache.db") as broker:
            broker.wrap(tool(call))
            with pytest.raises(ValueError, match="'search' is wrapped already"):
                broker.wrap(tool(call))
            with pytest.raises(ValueError, match="can't be checked"):
                broker.wrap(tool(call, "(query: Query)", name="find"))
        async with open_broker(tmp_path / "cache.db", "replay") as broker:
            with pytest.raises(UsageError, match="never recorded"):
                broker.wrap(tool(call), ToolPolicy(cache=False))

    asyncio.run(main())


@pytest.mark.parametrize("wrong", [{"timeout_s": 0}, {"queue_timeout_s": -1}, {"max_concurrent": 0}, {"attempts": 0}])
def test_a_policy_that_lets_nothing_through_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        ToolPolicy(**wrong)


def test_an_empty_secret_is_refused():
    with pytest.raises(ValueError, match="empty string"):
        ToolPolicy(secrets=("hush", ""))


# figures


def test_a_step_has_every_tools_figures_and_starts_from_zero():
    async def main() -> None:
        held = Held()
        async with open_broker() as broker:
            search = broker.wrap(tool(held), ToolPolicy(max_concurrent=1)).call
            broker.wrap(tool(held, name="pages.open"))
            async with asyncio.TaskGroup() as group:
                group.create_task(search("a"))
                group.create_task(search("b"))
                await settle()
                held.go.set()
            step = broker.take_step()
            figures = ["calls", "hits", "shared", "retries", "failures", "errors", "queue_s", "run_s"]
            assert list(step) == [f"tools/{name}/{figure}" for name in ("search", "pages.open") for figure in figures]
            assert step["tools/search/run_s"] > 0 < step["tools/search/queue_s"]
            assert step["tools/search/calls"] == 2
            assert not any(value for key, value in step.items() if key.startswith("tools/pages.open"))
            assert not any(broker.take_step().values())

    asyncio.run(main())


def test_a_tool_that_leaves_most_calls_without_an_answer_is_complained_about_until_the_step_is_taken():
    async def main() -> None:
        async def search(query: str) -> str:
            if query.startswith("down"):
                raise OSError
            if query.startswith("no"):
                raise ToolError(f"nothing, and hush, of {query}")
            return "found"

        async with open_broker() as broker:
            ask = broker.wrap(tool(search), ToolPolicy(attempts=1, secrets=("hush",))).call

            async def asked(word: str, number: int) -> None:
                for i in range(number):
                    with contextlib.suppress(ToolError):
                        await ask(f"{word} {i}")

            await asked("down", 4)
            await asked("no", 7)
            # joined, or answered from memory: no calls of the tool's
            await asked("yes", 8)
            await asked("yes", 8)
            # too few to tell
            assert broker.complaints() == []
            await asked("well", 3)
            # a half
            assert broker.complaints() == []
            await asked("no, ", 1)
            [line] = broker.complaints()
            assert (
                line == "search() left 12 of 23 calls without an answer, the last of them: nothing, and ***, of no,  0"
            )
            step = broker.take_step()
            assert (step["tools/search/failures"], step["tools/search/errors"]) == (4, 8)
            assert broker.complaints() == []

    asyncio.run(main())


def test_tries_begin_as_far_apart_as_a_minute_allows():
    begun: list[float] = []

    async def quick(query: str) -> str:
        begun.append(asyncio.get_running_loop().time())
        return query

    async def main() -> float:
        async with open_broker() as broker:
            search = broker.wrap(tool(quick), ToolPolicy(per_minute=6000)).call
            since = asyncio.get_running_loop().time()
            async with asyncio.TaskGroup() as tg:
                for i in range(5):
                    tg.create_task(search(str(i)))
        return since

    since = asyncio.run(main())
    assert len(begun) == 5
    # a machine that is busy makes a try late, and never early
    assert all(at - since >= 0.01 * n - 1e-3 for n, at in enumerate(begun))


def test_tries_that_waited_for_a_slot_begin_as_far_apart_too():
    begun: list[float] = []

    async def slow_at_first(query: str) -> str:
        begun.append(asyncio.get_running_loop().time())
        # longer than the turns of all others take
        await asyncio.sleep(0 if query else 0.06)
        return query

    async def main() -> None:
        async with open_broker() as broker:
            policy = ToolPolicy(per_minute=6000, max_concurrent=1)
            search = broker.wrap(tool(slow_at_first), policy).call
            await asyncio.gather(*map(search, ["", "a", "b", "c", "d", "e"]))

    asyncio.run(main())
    # 0.04, less what a busy machine makes the first of them late
    assert begun[5] - begun[1] >= 0.02


def test_a_try_that_leaves_before_its_turn_leaves_its_slot():
    async def main() -> None:
        async with open_broker() as broker:
            policy = ToolPolicy(per_minute=1, queue_timeout_s=100, max_concurrent=1, cache=False)
            search = broker.wrap(tool(lambda query: asyncio.sleep(0, query)), policy).call
            await search("a")
            waiter = asyncio.create_task(search("b"))
            await settle()
            waiter.cancel()
            await asyncio.wait([waiter])
            # neither waits for a slot: their turns would come too late
            async with asyncio.timeout(10):
                for _ in range(2):
                    with pytest.raises(ToolError, match="no free slot within 100 s"):
                        await search("c")

    asyncio.run(main())


def test_a_try_whose_turn_would_come_too_late_is_not_waited_for_and_takes_nobodys_turn():
    async def main():
        async with open_broker() as broker:
            policy = ToolPolicy(per_minute=1, queue_timeout_s=10, cache=False)
            search = broker.wrap(tool(lambda query: asyncio.sleep(0, query)), policy).call
            answers = [await search("a")]
            for _ in range(2):
                with pytest.raises(ToolError, match="no free slot within 10 s"):
                    await search("b")
            return answers

    assert asyncio.run(main()) == ["a"]


def test_a_tool_may_say_in_its_own_words_that_it_will_pass_and_how_long_that_takes():
    waits: list[float | None] = [0.0, None]

    async def busy(query: str) -> str:
        raise Passing("the library is closed", waits.pop(0) if waits else None)

    async def main():
        async with open_broker() as broker:
            await broker.wrap(tool(busy), ToolPolicy(attempts=3)).call("x")

    with pytest.raises(ToolError, match=r"gave no answer in 3 attempts \(the library is closed\)"):
        asyncio.run(main())
