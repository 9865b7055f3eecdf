"""How late the loop is, and the name of what made it late."""

import asyncio
import sys
import threading
import time

import pytest

from l0fast.loop_lag import BLOCKED_S, NO_PROCESSOR, LoopLag, _Watch, blamed
from l0fast.metrics import Histogram


def hold_the_loop() -> None:
    """For as long as it takes to be found out."""
    until = time.monotonic() + 3 * BLOCKED_S
    while time.monotonic() < until:
        pass


def test_a_blocked_loop_is_seen_and_what_blocked_it_is_named():
    lines: list[str] = []
    beats: list[tuple[int, int, int | None]] = []

    async def main() -> LoopLag:
        lag = LoopLag(lambda *beat: beats.append(beat), log=lines.append)
        watch = asyncio.create_task(lag.run())
        await asyncio.sleep(0)
        hold_the_loop()
        while not lag.whole_run.count:  # noqa: ASYNC110
            await asyncio.sleep(0)
        watch.cancel()
        await asyncio.wait([watch])
        return lag

    lag = asyncio.run(main())
    taken = lag.take_step()
    assert float(taken["loop/lag_max_ms"]) >= 2 * BLOCKED_S * 1000
    assert str(taken["loop/blocked_by"]).endswith("hold_the_loop")
    assert BLOCKED_S <= float(taken["loop/blocked_s"]) <= float(taken["loop/lag_max_ms"]) / 1000
    assert any("event loop was blocked" in line for line in lines)
    assert max(now - due for due, now, _ in beats) >= 2 * BLOCKED_S * 1e9
    assert beats[-1][2] is None, "the account is told that no beat follows"
    assert "loop/blocked_by" not in lag.take_step()


def test_the_innermost_function_of_ours_is_blamed_and_what_it_called():
    class Spy:
        """Called from inside of l0fast, by a library."""

        def __le__(self, other: object) -> bool:
            seen.append(blamed(sys._getframe()))
            raise KeyError

    seen: list[str] = []
    with pytest.raises(KeyError):
        Histogram().add(Spy())  # pyright: ignore[reportArgumentType]
    ours, _, inner = seen[0].partition(" in ")
    assert ours.startswith("l0fast/metrics.py:")
    assert ours.endswith(" add")
    assert inner.endswith("__le__")


def test_a_loop_that_waits_blames_nobody():
    assert blamed(None) == NO_PROCESSOR


def test_the_same_cause_is_logged_once_in_a_while_and_summed_up():
    lines: list[str] = []
    lag = LoopLag(log=lines.append)
    for _ in range(3):
        lag.blocked("a", 0.5)
    lag.blocked("b", 1.0)
    assert lines == ["the event loop was blocked for 500 ms by a", "the event loop was blocked for 1000 ms by b"]
    taken = lag.take_step()
    assert (taken["loop/blocked_by"], taken["loop/blocked_s"]) == ("a", 2.5)


def test_a_step_takes_its_lag_and_the_run_keeps_it():
    lag = LoopLag()
    for late_ms in (1.0, 1.0, 8.0):
        lag.record(late_ms)
    assert lag.take_step()["loop/lag_max_ms"] == 8.0
    assert (lag.take_peak_ms(), lag.take_peak_ms()) == (8.0, 0.0)
    lag.record(2.0)
    lags = dict.fromkeys(["loop/lag_p50_ms", "loop/lag_p99_ms", "loop/lag_p999_ms", "loop/lag_max_ms"], 2.0)
    assert lag.take_step() == lags | {"loop/blocked_s": 0}
    assert lag.take_run()["loop/lag_max_ms"] == 8.0
    assert lag.take_run()["loop/lag_p50_ms"] == pytest.approx(1.0, rel=0.02)


def test_the_watching_thread_ends_with_the_heartbeat():
    async def main() -> None:
        watch = asyncio.create_task(LoopLag().run())
        await asyncio.sleep(0)
        assert "loop watch" in {thread.name for thread in threading.enumerate()}
        watch.cancel()
        began = time.monotonic()
        await asyncio.wait([watch])
        assert time.monotonic() - began < 1

    asyncio.run(main())
    assert "loop watch" not in {thread.name for thread in threading.enumerate()}


def test_time_in_which_the_whole_process_was_stopped_is_not_watched(monkeypatch: pytest.MonkeyPatch):
    watched: list[float] = []
    lag = LoopLag(on_late=watched.append)
    late = iter([0.0, 0.03, 0.06, 90.0, 90.1])
    watch = _Watch.__new__(_Watch)
    watch._lag, watch._loop_thread = lag, 0
    clock = [0.0]

    class Looks:
        """Time passes between two looks, as much as the loop is late by."""

        def wait(self, seconds: float) -> bool:
            now_late_s = next(late, None)
            if now_late_s is None:
                return True
            clock[0] = now_late_s
            return False

    monkeypatch.setattr(lag, "late_s", lambda: clock[0])
    monkeypatch.setattr("l0fast.loop_lag.time.monotonic", lambda: clock[0])
    watch._end = Looks()  # pyright: ignore[reportAttributeAccessIssue]
    watch._run()
    assert watched == pytest.approx([0, 0, 0.03, 0.13, 0.23])
