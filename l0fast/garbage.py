"""Python's cycle collector beside thousands of agents: what is old is set aside, so that no collection looks at all there is.

    young    collected as ever, every 700 new objects: some 2 ms
    old      set aside (gc.freeze) after each collection of the middle generation; freed as ever when nobody refers to it
    cycles   among what was set aside stay, until `sweep` finds that twice as much is there as after the last sweep

By default the collector goes through all objects, modules included, whenever they have grown by a quarter: a third of the
loop's CPU in a small run, and with 4,096 agents and their trajectories half a second in which the loop serves nobody.
Fewer, larger collections of the young are no way out: each takes as much longer (0.1 s for 50,000 objects). An episode that ends, well or badly, leaves its cycles young or
none at all (measured: 10 old objects in 6,000 turns), so sweeps are rare; they come between two steps.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_EVERY_S = 600.0
"""[s]"""
_GROWTH = 2.0
_MIN_OBJECTS = 500_000
"""Fewer are not worth a sweep."""


class OldObjects:
    """What was set aside. Made by `old_objects_aside`."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._looked_s = now()
        self._after_sweep = gc.get_freeze_count()

    def sweep(self) -> int:
        """Collect cycles among old objects if there are twice as many as after the last time; returns how many it found.

        Looks every ten minutes, for counting takes 10 ms a million; where it comes to a sweep a fraction of a second.
        """
        if self._now() - self._looked_s < LOOK_EVERY_S:
            return 0
        self._looked_s = self._now()
        there_are = gc.get_freeze_count()
        if there_are < max(_MIN_OBJECTS, _GROWTH * self._after_sweep):
            return 0
        gc.unfreeze()
        found = gc.collect()
        gc.freeze()
        self._after_sweep = gc.get_freeze_count()
        return found


@contextmanager
def old_objects_aside(now: Callable[[], float] = time.monotonic) -> Iterator[OldObjects]:
    """Set old objects aside for as long as the block runs. One block at a time in a process."""

    def collected(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 1:
            gc.freeze()

    gc.collect()
    gc.freeze()
    gc.callbacks.append(collected)
    try:
        yield OldObjects(now)
    finally:
        gc.callbacks.remove(collected)
        gc.unfreeze()
