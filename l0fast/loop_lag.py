"""How late the event loop is, and what made it late.

    heartbeat    a coroutine that sleeps 5 ms and looks how much later than asked it woke: percentiles of every step
    watch        a thread that looks every 25 ms whether a heartbeat is overdue. From `BLOCKED_S` on it reads the stack of
                 the loop's thread: the innermost function of ours, and the one it had called, are what blocked

asyncio's debug mode would name slow callbacks, too, but times every callback to do so; this costs nothing while the loop
is on time. A call that keeps the interpreter lock (one large JSON document) is seen when it gives it back, in the function
that made it. A loop that waited for nothing but a processor is told apart: nothing of ours is on its stack.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from l0fast.metrics import Histogram

BLOCKED_S = 0.05
"""A heartbeat overdue for this long has its cause looked for [s]."""
LOG_EVERY_S = 10.0
"""The same cause is logged once in this time [s]."""
NO_PROCESSOR = "no processor: nothing of ours was running"

_OURS = f"{Path(__file__).parent}{os.sep}"
_IDLE = (f"{os.sep}asyncio{os.sep}", f"{os.sep}selectors.py")
"""Where a thread is whose loop has nothing to do; uvloop has no frames of its own."""


class LoopLag:
    """How much later than asked the event loop wakes a sleeper [ms].

    A stall of 500 ms is one late waking: it stands in the maximum, and moves the p99 only if such stalls are frequent.
    """

    INTERVAL_S = 0.005

    def __init__(
        self,
        on_beat: Callable[[int, int, int | None], None] = lambda due, now, next_due: None,
        *,
        log: Callable[[str], None] = lambda line: None,
        on_late: Callable[[float], None] = lambda late_s: None,
    ):
        """
        Args:
            on_beat: told of every heartbeat, on the loop: when it was due, when it came, when the next is due (None:
                there is none) [ns, time.monotonic_ns].
            log: told what blocked the loop, in the watching thread.
            on_late: told at every look by the watching thread how long it has watched a heartbeat being overdue [s]; 0 while
                none is. Less than it is overdue where the thread got no time either: the whole process was stopped.
        """
        self.step = Histogram()
        self.whole_run = Histogram()
        self._peak_ms = 0.0
        self._on_beat, self._log, self._on_late = on_beat, log, on_late
        self._due: int | None = None
        """[ns]"""
        self._blocked: dict[str, float] = {}
        """What blocked the loop in this step: for how long [s]."""
        self._logged: dict[str, float] = {}

    async def run(self) -> None:
        due = time.monotonic_ns()
        watch = _Watch(self)
        try:
            while True:
                now = time.monotonic_ns()
                next_due = now + int(self.INTERVAL_S * 1e9)
                self._on_beat(due, now, next_due)
                self._due = due = next_due
                await asyncio.sleep(self.INTERVAL_S)
                self.record(max(0.0, (time.monotonic_ns() - due) / 1e6))
        finally:
            self._due = None
            watch.end()
            now = time.monotonic_ns()
            self._on_beat(now, now, None)

    def record(self, late_ms: float) -> None:
        self.step.add(late_ms)
        self.whole_run.add(late_ms)
        self._peak_ms = max(self._peak_ms, late_ms)

    def take_peak_ms(self) -> float:
        """The most since the last call [ms]."""
        taken, self._peak_ms = self._peak_ms, 0.0
        return taken

    def late_s(self) -> float:
        """How long a heartbeat is overdue now [s]."""
        due = self._due
        return 0.0 if due is None else max(0.0, (time.monotonic_ns() - due) / 1e9)

    def blocked(self, cause: str, duration_s: float) -> None:
        """The loop was blocked, by what; told by the watching thread."""
        self._blocked[cause] = self._blocked.get(cause, 0.0) + duration_s
        now = time.monotonic()
        if now - self._logged.get(cause, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._logged[cause] = now
            self._log(f"the event loop was blocked for {duration_s * 1000:.0f} ms by {cause}")

    def take_step(self) -> dict[str, float | str]:
        """Metrics since the last call. `loop/blocked_by` is there where something held the loop for `BLOCKED_S`."""
        taken, self.step = self.step, Histogram()
        blocked, self._blocked = self._blocked, {}
        metrics: dict[str, float | str] = {**_lag_metrics(taken), "loop/blocked_s": sum(blocked.values())}
        if blocked:
            metrics["loop/blocked_by"] = max(blocked, key=blocked.__getitem__)
        return metrics

    def take_run(self) -> dict[str, float]:
        """Metrics since the start."""
        return _lag_metrics(self.whole_run)


def _lag_metrics(lag: Histogram) -> dict[str, float]:
    return {
        "loop/lag_p50_ms": round(lag.percentile(50), 3),
        "loop/lag_p99_ms": round(lag.percentile(99), 3),
        "loop/lag_p999_ms": round(lag.percentile(99.9), 3),
        "loop/lag_max_ms": round(lag.max, 3),
    }


class _Watch:
    """The thread that looks. Ends within one look."""

    LOOK_S = 0.025

    def __init__(self, lag: LoopLag):
        self._lag = lag
        self._loop_thread = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loop watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        cause, late_s, watched_s, looked = "", 0.0, 0.0, time.monotonic()
        while not self._end.wait(self.LOOK_S):
            now_late_s, now = self._lag.late_s(), time.monotonic()
            watched_s = watched_s + min(now - looked, 4 * self.LOOK_S) if now_late_s >= late_s > 0 else 0.0
            looked = now
            # it has come since the last look
            if cause and now_late_s < late_s:
                self._lag.blocked(cause, late_s)
                cause = ""
            late_s = now_late_s
            if late_s >= BLOCKED_S and not cause:
                cause = blamed(sys._current_frames().get(self._loop_thread))
            self._lag._on_late(watched_s)
        if cause:
            self._lag.blocked(cause, late_s)


def blamed(innermost: FrameType | None) -> str:
    """What a thread is at, in words: "l0fast/agent/context.py:61 fit in numpy/core/numeric.py:330 full"."""
    if innermost is None or any(part in innermost.f_code.co_filename for part in _IDLE):
        return NO_PROCESSOR
    ours: FrameType | None = innermost
    while ours is not None and not ours.f_code.co_filename.startswith(_OURS):
        ours = ours.f_back
    if ours is None or ours is innermost:
        return _place(innermost)
    return f"{_place(ours)} in {_place(innermost)}"


def _place(frame: FrameType) -> str:
    path = frame.f_code.co_filename
    # where it is installed says nothing
    path = path.removeprefix(_OURS.removesuffix(f"l0fast{os.sep}"))
    path = path if path.startswith("l0fast") else "/".join(Path(path).parts[-3:])
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
