"""Simulated engines side by side: arithmetic and calls, no coroutine and no ids.

    submit -> placement.py says which replica -> Replica (simulated_replica.py) ... on the clock ... -> done()

simulated.py puts the `Engine` protocol before it, traffic.py plays agents that are calls, too.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from l0fast.engine.base import EngineLoad
from l0fast.engine.clock import Clock, Timer
from l0fast.engine.placement import Placement
from l0fast.engine.simulated_replica import Replica, Request, Speed


class _Placed:
    """A replica and when it is looked at next."""

    # `wake` is made once, not with every event
    __slots__ = ("number", "replica", "timer", "timer_s", "wake")

    def __init__(self, number: int, replica: Replica, wake: Callable[["_Placed"], Any]):
        self.number, self.replica = number, replica
        self.wake = partial(wake, self)
        self.timer: Timer | None = None
        self.timer_s = 0.0


class Cluster:
    def __init__(
        self, clock: Clock, *, speed: Speed, slots: int, kv_tokens: int, replicas: int = 1, forgets: bool = True
    ):
        """
        Args:
            slots: requests that run at once, in each replica.
            kv_tokens: KV entries of each replica.
            replicas: engines that work side by side.
            forgets: `forget` frees KV entries at once; SGLang's wait to be evicted.
        """
        self.clock = clock
        self._all = [
            _Placed(i, Replica(speed, slots=slots, kv_tokens=kv_tokens, forgets=forgets), self._wake)
            for i in range(replicas)
        ]
        self._placement = Placement(replicas, slots)
        for i in range(replicas):
            self._placement.up(i)

    def submit(self, request: Request, done: Callable[[], Any]) -> None:
        """`done` is called when all of it has been sampled, never before this returns.

        Raises:
            ValueError: it needs more KV entries than there are.
        """
        number = self._placement.place(request.conversation)
        assert number is not None, "all replicas are up"
        placed = self._all[number]
        try:
            placed.replica.submit(request, self.clock.now_s)
        except ValueError:
            self._placement.done(number)
            raise
        request.replica, request.done = number, done
        self._deliver(placed)

    def cancel(self, request: Request) -> None:
        """Whatever it sampled is lost, and nobody is called. No harm where it is done."""
        if request.done is not None:
            request.done = None
            placed = self._all[request.replica]
            self._placement.done(placed.number)
            placed.replica.cancel(request, self.clock.now_s)
            self._deliver(placed)

    def update_weights(self, policy_version: int, *, pause_s: float = 0.0) -> None:
        """What is under way keeps what it sampled and goes on under the new weights, computed again."""
        for placed in self._all:
            placed.replica.update_weights(policy_version, self.clock.now_s, pause_s=pause_s)
            self._deliver(placed)

    def forget(self, conversation: str) -> None:
        self._placement.forget(conversation)
        for placed in self._all:
            # it may have moved
            placed.replica.forget(conversation)

    def lose_home(self, conversation: str) -> None:
        """It may be placed anywhere next time; its KV entries stay until they are evicted."""
        self._placement.forget(conversation)

    def stall(self, duration_s: float) -> None:
        """Let nothing get any further for so long; returns at once."""
        for placed in self._all:
            placed.replica.stall(duration_s, self.clock.now_s)
            self._deliver(placed)

    def load(self) -> EngineLoad:
        """Summed over the replicas."""
        self._advance()
        loads = [placed.replica.load() for placed in self._all]
        return EngineLoad(**{f.name: sum(getattr(load, f.name) for load in loads) for f in fields(EngineLoad)})

    def slot_s(self) -> float:
        """Slots in use, summed over time and replicas; over slots x replicas x `clock.now_s`, how busy they were [slots x s]."""
        self._advance()
        return sum(placed.replica.slot_s for placed in self._all)

    def _advance(self) -> None:
        for placed in self._all:
            placed.replica.advance(self.clock.now_s)
            self._deliver(placed)

    def _wake(self, placed: _Placed) -> bool:
        placed.timer = None
        placed.replica.advance(self.clock.now_s)
        return self._deliver(placed)

    def _deliver(self, placed: _Placed) -> bool:
        """Call who is done, and be called again at the replica's next event. Returns whether anybody was called."""
        replica = placed.replica
        called = bool(replica.finished)
        if called:
            # who is called may ask for more
            finished, replica.finished = replica.finished, []
            for request in finished:
                # nobody waits for one that was done at the moment it was cancelled
                if (done := request.done) is not None:
                    request.done = None
                    self._placement.done(placed.number)
                    done()
        at_s = replica.next_event_s
        if placed.timer is not None:
            # one that fires early costs a look, and is rarer than moving it with every request
            if placed.timer_s <= at_s < math.inf:
                return called
            placed.timer.cancel()
            placed.timer = None
        if at_s < math.inf:
            placed.timer, placed.timer_s = self.clock.call_at(at_s, placed.wake), at_s
        return called
