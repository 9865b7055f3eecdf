"""Two clocks for what is simulated: events that cost no time, and the loop's own time, compressed.

    SimulatedClock     now_s jumps to the next event once the loop has nothing left to do: as fast as the host can
    CompressedClock    now_s = loop.time() x time_compression: whatever delays the loop delays the simulated world too

Both wake sleepers and call back in the order of their times.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Any, Protocol

_SETTLE_TURNS = 10
"""Loop turns that what was woken has to go to sleep again, before time moves on."""
_TIMER_S = 0.0005
"""uvloop rounds a timer to the nearest millisecond: asked for this much later, it never fires early [s]."""


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    @property
    def now_s(self) -> float: ...

    def call_at(self, at_s: float, call: Callable[[], Any]) -> Timer:
        """Call when `now_s` has come to `at_s`; soon, where it has already. What returns False has woken nobody."""
        ...

    def touch(self) -> None:
        """Something is going on: whoever moves time by hand waits a little longer."""
        ...

    async def sleep(self, duration_s: float) -> None:
        """Return when the clock has moved on by `duration_s` [s]."""
        ...


async def _sleep_on(clock: Clock, duration_s: float) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    timer = clock.call_at(clock.now_s + duration_s, lambda: future.done() or future.set_result(None))
    try:
        await future
    finally:
        timer.cancel()


class _Event:
    __slots__ = ("call",)

    def __init__(self, call: Callable[[], Any]):
        self.call: Callable[[], Any] | None = call

    def cancel(self) -> None:
        self.call = None


class SimulatedClock:
    """Event time, from 0.

    Time moves when nothing was asked for or came for `_SETTLE_TURNS` turns of the loop; work that takes more turns than
    that starts late on this clock.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        """[s]"""
        self._events: list[tuple[float, int, _Event]] = []
        self._order = itertools.count()
        self._quiet_turns = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        """The one that turns for us; none while there are no events."""

    def call_at(self, at_s: float, call: Callable[[], Any]) -> Timer:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            loop.call_soon(self._tick)
        event = _Event(call)
        heapq.heappush(self._events, (max(at_s, self.now_s), next(self._order), event))
        self._quiet_turns = 0
        return event

    def touch(self) -> None:
        self._quiet_turns = 0

    async def sleep(self, duration_s: float) -> None:
        await _sleep_on(self, duration_s)

    def _tick(self) -> None:
        # what was cancelled neither moves time nor keeps the loop turning
        while self._events and self._events[0][2].call is None:
            heapq.heappop(self._events)
        if not self._events:
            self._loop = None
            return
        self._quiet_turns += 1
        if self._quiet_turns > _SETTLE_TURNS:
            self._quiet_turns = 0
            self.now_s, _, event = heapq.heappop(self._events)
            assert event.call is not None
            if event.call() is False:
                self._quiet_turns = _SETTLE_TURNS
        asyncio.get_running_loop().call_soon(self._tick)


class CompressedClock:
    """The running loop's clock, from 0 at the first look, times a constant."""

    def __init__(self, time_compression: float = 1.0):
        """
        Args:
            time_compression: simulated seconds a second of the loop.
        """
        if not time_compression > 0:
            raise ValueError(f"time_compression = {time_compression}: give a number above 0")
        self.time_compression = time_compression
        self._origin_s: float | None = None

    @property
    def now_s(self) -> float:
        return self._loop_s(asyncio.get_running_loop()) * self.time_compression

    def call_at(self, at_s: float, call: Callable[[], Any]) -> Timer:
        loop = asyncio.get_running_loop()
        delay_s = at_s / self.time_compression - self._loop_s(loop)
        return loop.call_later(max(0.0, delay_s) + _TIMER_S, call)

    def touch(self) -> None:
        pass

    async def sleep(self, duration_s: float) -> None:
        await _sleep_on(self, duration_s)

    def _loop_s(self, loop: asyncio.AbstractEventLoop) -> float:
        now_s = loop.time()
        if self._origin_s is None:
            self._origin_s = now_s
        return now_s - self._origin_s
