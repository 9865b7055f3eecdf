"""Python's cycle collector beside thousands of agents: what is old is set aside, so that no collection looks at all there is.

    young    collected every 50 new objects: 0.03 ms, and hardly ever more than 1 ms
    old      what survives that is set aside (gc.freeze), looked at once; freed as ever when nobody refers to it
    cycles   among what was set aside stay, until `sweep` finds that the process has grown by half since its first call

By default the collector goes through all objects, modules included, whenever they have grown by a quarter: a third of the
loop's CPU in a small run, and half a second's stall with 4,096 agents and their trajectories.
Fewer and larger collections of the young don't help: each takes proportionally longer (0.1 s for 50,000 objects). And the
collector counts new objects less freed ones: where as many episodes end as begin, the default threshold of 700 is reached
with up to 35,000 young objects and the ids of their prompts, which take up to 0.06 s. Many small collections take less CPU,
since nothing is looked at twice.

An episode that ends should leave no cycle, above all none that holds its trajectory: then a sweep is never needed.
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

        Takes microseconds, or up to a second if it sweeps: call it when few wait. The first call only notes the size that so
        many agents need.
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
    """Empty a list bit by bit, with the loop served in between: to free a thousand groups at once would stall it."""
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
