"""Clocks for what is simulated: two that move when nothing else does, and the loop's own, compressed.

    EventClock         now_s jumps from event to event, and there is no loop: for worlds of calls alone
    SimulatedClock     an EventClock that jumps whenever its loop would have to wait: for coroutines
    CompressedClock    now_s = loop.time() x time_compression: whatever delays the loop delays the simulated world too

All call back in the order of times, and the two with a loop wake sleepers.

How the second one knows: asyncio's loop asks its selector to wait exactly when no callback is ready. The selector of
`SimulatedClock.run` looks for I/O without waiting, and where there is none lets the next event happen instead:

    no callback is ready: select(timeout) -> I/O that has come, else the next event, else (no events) wait for I/O

So an event happens when all that the last one set going has come to rest, however many turns of the loop that takes: the same
program has the same times, and no turn is lost on finding out. The loop's own timers, deadlines in real seconds, run when
they are due. A thread's work takes no time on this clock, which runs ahead of it.
"""

import asyncio
import math
import selectors
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from l0fast.engine.schedule import Schedule

T = TypeVar("T")

_TIMER_S = 0.0005
"""uvloop rounds a timer to the nearest millisecond: asked for this much later, it never fires early [s]."""


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(ABC):
    # no protocol: bench/compiled.py calls what is of a class directly
    @property
    @abstractmethod
    def now_s(self) -> float: ...

    @abstractmethod
    def call_at(self, at_s: float, call: Callable[[], Any]) -> Timer:
        """Call when `now_s` has come to `at_s`; soon, where it has already. What returns False has set nothing going."""

    async def sleep(self, duration_s: float) -> None:
        """Return when the clock has moved on by `duration_s` [s]."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.call_at(self.now_s + duration_s, lambda: future.done() or future.set_result(None))
        try:
            await future
        finally:
            timer.cancel()


class _Event:
    __slots__ = ("at_s", "call")

    def __init__(self, at_s: float, call: Callable[[], Any]):
        self.at_s = at_s
        self.call: Callable[[], Any] | None = call

    def cancel(self) -> None:
        self.call = None


class EventClock(Clock):
    """Event time, from 0, moved by hand."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._events: Schedule[_Event] = Schedule()

    @property
    def now_s(self) -> float:
        """[s]"""
        return self._now_s

    def call_at(self, at_s: float, call: Callable[[], Any]) -> Timer:
        if math.isnan(at_s):
            raise ValueError(f"at_s = {at_s}: no event can wait for that, give a number of seconds")
        event = _Event(max(at_s, self._now_s), call)
        self._events.add(event.at_s, event)
        return event

    def has_events(self) -> bool:
        """Whether anything is to happen; what was cancelled is not."""
        while (event := self._events.first()) is not None and event.call is None:
            self._events.take(event.at_s)
        return event is not None

    def move(self) -> None:
        """To the next event that sets something going, or past the last."""
        while (event := self._events.take(math.inf)) is not None:
            if event.call is not None:
                self._now_s = event.at_s
                if event.call() is not False:
                    return

    def move_to(self, at_s: float) -> None:
        """Let happen what does until then."""
        while (event := self._events.take(at_s)) is not None:
            if event.call is not None:
                self._now_s = event.at_s
                event.call()
        self._now_s = max(self._now_s, at_s)


class SimulatedClock(EventClock):
    """Event time for coroutines. Made outside the loop, which it brings along: `clock.run(main(clock))`."""

    def __init__(self) -> None:
        super().__init__()
        self._loop: asyncio.AbstractEventLoop | None = None
        """The one that moves it; none outside `run`."""

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """What `asyncio.run` does, on a loop that moves this clock. An event that raises ends the run with that."""
        try:
            with asyncio.Runner(loop_factory=self._new_loop) as runner:
                return runner.run(main)
        finally:
            # what had been left to happen would wake tasks of a loop that is closed
            self._loop = None
            self._events.clear()

    def call_at(self, at_s: float, call: Callable[[], Any]) -> Timer:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "a SimulatedClock moves on no loop but its own: start with clock.run(main()) in place of asyncio.run(main()), "
                "or use a CompressedClock"
            )
        return super().call_at(at_s, call)

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        self._loop = asyncio.SelectorEventLoop(_MovesInsteadOfWaiting(self))
        return self._loop


class _MovesInsteadOfWaiting(selectors.DefaultSelector):
    def __init__(self, clock: SimulatedClock):
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout == 0 or not self._clock.has_events():
            return super().select(timeout)
        if not (ready := super().select(0)):
            self._clock.move()
        return ready


class CompressedClock(Clock):
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

    def _loop_s(self, loop: asyncio.AbstractEventLoop) -> float:
        now_s = loop.time()
        if self._origin_s is None:
            self._origin_s = now_s
        return now_s - self._origin_s
