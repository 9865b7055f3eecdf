"""What a run measures about itself: how late its loop is, how much memory its processes hold, where a step's time went.

`LoopLag.run()` and `ProcessTreeMemory.run()` are endless coroutines for the run's TaskGroup; cancelling ends them.
`StepClock` needs no task: coroutines say when they enter and leave a part, and the clock does the rest.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class Histogram:
    """Percentiles of any number of values in bounded memory, right to 2 %.

    Buckets grow by 2 % from 0.01 up to 10^6; what lies outside counts in the first or last. The maximum is exact.
    """

    _LOW, _GROWTH, _BUCKETS = 0.01, 1.02, 931

    def __init__(self) -> None:
        self._counts = [0] * self._BUCKETS
        self.count = 0
        self.max = 0.0

    def add(self, value: float) -> None:
        bucket = 0 if value <= self._LOW else math.ceil(math.log(value / self._LOW) / math.log(self._GROWTH))
        self._counts[min(bucket, self._BUCKETS - 1)] += 1
        self.count += 1
        self.max = max(self.max, value)

    def percentile(self, q: float) -> float:
        """Smallest bucket bound that q percent of the values don't pass; 0 where there are none."""
        rank = max(1, math.ceil(q / 100 * self.count))
        seen = 0
        for bucket, n in enumerate(self._counts):
            seen += n
            if seen >= rank:
                # the last bucket has no upper bound
                return self.max if bucket == self._BUCKETS - 1 else min(self.max, self._LOW * self._GROWTH**bucket)
        return 0.0


class LoopLag:
    """How much later than asked the event loop wakes a sleeper [ms].

    A stall of 500 ms is one late waking: it stands in the maximum, and moves the p99 only if such stalls are frequent.
    """

    INTERVAL_S = 0.005

    def __init__(self) -> None:
        self.step = Histogram()
        self.whole_run = Histogram()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self.INTERVAL_S
            await asyncio.sleep(self.INTERVAL_S)
            self.record(max(0.0, loop.time() - due) * 1000)

    def record(self, late_ms: float) -> None:
        self.step.add(late_ms)
        self.whole_run.add(late_ms)

    def take_step(self) -> dict[str, float]:
        """Metrics since the last call."""
        taken, self.step = self.step, Histogram()
        return _lag_metrics(taken)

    def take_run(self) -> dict[str, float]:
        """Metrics since the start."""
        return _lag_metrics(self.whole_run)


def _lag_metrics(lag: Histogram) -> dict[str, float]:
    return {
        "loop/lag_p50_ms": round(lag.percentile(50), 3),
        "loop/lag_p99_ms": round(lag.percentile(99), 3),
        "loop/lag_max_ms": round(lag.max, 3),
    }


class ProcessTreeMemory:
    """Peak memory of this process and all its descendants, as PSS: pages that n processes share count 1/n in each.

    Read from /proc/<pid>/smaps_rollup (Linux >= 4.14). Processes of other users, and those that gave up being
    dumpable, can't be read: `unreadable` is the most of them seen at once. Containers are children of their daemon, not
    of this process, and not counted. A sample walks page tables, so it runs in a thread and takes at most 5 % of its time.
    """

    INTERVAL_S = 2.0

    def __init__(self, root: int | None = None, proc: Path = Path("/proc")):
        self._root, self._proc = root or os.getpid(), proc
        self.peak_mb = 0.0
        """[MB, 10^6 bytes]"""
        self.processes = 0
        """Most processes seen at once."""
        self.unreadable = 0

    async def run(self) -> None:
        while True:
            started = time.monotonic()
            await asyncio.to_thread(self.sample)
            await asyncio.sleep(max(self.INTERVAL_S, 20 * (time.monotonic() - started)))

    def sample(self) -> float:
        """Look once; the sum now [MB]."""
        total_kib = unreadable = 0
        tree = [self._root, *_descendants(self._root, self._proc)]
        for pid in tree:
            try:
                total_kib += _pss_kib((self._proc / str(pid) / "smaps_rollup").read_text())
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since it was listed
            except PermissionError:
                unreadable += 1
        mb = total_kib * 1024 / 1e6
        self.peak_mb = max(self.peak_mb, mb)
        self.processes = max(self.processes, len(tree))
        self.unreadable = max(self.unreadable, unreadable)
        return mb


def _descendants(root: int, proc: Path) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        # pid (name) state ppid ...; the name may hold spaces and brackets
        parent = int(stat.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    pending = [root]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def _pss_kib(smaps_rollup: str) -> int:
    for line in smaps_rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0  # a zombie has no pages


class StepClock:
    """Where the wall clock of a step went, in parts that add up to it exactly.

    Many coroutines are in a part at once. A moment belongs to the first of `parts` that anyone is in, and to "other"
    where nobody is in any: with ("learn", "generate", "execute"), "execute" is the time sessions ran while the engine
    had nothing to do.
    """

    def __init__(
        self,
        parts: Sequence[str] = ("evaluate", "learn", "sync", "generate", "execute"),
        now: Callable[[], float] = time.perf_counter,
    ):
        self._inside = dict.fromkeys(parts, 0)
        self._spent_s = dict.fromkeys([*parts, "other"], 0.0)
        self._now = now
        self._since = now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Be in a part for the length of the block."""
        self._settle()
        self._inside[name] += 1
        try:
            yield
        finally:
            self._settle()
            self._inside[name] -= 1

    def take_step(self) -> dict[str, float]:
        """{"time/step_s": ..., "time/<part>_s": ..., "time/other_s": ...} since the last call [s]."""
        self._settle()
        spent, self._spent_s = self._spent_s, dict.fromkeys(self._spent_s, 0.0)
        return {"time/step_s": sum(spent.values())} | {f"time/{name}_s": s for name, s in spent.items()}

    def _settle(self) -> None:
        now = self._now()
        owner = next((name for name, n in self._inside.items() if n), "other")
        self._spent_s[owner] += now - self._since
        self._since = now
