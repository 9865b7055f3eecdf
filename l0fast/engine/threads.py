"""How many OpenMP threads a step takes: all, or one while somebody else computes here.

OpenMP's threads spin while they wait for each other. Alone on two processors two threads make a step a third shorter than
one does. Beside others that compute, a thread that spins holds the processor which the thread it waits for needs, many times
a step: where three to eight processes shared two processors, a step of the shipped policy with 48 rows took 190 to 1,800 ms,
and 9 to 50 ms by one thread.

    all  -- for more than half of the time some thread wanted a processor and had none -->  one, for `HOLD_S`  -->  all
"""

from collections.abc import Callable
from pathlib import Path

LOOK_S = 0.2
"""Between two looks [s]."""
HOLD_S = 10.0
"""Time with one thread, after which all are tried again [s]."""
_MOST_WAITING = 0.5
"""Of the time. What driver and sandboxes take of a quiet machine stays below: there all threads are worth it."""


class Threads:
    """A state machine: `look` is told how long threads have waited, and says how many there shall be."""

    def __init__(self, most: int, now_s: float, waited_s: float):
        self.most = self.now = most
        self._looked_s, self._waited_s = now_s, waited_s
        self._until_s = 0.0

    def look(self, now_s: float, waited_s: Callable[[], float]) -> int:
        """
        Args:
            waited_s: the time so far that threads wanted a processor and had none; asked for when it counts [s].
        """
        if now_s - self._looked_s < LOOK_S or now_s < self._until_s:
            return self.now
        waited, waited_before_s = waited_s(), self._waited_s
        crowded = self.now > 1 and waited - waited_before_s > _MOST_WAITING * (now_s - self._looked_s)
        self._looked_s, self._waited_s = now_s, waited
        self.now, self._until_s = (1, now_s + HOLD_S) if crowded else (self.most, 0.0)
        return self.now


def waited_s() -> float:
    """The time so far that threads of this process wanted a processor and had none; 0 where the kernel does not say [s]."""
    total_ns = 0
    for thread in Path("/proc/self/task").iterdir():
        try:
            total_ns += int((thread / "schedstat").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            # it has ended
            continue
    return total_ns / 1e9
