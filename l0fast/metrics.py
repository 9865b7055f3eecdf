"""What meters are made of: percentiles of many values, and how much memory a run's processes hold.

How late the loop is: loop_lag.py. Where a step's time went: step_shares.py.
"""

import asyncio
import math
import os
import time
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


class ProcessTreeMemory:
    """Peak memory of this process and all its descendants, as PSS: pages that n processes share count 1/n in each.

    Read from /proc/<pid>/smaps_rollup (Linux >= 4.14). Processes of other users, and those that gave up being
    dumpable, can't be read: `unreadable` is the most of them seen at once. Containers are children of their daemon, not
    of this process, and not counted. A sample walks page tables, so it runs in a thread: 4,096 sandboxes take seconds.
    """

    INTERVAL_S = 2.0
    SHARE = 0.005
    """Of one processor, at most; the interval is longer where a sample takes longer."""

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
            await asyncio.sleep(max(self.INTERVAL_S, (time.monotonic() - started) / self.SHARE))

    def sample(self) -> float:
        """Look once; the sum now [MB]."""
        total_kib = unreadable = 0
        tree = [self._root, *descendants(self._root, self._proc)]
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


def descendants(root: int, proc: Path = Path("/proc")) -> list[int]:
    """Processes below this one, and below those; not itself."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        # pid (name) state ppid ...; the name may hold spaces and brackets, and half a character
        parent = int(stat.rpartition(b")")[2].split()[1])
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
