"""What is to happen, soonest first; of what happens at the same time, whatever was added first.

Two sorted lists, the next one last: numbers are compared when something is added, and nothing when it is taken. To add and to take
one costs, on a host where heapq with tuples of (time, order, thing) takes 0.7 to 1.0 us and 1.3 us with 10,000 entries:

    entries       100    1,000   10,000
    interpreted   0.9      1.8      8.4   us
    compiled      0.4      0.7      3.5   us, by bench/compiled.py; there turns of agents cost a quarter less than with heaps
"""

import math
from typing import Generic, TypeVar

T = TypeVar("T")


class Schedule(Generic[T]):
    def __init__(self) -> None:
        self._minus_times: list[float] = []
        self._things: list[T] = []

    def add(self, at: float, thing: T) -> None:
        minus, minus_times = -at, self._minus_times
        # bisect_left by hand: compiled, it costs a third of a call of that
        low, high = 0, len(minus_times)
        while low < high:
            middle = (low + high) // 2
            if minus_times[middle] < minus:
                low = middle + 1
            else:
                high = middle
        minus_times.insert(low, minus)
        self._things.insert(low, thing)

    def next_at(self) -> float:
        """When the first one happens; never, where there is none."""
        return -self._minus_times[-1] if self._minus_times else math.inf

    def first(self) -> T | None:
        return self._things[-1] if self._things else None

    def take(self, by: float) -> T | None:
        """The first one, no longer in here, if it happens by then."""
        minus_times = self._minus_times
        if minus_times and -minus_times[-1] <= by:
            minus_times.pop()
            return self._things.pop()
        return None

    def remove(self, thing: T) -> None:
        """Raises ValueError where it is not in here."""
        at = self._things.index(thing)
        del self._things[at], self._minus_times[at]

    def clear(self) -> None:
        self._minus_times.clear()
        self._things.clear()
