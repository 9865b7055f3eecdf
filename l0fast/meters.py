"""All that watches a run, in one piece: shares of a step, loop lag, memory, watchdog, trace, sinks.

    observer    told by agents and the step loop what they do       -> step_shares.py, trace.py
    running()   loop lag, memory, the trace's and the sinks' threads    as long as the run; the trace from `begin_trace` on
    watching()  the watchdog, and looks at the engine                   as long as there are rooms to watch
    take_step() where the step's time went, what the engine did, how late the loop was

Nothing here decides anything about a run, but for the watchdog, which may end it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from l0fast.config import RunConfig
from l0fast.errors import WorldError
from l0fast.loop_lag import LoopLag
from l0fast.metrics import ProcessTreeMemory
from l0fast.observer import Both, Observer
from l0fast.sinks import Row, open_sinks
from l0fast.step_shares import STALL_S, StepShares
from l0fast.trace import Trace, merge_torch, write_trace
from l0fast.types import EngineLoad
from l0fast.watchdog import Probe, Watchdog, stand_down

LOAD_S = 5.0
"""Time an engine has to tell what it did, at the end of a step [s]."""
COUNT_EVERY_S = 0.25
"""Between two looks at the engine where a trace shows them [s]."""
LOOK_S = 1.0
"""Between two looks where none does [s]."""


Load = Callable[[], Awaitable[EngineLoad]]
Gauge = Callable[[], Mapping[str, float]]

_FIGURES: tuple[str, ...] = ("prefill_tokens", "cached_tokens", "recomputed_tokens", "decoded_tokens", "parked")
"""What an engine counts since its start: a step's part of it."""
_PEAKS = {
    "running": "running",
    "waiting": "waiting",
    "in_flight": "in_flight",
    "kv_used": "used_tokens",
    "kv_tokens": "max_tokens",
}
"""What goes up and down, by the name of its metric: the most at any look of a step."""


class Meters:
    def __init__(self, config: RunConfig, path: Path, log: Callable[[str], None], warn: Callable[[str], None]):
        """
        Args:
            path: the run's folder.
            log: told what is of interest later; from other threads, too.
            warn: told what a person should see.
        """
        self._config, self._path, self._log, self._warn = config, path, log, warn
        self.shares = StepShares()
        agents = config.rollout.max_open_groups * config.rollout.group_size
        self._trace = Trace(max(agents, config.engine.slots)) if config.trace.on else None
        self.observer: Observer = self.shares if self._trace is None else Both(self.shares, self._trace)
        self.lag = LoopLag(self._beat, log=log, on_late=self._late)
        self.memory = ProcessTreeMemory()
        self.put: Callable[[Row], None] = lambda row: None
        """Gives a step's metrics to the sinks; returns at once."""
        self.gauges: dict[str, Gauge] = {}
        """What else a trace draws over time, by name, e.g. "sandbox sessions": sessions of each shard."""
        self._threads = ExitStack()
        """The trace's and the sinks'."""
        self._trace_began_s: float | None = None
        """On time.time."""
        self._watchdog: Watchdog | None = None
        self._figures = dict.fromkeys(_FIGURES, 0)
        self._peaks = dict.fromkeys(_PEAKS, 0)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Raises UsageError where a sink can't be had."""
        self.put = self._threads.enter_context(open_sinks(self._config, self._path, self._warn))
        try:
            async with asyncio.TaskGroup() as tg:
                meters = [
                    tg.create_task(self.lag.run(), name="loop lag"),
                    tg.create_task(self.memory.run(), name="memory"),
                ]
                try:
                    yield
                finally:
                    for meter in meters:
                        meter.cancel()
        finally:
            stand_down()
            # threads are waited for, a network perhaps
            await asyncio.to_thread(self._threads.close)
            if self._config.trace.torch_step and self._trace_began_s is not None:
                await asyncio.to_thread(self._merge_profiles, self._trace_began_s)

    def begin_trace(self) -> None:
        """Write it, in the place of another run's: not before this one can go on. Raises OSError where it can't be begun."""
        if self._trace is not None:
            self._threads.enter_context(write_trace(self._trace, self._path / "trace.json", self._warn))
            self._trace_began_s = time.time()

    def _merge_profiles(self, since_s: float) -> None:
        # those of a run that this one goes on with have no place in its trace
        found = (path for path in self._path.glob("torch_rank_*.json") if path.stat().st_mtime >= since_s)
        profiles = sorted(found, key=lambda path: int(path.stem.rpartition("_")[2]))
        if not profiles:
            self._warn(f"no profile: the learner took no step {self._config.trace.torch_step}")
            return
        try:
            merge_torch(self._path / "trace.json", profiles)
        except (OSError, ValueError) as e:
            # the run is over, and both files are there
            self._warn(f"{', '.join(path.name for path in profiles)} can't be put into trace.json: {e}")

    @asynccontextmanager
    async def watching(self, load: Load, probes: Mapping[str, Probe]) -> AsyncIterator[None]:
        """
        Args:
            load: the engine's.
            probes: how to ask the other rooms for their state: "sandbox", "tools", "learner".

        Raises:
            ExceptionGroup: a WorldError of the watchdog.
        """
        config = self._config.watchdog
        # the rooms are open, however long that took
        self.shares.alive()
        self._watchdog = Watchdog(
            self.shares.quiet,
            {"engine": load, **probes},
            quiet_s=config.quiet_s,
            blocked_s=config.blocked_s,
            log=self._log,
        )
        async with asyncio.TaskGroup() as tg:
            tasks = [
                tg.create_task(self._watchdog.run(), name="watchdog"),
                tg.create_task(self._look(load), name="looks at the engine"),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                self._watchdog = None

    async def take_step(self, load: Load) -> dict[str, Any]:
        """Metrics since the last call: `time/step_s`, `share/...`, `engine/...`, `loop/...`."""
        work = None
        try:
            async with asyncio.timeout(LOAD_S):
                work = await load()
        except (WorldError, TimeoutError) as e:
            # no reason to end a run: whoever needs the engine will fail by itself
            why = f"within {LOAD_S:g} s" if isinstance(e, TimeoutError) else f"({e})"
            self._warn(f"the engine did not tell what it did in this step {why}: its time is all under decode")
        metrics: dict[str, Any] = self.shares.take_step(work) | self.lag.take_step()
        if work is not None:
            now = {figure: getattr(work, figure) for figure in _FIGURES}
            # an engine that was started again counts from 0
            metrics |= {f"engine/{name}": max(0, n - self._figures[name]) for name, n in now.items()}
            self._figures = now
            self._observe(work)
            metrics |= {f"engine/{name}": most for name, most in self._peaks.items()}
            self._peaks = dict.fromkeys(_PEAKS, 0)
        return metrics

    def _observe(self, work: EngineLoad) -> None:
        for name, figure in _PEAKS.items():
            self._peaks[name] = max(self._peaks[name], getattr(work, figure))

    def _beat(self, due: int, now: int, next_due: int | None) -> None:
        self.shares.beat(due, now, next_due)
        if self._trace is not None and now - due > STALL_S * 1e9:
            self._trace.block("stall", due, now)

    def _late(self, late_s: float) -> None:
        if (watchdog := self._watchdog) is not None:
            watchdog.loop_is_late(late_s)

    async def _look(self, load: Load) -> None:
        trace, loop = self._trace, asyncio.get_running_loop()
        every_s = LOOK_S if trace is None else COUNT_EVERY_S
        before: EngineLoad | None = None
        while True:
            since_s = loop.time()
            with suppress(WorldError, TimeoutError):  # there is no more to a look than that it is missing
                async with asyncio.timeout(LOAD_S):
                    now = await load()
                self._observe(now)
                if trace is not None:
                    _draw(trace, now, before)
                before = now
            if trace is not None:
                for name, gauge in self.gauges.items():
                    trace.count(name, gauge())
                trace.count("loop lag [ms]", {"max": self.lag.take_peak_ms()})
            await asyncio.sleep(max(0.0, every_s - (loop.time() - since_s)))


def _draw(trace: Trace, now: EngineLoad, before: EngineLoad | None) -> None:
    trace.count("engine requests", {"running": now.running, "waiting": now.waiting})
    trace.count("KV use [%]", {"used": 100 * now.used_tokens / max(1, now.max_tokens)})
    if before is not None:
        prefilled, decoded = (getattr(now, f) - getattr(before, f) for f in ("prefill_tokens", "decoded_tokens"))
        trace.count("engine tokens", {"prefill": prefilled, "decode": decoded})
