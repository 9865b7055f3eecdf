"""Python's cycle collector beside thousands of agents: what is old is set aside, so that no collection looks at all there is.

    young    collected every 50 new objects: 0.03 ms, and hardly ever more than 1 ms
    old      what survives that is set aside (gc.freeze), looked at once; freed as ever when nobody refers to it
    cycles   among what was set aside stay, until `sweep` finds that the process has grown by half since its first call

By default the collector goes through all objects, modules included, whenever they have grown by a quarter: a third of the
loop's CPU in a small run, and with 4,096 agents and their trajectories half a second in which the loop serves nobody.
Fewer, larger collections of the young are no way out: each takes as much longer (0.1 s for 50,000 objects). Least of all
here: the collector counts new objects less those that were freed, so where as many episodes end as begin, its usual 700
are up to 35,000 objects and the ids of their prompts, looked at for up to 0.06 s. Many small ones take less of the CPU
together, since nothing is looked at twice.

An episode that ends shall leave no cycle, least of all one that holds its trajectory: then there is never a sweep.
"""

import asyncio
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_YOUNG = 50
"""New objects less freed ones before the young are collected."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_GROWTH, _GROWTH_BYTES = 1.5, 256 << 20
"""A process larger than 1.5 times what it was after the last sweep, and 256 MiB, may hold what nobody needs."""


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES


class OldObjects:
    """What was set aside. Made by `old_objects_aside`."""

    def __init__(self, rss_bytes: Callable[[], int] = _rss_bytes) -> None:
        self._rss_bytes = rss_bytes
        self._after_sweep: int | None = None

    def sweep(self) -> int:
        """Collect cycles among old objects if the process has grown; returns how many objects were in some.

        Microseconds, or where it comes to a sweep up to a second: for a moment in which few wait. The first call finds what
        so many agents need, which is no cycle's doing.
        """
        if self._after_sweep is None:
            self._after_sweep = self._rss_bytes()
        if self._rss_bytes() <= _GROWTH * self._after_sweep + _GROWTH_BYTES:
            return 0
        gc.unfreeze()
        found = gc.collect()
        gc.freeze()
        self._after_sweep = self._rss_bytes()
        return found


async def let_go(objects: list[Any]) -> None:
    """Empty a list bit by bit, with the loop served in between.

    The last reference to a thousand groups frees all that was said in them at once, and the loop serves nobody meanwhile.
    """
    while objects:
        objects.pop()
        await asyncio.sleep(0)


def drop(objects: list[Any]) -> None:
    """Empty a list one by one. For threads: thousands of arrays that go at once hold the event loop's for 0.05 to 0.1 s."""
    while objects:
        objects.pop()


@contextmanager
def old_objects_aside(rss_bytes: Callable[[], int] = _rss_bytes) -> Iterator[OldObjects]:
    """Set old objects aside for as long as the block runs. One block at a time in a process."""

    def collected(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            gc.freeze()

    gc.collect()
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(_YOUNG, *thresholds[1:])
    gc.callbacks.append(collected)
    try:
        yield OldObjects(rss_bytes)
    finally:
        gc.callbacks.remove(collected)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
