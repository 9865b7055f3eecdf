"""What a benchmark watches besides its own clock: CPU of a tree of processes, and a loop that has nothing to do.

python -m bench.probes        that loop: prints its lag as JSON when its input ends
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from l0fast.loop_lag import LoopLag

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree_cpu_s(*roots: int) -> float:
    """CPU of processes, their living descendants, and all that these have waited for, each once [s].

    Of two calls the difference is what was spent between them, as long as nobody died that nobody waited for.
    """
    parents: dict[int, int] = {}
    spent: dict[int, float] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            # one that ended meanwhile is in its parent's figures, or will be
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # pid (name, which may hold anything) state ppid ... utime stime cutime cstime
                fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
                parents[int(name)] = int(fields[1])
                spent[int(name)] = sum(map(int, fields[11:15])) * _TICK_S
    total = 0.0
    for pid, cpu_s in spent.items():
        above: int | None = pid
        while above is not None and above not in roots:
            above = parents.get(above)
        total += cpu_s if above is not None else 0.0
    return total


def rss_mb() -> float:
    """Of this process [MB, 10^6 bytes]."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def idle_loop() -> Iterator[dict[str, float]]:
    """A bare loop in another process while the block runs; its lag is in the yielded dict after it."""
    lag: dict[str, float] = {}
    # started and ended between measurements, never while a loop must be on time
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.probes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        yield lag
        said, _ = process.communicate(timeout=30)
        lag |= json.loads(said)
    finally:
        process.kill()
        process.wait()


async def _watch_itself() -> None:
    lag, ended = LoopLag(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    meter = asyncio.create_task(lag.run())
    await ended.wait()
    loop.remove_reader(sys.stdin.fileno())
    meter.cancel()
    print(json.dumps(lag.take_run()))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_watch_itself())
